"""The model contract: what the engine asks of an architecture and what it gets back.

The engine sees a model only through `PipelineModel` and a request only through its context.
Names and shapes are those of MAX's pipeline architectures: docs/api.md, which also says what
"documented" means in this package.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import mlx.core as mx

from mlx_vlm_pipes.contexts import (
    EOSTracker,
    ImageMetadata,
    SamplingParams,
    TextAndVisionContext,
    TextContext,
    TokenBuffer,
)
from mlx_vlm_pipes.dtypes import Device, DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, UnknownAdapter, shown
from mlx_vlm_pipes.log_probabilities import LogProbabilities, LogProbabilitiesMixin
from mlx_vlm_pipes.model_device import StepsOnDevice, require_device
from mlx_vlm_pipes.session import InferenceSession, Model
from mlx_vlm_pipes.steps import (
    Buffer,
    ModelInputs,
    ModelOutputs,
    Phase,
    RaggedInputs,
    ReturnHiddenStates,
    ReturnLogits,
    StepMode,
    VisionInputs,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlx_vlm_pipes.config import KVCacheConfig, KVCacheParams, ModelConfig, PipelineConfig
    from mlx_vlm_pipes.kv_cache import KVCacheInputs
    from mlx_vlm_pipes.weights import Weights, WeightsAdapter

__all__ = [
    "AlwaysSignalBuffersMixin", "ArchConfigWithKVCache", "Buffer", "EOSTracker", "ImageMetadata",
    "InferenceSession", "LayerWork", "LogProbabilities", "LogProbabilitiesMixin", "Model",
    "ModelInputs", "ModelOutputs", "Phase", "PipelineModel", "PipelineModelWithKVCache",
    "RaggedInputs", "ReturnHiddenStates", "ReturnLogits", "SamplingParams", "StepMode",
    "TextAndVisionContext", "TextContext", "TokenBuffer", "VisionInputs",
]  # fmt: skip

ContextT = TypeVar("ContextT", bound=TextContext)


@dataclass(frozen=True)
class LayerWork:
    """What one layer of a tower or decoder holds at once, in elements: for plans, not for running.

    tokens (or patches) x width are its hidden states, tokens x heads the queries of all heads,
    tokens x inner the MLP's; scores are the attention weights of all heads, each `head_dim` wide.
    """

    tokens: int
    width: int
    heads: int
    inner: int
    scores: int
    head_dim: int


class ArchConfigWithKVCache(ABC):
    """A config class made in two steps (docs/api.md#configuration)."""

    @classmethod
    @abstractmethod
    def initialize(
        cls, pipeline_config: PipelineConfig, model_config: ModelConfig | None = None
    ) -> Self:
        """Read what the Hugging Face configuration alone can say; no weights are touched."""

    @abstractmethod
    def get_kv_params(self) -> KVCacheParams: ...

    @abstractmethod
    def get_max_seq_len(self) -> int: ...


class PipelineModel(StepsOnDevice, ABC, Generic[ContextT]):
    """One architecture, loaded. The engine calls prepare, execute, prepare_next, execute, ...

    device: the one of `devices`; weights are loaded and steps run there. ranks: the processes that
    the session loads models for, one for each of `devices`.
    """

    def __init__(  # noqa: PLR0913  # the documented ones, and ours by keyword only
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        kv_cache_config: KVCacheConfig,
        weights: Weights,
        adapter: WeightsAdapter | None = None,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        *,
        eagle_layers: Sequence[int] | None = None,
    ) -> None:
        """Load the model. With `ModelConfig.enable_echo` it returns all logits.

        eagle_layers: the decoder layers, counted from 0, whose outputs `EAGLE3` returns, in this
        order: after the layer, and for the last one before the final norm. A negative one counts
        from the last, as Python's indices do.
        """
        pipeline_config.require_supported()
        self.ranks = session.ranks
        degree = pipeline_config.model.data_parallel_degree
        if self.ranks.are_many and degree > 1:
            raise ConfigError(
                f"data_parallel_degree {degree} with {self.ranks.size} ranks, which run one replica"
                " together; use 1"
            )
        self.device = require_device(devices, session, pipeline_config.model.devices)
        pipeline_config.model.resolve(weights)
        self.pipeline_config = pipeline_config
        self.session = session
        self.devices = devices
        self.device_refs = [DeviceRef.from_device(device) for device in devices]
        self.kv_cache_config = kv_cache_config
        self.weights = weights
        self.adapter = adapter
        echo = pipeline_config.model.enable_echo
        self.return_logits = ReturnLogits.ALL if echo else return_logits
        self.return_hidden_states = return_hidden_states
        self.eagle_layers = eagle_layers
        self.max_seq_len = self.calculate_max_seq_len(pipeline_config, self.huggingface_config)
        with self.device.active():
            self.install(session)

    def install(self, session: InferenceSession) -> None:
        """Load the networks: the constructor's last act. A model without its own loads nothing."""

    @property
    def huggingface_config(self) -> Any:
        """Raises: ConfigError naming the model path when there is none."""
        return self.pipeline_config.model.require_huggingface_config()

    @property
    def dtype(self) -> DType:
        return self.pipeline_config.model.dtype

    @property
    def signal_buffers(self) -> list[Buffer]:
        """An empty one for each of several devices, none for one. Inputs carry them, and nothing
        reads them: MLX synchronises devices with buffers of its own."""
        return [mx.zeros((0,), mx.uint8) for _ in self.devices] if self.ranks.are_many else []

    @classmethod
    def estimate_weights_size(cls, pipeline_config: PipelineConfig) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in pipeline_config.model.weight_path)

    @classmethod
    def estimate_activation_memory(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any
    ) -> int:
        """Bytes beyond weights and cache, by MAX's rule of thumb; 0 where it has none.

        MAX sets so much aside before it sizes its cache, whatever the model's size. Nothing here
        calls it: plans and budgets come from shapes (engine/plan.py, engine/state.py).
        """
        del pipeline_config, huggingface_config
        return 0

    @classmethod
    @abstractmethod
    def calculate_max_seq_len(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any
    ) -> int: ...

    @abstractmethod
    def prepare_initial_token_inputs(
        self,
        replica_batches: Sequence[Sequence[ContextT]],
        kv_cache_inputs: KVCacheInputs | None = None,
        return_n_logits: int = 1,
        *,
        image_embeddings: Buffer | None = None,
    ) -> ModelInputs:
        """Ragged inputs for the active tokens of every context.

        image_embeddings [M, E]: the vision rows of exactly the pictures with tokens among the
        active ones, from `encode_images`. A text model refuses them.
        """

    @abstractmethod
    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step. Lazy: nothing is evaluated before the caller reads a result."""

    @abstractmethod
    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> ModelInputs:
        """Inputs of the decode step after `prev`; next_tokens [B], not synchronised."""

    def as_replicas(self, contexts: Sequence[ContextT]) -> list[Sequence[ContextT]]:
        """A batch as `prepare_initial_token_inputs` takes it, all rows in the first replica."""
        others = self.pipeline_config.model.data_parallel_degree - 1
        return [contexts, *([] for _ in range(others))]

    def encode_images(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Vision rows [M_i, E] of each image, independent of its neighbours. Lazy.

        The engine caches them and hands them back as `image_embeddings` of a step.
        """
        raise NotImplementedError(f"{type(self).__name__} has no vision model")

    def vision_work(self, image: ImageMetadata) -> LayerWork:
        """What a layer of the tower holds while it encodes one image."""
        raise NotImplementedError(f"{type(self).__name__} has no vision model")

    def compute_log_probabilities(
        self,
        session: InferenceSession,
        model_inputs: ModelInputs,
        model_outputs: ModelOutputs,
        next_tokens: Buffer,
        batch_top_n: list[int],
        batch_echo: list[bool],
    ) -> list[LogProbabilities | None]:
        raise NotImplementedError(f"{type(self).__name__} computes no log-probabilities")


