"""Llama3Model (docs/api.md): the pipeline model over the shared decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_vlm_pipes.architectures.base import CheckpointModel, announce, following
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.architectures.llama3.weight_adapters import LAYOUTS
from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import (
    Buffer,
    InferenceSession,
    Model,
    ModelInputs,
    ModelOutputs,
    PipelineModelWithKVCache,
    RaggedInputs,
)
from mlx_vlm_pipes.kv_cache import KVCacheInputs
from mlx_vlm_pipes.nn.buffer_step import BufferStep
from mlx_vlm_pipes.nn.ragged import (
    flat_tokens,
    replica_splits,
    require_replicas,
    row_offsets,
    step_phase,
)
from mlx_vlm_pipes.steps import require_inputs, require_kind


@dataclass
class Llama3Inputs(RaggedInputs[Buffer]):
    """One step's inputs.

    tokens int32 [T]; input_row_offsets uint32 [B + 1]; return_n_logits int64 [1]. The LoRA
    fields group the rows by adapter (nn.lora_groups); all None without LoRA. Steps read lora_ids
    and lora_grouped_offsets, the others say the same in other words. data_parallel_splits int64
    [replicas + 1]: where each replica's rows end, for more than one replica; nested lists of them
    are flattened in `buffers`.
    """

    tokens: Buffer
    input_row_offsets: Buffer
    signal_buffers: list[Buffer]
    return_n_logits: Buffer
    lora_grouped_offsets: Buffer | None = None
    num_active_loras: Buffer | None = None
    lora_end_idx: Buffer | None = None
    batch_seq_len: Buffer | None = None
    lora_ids_kv: Buffer | None = None
    lora_grouped_offsets_kv: Buffer | None = None
    data_parallel_splits: Buffer | Sequence[Sequence[int]] | None = None

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Everything but the LoRA tensors, in the order of docs/api.md#steps."""
        splits = self.data_parallel_splits
        if splits is None:
            middle = list(self.signal_buffers)
        elif isinstance(splits, mx.array):
            middle = [splits]
        else:
            middle = [mx.array([n for replica in splits for n in replica], dtype=mx.int64)]
        cache = self.kv_cache_inputs.flatten() if self.kv_cache_inputs is not None else []
        return (self.tokens, self.input_row_offsets, self.return_n_logits, *middle, *cache)


class LlamaModelBase(CheckpointModel[TextContext], PipelineModelWithKVCache[TextContext]):
    """What Llama and OLMo share; `norm_method` tells them apart."""

    model_config: Llama3Config
    config_class = Llama3Config
    layouts = LAYOUTS
    norm_method: Literal["rms_norm"] | Literal["layer_norm"]
    attention_bias: bool = False
    state_dict: dict[str, Any]
    model: Model

    def install(self, session: InferenceSession) -> None:
        self.model = self.load_model(session)

    @classmethod
    def blueprint(cls, config: Llama3Config, checkpoint: Checkpoint) -> Blueprint:
        config.finalize(
            checkpoint.outer,
            checkpoint.text,
            *checkpoint.modes,
            cls.norm_method,
            cls.attention_bias,
        )
        return Blueprint(None, config.decoder_config())

    def load_model(self, session: InferenceSession) -> Model:
        """Read the weights through the adapter, build the decoder, install and evaluate."""
        (model,) = self.load_parts(session)
        self.state_dict = dict(model.weights)
        return Model(BufferStep(model.module, self.kv_params, self.adapters), model.weights)

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
        *,
        image_embeddings: Buffer | None = None,
    ) -> Llama3Inputs:
        """Ragged inputs: the rows of all replicas in order, on the one device.

        Raises: ConfigError unless there are data_parallel_degree replicas; UnknownAdapter;
        InputError for image_embeddings (there is no place for them) and for a token id beyond
        the vocabulary.
        """
        if image_embeddings is not None:
            raise InputError("image_embeddings for a text model; leave them out")
        degree = self.pipeline_config.model.data_parallel_degree
        require_replicas(replica_batches, degree)
        contexts = [context for batch in replica_batches for context in batch]
        announce(kv_cache_inputs, contexts)
        return Llama3Inputs(
            tokens=flat_tokens(contexts, self.vocab_size),
            input_row_offsets=row_offsets(contexts),
            signal_buffers=self.signal_buffers,
            return_n_logits=mx.array([return_n_logits], dtype=mx.int64),
            kv_cache_inputs=kv_cache_inputs,
            phase=step_phase(contexts, return_n_logits),
            data_parallel_splits=None if degree == 1 else replica_splits(replica_batches),
            **self.lora_fields(contexts),
        )

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step. Raises: TypeError for other inputs, ConfigError without a cache."""
        inputs = require_inputs(model_inputs, Llama3Inputs)
        return self.model(
            inputs.tokens,
            inputs.input_row_offsets,
            inputs.return_n_logits,
            inputs.kv_cache_inputs,
            None,
            None,
            None,
            inputs.mode,
        )

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> Llama3Inputs:
        """The decode step's inputs, lazily: next_tokens [B] becomes the tokens."""
        return following(require_kind(prev_model_inputs, Llama3Inputs), next_tokens)


class Llama3Model(LlamaModelBase):
    """Llama, Mistral, Granite and Phi-3: RMS norm."""

    norm_method: Literal["rms_norm"] | Literal["layer_norm"] = "rms_norm"


class OlmoModel(LlamaModelBase):
    """OLMo: layer norm without weights, and `clip_qkv`."""

    norm_method: Literal["rms_norm"] | Literal["layer_norm"] = "layer_norm"
