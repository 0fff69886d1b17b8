"""What the pipeline models of all rooms do alike: read a checkpoint, prepare and run a step."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_pipes.checkpoint.blueprint import Blueprint, Checkpoint
from mlx_vlm_pipes.checkpoint.canonical import canonical_state, tower_adapter
from mlx_vlm_pipes.checkpoint.modules import load_decoder, load_tower
from mlx_vlm_pipes.checkpoint.sharding import expected_bytes
from mlx_vlm_pipes.config import KVCacheConfig, KVCacheParams, PipelineConfig, weights_format
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TextContext
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, WeightsError
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.interfaces import (
    Buffer,
    ContextT,
    InferenceSession,
    LogProbabilitiesMixin,
    Model,
    ModelInputs,
    ModelOutputs,
    Phase,
    PipelineModelWithKVCache,
    RaggedInputs,
    VisionInputs,
)
from mlx_vlm_pipes.kv_cache import KVCacheInputs
from mlx_vlm_pipes.nn.language_model import LanguageModel, captured_layers
from mlx_vlm_pipes.nn.lora_groups import group_fields, next_group_fields
from mlx_vlm_pipes.nn.parallel import shared_rows
from mlx_vlm_pipes.nn.ragged import (
    active_images,
    flat_tokens,
    image_token_indices,
    require_image_rows,
    require_replicas,
    row_offsets,
    step_phase,
)
from mlx_vlm_pipes.steps import one_device, require_inputs, require_kind
from mlx_vlm_pipes.weights.layout import Layout, Transform

RaggedT = TypeVar("RaggedT", bound=RaggedInputs[Any])
VisionT = TypeVar("VisionT", bound=VisionInputs[Any])


class CheckpointModel(LogProbabilitiesMixin, PipelineModelWithKVCache[ContextT]):
    """A pipeline model that is loaded when it is made.

    A room says which config class and tensor layouts are its own, which changes of values its
    configuration implies (`transforms`) and which modules a checkpoint needs (`blueprint`).
    """

    config_class: ClassVar[Any]
    layouts: ClassVar[Sequence[Layout]]
    tower_prefix: ClassVar[str] = ""  # of the tower's parameters among the canonical names

    @classmethod
    def get_kv_params(
        cls,
        huggingface_config: AutoConfig,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """What the room's config class makes of the same arguments."""
        return cls.config_class.construct_kv_params(
            huggingface_config, pipeline_config, devices, kv_cache_config, cache_dtype
        )

    @classmethod
    def calculate_max_seq_len(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """What the room's config class makes of it. Raises: ConfigError for a longer max_length."""
        return cls.config_class.calculate_max_seq_len(pipeline_config, huggingface_config)

    @classmethod
    def read_config(cls, pipeline_config: PipelineConfig) -> tuple[Any, tuple[Transform, ...]]:
        """What config.json alone says, and the changes of values that it implies."""
        config = cls.config_class.initialize(pipeline_config)
        return config, cls.transforms(config)

    @classmethod
    def transforms(cls, config: Any) -> tuple[Transform, ...]:
        """The changes of tensor values that a configuration implies."""
        del config
        return ()

    @classmethod
    @abstractmethod
    def blueprint(cls, config: Any, checkpoint: Checkpoint) -> Blueprint:
        """The networks for a checkpoint, which finalises `config`. Nothing is read of it."""

    def load_parts(self, session: InferenceSession) -> list[Model]:
        """Read the weights through the adapter; the tower, if any, and the language model.

        Raises: ConfigError for eagle_layers that there are not; WeightsError naming missing,
        unexpected and mis-shaped tensors.
        """
        config, changes = self.read_config(self.pipeline_config)
        state = canonical_state(
            self.weights, self.adapter, self.layouts, self.pipeline_config, changes
        )
        checkpoint = Checkpoint(
            self.pipeline_config, state, self.return_logits, self.return_hidden_states
        )
        self.merged_adapter = tower_adapter(state.loras)
        tower, decoder_config = self.blueprint(config, checkpoint)
        captured = captured_layers(
            self.return_hidden_states, self.eagle_layers, decoder_config.num_layers
        )
        text, rest = checkpoint.text, checkpoint.tower(self.tower_prefix)
        session.expected_bytes += expected_bytes(decoder_config, text, rest, self.ranks)
        state.clear()  # the parts alone hold the tensors now, and let go what has been read
        parts = []
        if tower is not None and self.ranks.is_first:
            parts.append(load_tower(session, tower, rest))
        elif tower is not None:
            parts.append(Model(_no_tower, {}))
            tower = None
        decoder, loaded = load_decoder(session, decoder_config, text)
        self.model_config = config
        self.own_kv_heads = decoder.config.num_kv_heads if self.ranks.are_many else None
        self.language = LanguageModel(
            decoder,
            self.kv_params,
            self.return_logits,
            self.return_hidden_states,
            captured=captured,
            compile=session.compile and self.pipeline_config.model.use_subgraphs,
        )
        loads = [module.parameters() for module in (tower, decoder) if module is not None]
        arrays = cast("list[tuple[str, mx.array]]", tree_flatten(loads))
        self.weight_bytes = sum(array.nbytes for _, array in arrays)
        self.networks = [*parts, Model(self.language, loaded.weights)]
        return [*self.networks]

    def lora_fields(self, contexts: Sequence[TextContext]) -> dict[str, Buffer]:
        """The LoRA inputs that the contexts' model_name asks for; none where none is loaded.

        Raises: UnknownAdapter, listing the adapters there are.
        """
        slots = [self.adapter_slot(context.model_name) for context in contexts]
        lora = self.pipeline_config.lora
        if lora is None or not self.adapters:
            return {}
        lengths = [context.tokens.active_length for context in contexts]
        return group_fields(slots, lengths, self.language.adapter_ranks, lora.max_num_loras)


def _no_tower(*arguments: Buffer) -> Buffer:
    """The tower of all ranks but the first."""
    raise RuntimeError("the vision tower is on rank 0; encode_images shares its rows")


def announce(kv_cache_inputs: KVCacheInputs | None, contexts: Sequence[TextContext]) -> None:
    """Tell the cache inputs, if any, how many tokens of each row the coming step runs, and which
    of a row's tokens see each other both ways.

    Raises: InputError for another number of rows.
    """
    if kv_cache_inputs is not None:
        lengths = [context.tokens.active_length for context in contexts]
        kv_cache_inputs.expect(lengths, [context.whole_spans for context in contexts])


def following(prev: RaggedT, next_tokens: Buffer, **changes: Any) -> RaggedT:
    """The inputs of the decode step after `prev`: one token a row, not synchronised."""
    if prev.kv_cache_inputs is not None:
        prev.kv_cache_inputs.expect([1] * next_tokens.shape[0])
    changes |= next_group_fields(prev)
    offsets = mx.arange(next_tokens.shape[0] + 1, dtype=mx.uint32)
    listed = [offsets] if isinstance(prev.input_row_offsets, list) else offsets
    return replace(
        prev, tokens=next_tokens, input_row_offsets=listed, phase=Phase.DECODE, **changes
    )


# The second base is in the first already; MAX's hierarchy (docs/api.md) names it with its argument.
class VisionLanguageModel(
    CheckpointModel[TextAndVisionContext],
    PipelineModelWithKVCache[TextAndVisionContext],
    Generic[VisionT],
):
    """A tower and a decoder.

    A room says how pictures are packed for its tower (`pack`), how many rows each makes
    (`count_rows`), and which token a row replaces (`placeholder`); `batch_key`, `step_fields`,
    `next_fields` and `positions` only where it differs from the others.
    """

    inputs_class: type[VisionT]
    vision_model: Model
    language_model: Model

    def install(self, session: InferenceSession) -> None:
        degree = self.pipeline_config.model.data_parallel_degree
        if degree != 1:
            raise ConfigError(
                f"data_parallel_degree {degree}; {type(self).__name__} runs one replica, use 1"
            )
        self.vision_model, self.language_model = self.load_model(session)

    def load_model(self, session: InferenceSession) -> tuple[Model, Model]:
        """Vision and language model, with their weights in.

        Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
        """
        vision, language = self.load_parts(session)
        return vision, language

    def require_safetensors(self, error: type[ConfigError | WeightsError]) -> None:
        """Raises: `error`, the documented one of the room, for weight files of another kind."""
        files = self.pipeline_config.model.weight_path
        if files and weights_format(files) != "safetensors":
            raise error(f"weight files {files[0].name}, ...; expected .safetensors")

    # ---- what a room says

    @property
    def placeholder(self) -> int | None:
        """The token that receives a vision row; None for the first of each picture's range."""
        return None

    @abstractmethod
    def count_rows(self, image: ImageMetadata) -> int:
        """Vision rows that a picture makes."""

    @abstractmethod
    def pack(self, images: Sequence[ImageMetadata]) -> Sequence[Buffer]:
        """The tower's arguments for these pictures, in the order of the inputs' vision_fields."""

    def batch_key(self, image: ImageMetadata) -> Hashable:
        """Pictures with equal keys can be packed together; by default all of them."""
        del image
        return None

    def step_fields(
        self, contexts: Sequence[TextAndVisionContext], *, has_pixels: bool
    ) -> dict[str, Any]:
        """Fields of the room's inputs that not all rooms have; has_pixels: pictures go in raw."""
        del contexts, has_pixels
        return {}

    def next_fields(self, prev: VisionT, count: int) -> dict[str, Any]:
        """What changes of them in the decode step of `count` rows after `prev`."""
        del prev, count
        return {}

    def positions(self, inputs: VisionT) -> Buffer | None:
        """Decoder positions [axes, T], where they are not just the tokens' places."""
        del inputs
        return None

    # ---- what all rooms do

    def encode_images(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Vision rows [M_i, E] of each picture; those that can be packed share a batch.

        Lazy, but for several ranks: their first one encodes for all. Raises: there what it raises,
        and MediaError on the others.
        """
        if not self.ranks.are_many or not images:
            return self._encode(images)
        encode = (lambda: mx.concatenate(self._encode(images))) if self.ranks.is_first else None
        rows = shared_rows(self.ranks, encode)
        ends = np.cumsum([self.count_rows(image) for image in images])
        return list(mx.split(rows, ends[:-1].tolist()))

    def _encode(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        groups: dict[Hashable, list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(self.batch_key(image), []).append(i)
        encoded: dict[int, Buffer] = {}
        for members in groups.values():
            own = [images[i] for i in members]
            rows = self.vision_model(*self.pack(own))
            ends = np.cumsum([self.count_rows(image) for image in own])
            encoded.update(zip(members, mx.split(rows, ends[:-1].tolist()), strict=True))
        return [encoded[i] for i in range(len(images))]

    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[TextAndVisionContext]],
        kv_cache_inputs: KVCacheInputs[Buffer, Buffer] | None = None,
        return_n_logits: int = 1,
        *,
        image_embeddings: Buffer | None = None,
    ) -> VisionT:
        """Ragged inputs; pictures with tokens among the active ones are encoded in this step.

        image_embeddings [M, E]: the vision rows of exactly these pictures, encoded before.
        Raises: ConfigError for more than one replica, UnknownAdapter, InputError for a token id
        beyond the vocabulary, ImageTokenMismatch for a picture with more or fewer placeholders
        than vision rows, and what the room's `pack` raises.
        """
        require_replicas(replica_batches)
        contexts = replica_batches[0]
        images = active_images(contexts)
        has_pixels = bool(images) and image_embeddings is None
        fields = self.step_fields(contexts, has_pixels=has_pixels)
        require_image_rows(contexts, self.placeholder, self.count_rows)
        fields |= {
            "tokens": flat_tokens(contexts, self.vocab_size),
            "input_row_offsets": self._per_device(row_offsets(contexts)),
            "return_n_logits": mx.array([return_n_logits], dtype=mx.int64),
            "image_embeddings": image_embeddings,
            **self.lora_fields(contexts),
        }
        if images or image_embeddings is not None:
            indices = mx.array(image_token_indices(contexts))
            fields["image_token_indices"] = self._per_device(indices)
        if has_pixels:
            packed = map(self._per_device, self.pack(images))
            fields |= zip(self.inputs_class.vision_fields, packed, strict=True)
        announce(kv_cache_inputs, contexts)
        phase = step_phase(contexts, return_n_logits)
        return self.inputs_class(**fields, kv_cache_inputs=kv_cache_inputs, phase=phase)

    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step.

        Raises: TypeError for other inputs, ConfigError without a cache, ImageTokenMismatch if
        vision rows and image_token_indices differ in number.
        """
        inputs = require_inputs(model_inputs, self.inputs_class)
        rows, indices = inputs.image_embeddings, inputs.image_token_indices
        if rows is None and inputs.has_vision_inputs:
            see = functools.partial(self.vision_model, *inputs.vision_arguments())
            many = self.ranks.are_many
            rows = shared_rows(self.ranks, see if self.ranks.is_first else None) if many else see()
        return self.language_model(
            inputs.tokens,
            one_device(inputs.input_row_offsets),
            inputs.return_n_logits,
            inputs.kv_cache_inputs,
            rows,
            None if indices is None else one_device(indices),
            self.positions(inputs),
            inputs.mode,
        )

    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> VisionT:
        """The decode step's inputs, lazily: next_tokens [B] becomes the tokens, pictures are gone.

        Raises: TypeError for other inputs.
        """
        prev = require_kind(prev_model_inputs, self.inputs_class)
        gone = dict.fromkeys(prev.vision_fields)
        own = self.next_fields(prev, next_tokens.shape[0])
        return following(
            prev, next_tokens, image_token_indices=None, image_embeddings=None, **gone, **own
        )

    def _per_device(self, array: Buffer) -> Buffer | list[Buffer]:
        return [array] if self.inputs_class.per_device else array