class DecoderSizes(Protocol):
    """A decoder whose `config` says its widths (nn.decoder_config.DecoderConfig)."""

    @property
    def config(self) -> Any: ...


class TextSide(Protocol):
    """What the engine may ask of a model's text side beyond running it."""

    @property
    def break_length(self) -> int | None: ...

    def key_table(self, reach: int) -> int: ...

    def key_table_end(self, reach: int) -> int | None: ...

    @property
    def decoder(self) -> DecoderSizes: ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def adapter_ranks(self) -> tuple[int, ...]: ...

    @property
    def traces(self) -> int: ...


class PipelineModelWithKVCache(PipelineModel[ContextT]):
    """A model whose attention reads a KV cache; `kv_params` says of what shape.

    model_config: the room's config, finalised. language: its text side. networks: tower and text
    side with their weights, by which saved prefixes know the model. weight_bytes: what its
    weights take in memory, adapters included. merged_adapter: the LoRA adapter, if any, that
    changes the vision tower, whose weights it is merged into.
    """

    model_config: Any
    language: TextSide
    networks: Sequence[Model] = ()
    weight_bytes: int = 0
    merged_adapter: str = ""
    own_kv_heads: int | None = None  # of the model's KV heads, on one of many ranks

    @functools.cached_property
    def kv_params(self) -> KVCacheParams:
        """What `get_kv_params` makes of the model's own configuration, for this rank."""
        params = self.get_kv_params(
            self.huggingface_config,
            self.pipeline_config,
            self.device_refs[:1],
            self.kv_cache_config,
            self.pipeline_config.model.cache_dtype,
        )
        return replace(params, devices=self.device_refs, own_kv_heads=self.own_kv_heads)

    @property
    def cache_break_length(self) -> int | None:
        """Rows that grow past this length must be prefilled again (Phi-3), or None."""
        return self.language.break_length

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return self.language.decoder.config.vocab_size

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded LoRA adapters; their slots count from 1."""
        return self.language.adapters

    def adapter_slot(self, name: str) -> int:
        """The slot of a LoRA adapter; 0 for the base model (no name).

        Raises: UnknownAdapter, listing the adapters there are; for the base model too where an
        adapter has changed its vision tower.
        """
        if not name and self.merged_adapter:
            raise UnknownAdapter(
                f"no answers of the base model: adapter {shown(self.merged_adapter)} changes the"
                " vision tower too, for all requests; load the model once more without it",
                param="adapter",
            )
        if not name:
            return 0
        if name not in self.adapters:
            loaded = ", ".join(self.adapters) or "none"
            message = f"no adapter {shown(name)}; loaded: {loaded}"
            raise UnknownAdapter(message, param="adapter")
        return self.adapters.index(name) + 1

    @classmethod
    @abstractmethod
    def get_kv_params(
        cls,
        huggingface_config: Any,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams: ...


class AlwaysSignalBuffersMixin:
    """One (empty) signal buffer per device, also for one device (docs/api.md)."""

    devices: list[Device]

    @property
    def signal_buffers(self) -> list[Buffer]:
        if "_signal_buffers" not in self.__dict__:
            self._signal_buffers = [mx.zeros((0,), mx.uint8) for _ in self.devices]
        return self._signal_buffers
