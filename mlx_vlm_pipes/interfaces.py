"""The model contract: what the engine asks of an architecture and what it gets back.

The engine sees a model only through `PipelineModel` and a request only through its context.
Source: the documented pipeline API (spec, sections 1.1, 1.7 and 1.9).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_pipes.contexts import (
    EOSTracker,
    ImageMetadata,
    SamplingParams,
    TextAndVisionContext,
    TextContext,
    TokenBuffer,
)
from mlx_vlm_pipes.dtypes import Device, DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, InputError

if TYPE_CHECKING:
    from typing_extensions import Self

    from mlx_vlm_pipes.config import KVCacheConfig, KVCacheParams, ModelConfig, PipelineConfig
    from mlx_vlm_pipes.kv_cache import KVCacheInputs
    from mlx_vlm_pipes.weights import Weights, WeightsAdapter

__all__ = [
    "AlwaysSignalBuffersMixin", "ArchConfigWithKVCache", "Buffer", "EOSTracker", "ImageMetadata",
    "InferenceSession", "LogProbabilities", "LogProbabilitiesMixin", "Model", "ModelInputs",
    "ModelOutputs", "PipelineModel", "PipelineModelWithKVCache", "ReturnHiddenStates",
    "ReturnLogits", "SamplingParams", "TextAndVisionContext", "TextContext", "TokenBuffer",
    "VisionWork",
]  # fmt: skip

Buffer = mx.array
ContextT = TypeVar("ContextT", bound=TextContext)


class ReturnLogits(str, enum.Enum):
    """Which positions get logits: the last of each row, the last n of each row, or all."""

    LAST_TOKEN = "last_token"
    VARIABLE = "variable"
    ALL = "all"


class ReturnHiddenStates(str, enum.Enum):
    """Which hidden states `execute` returns beside the logits (spec, section 1.7)."""

    NONE = "none"
    LAST = "last"
    LAST_PER_DEVICE = "last_per_device"
    ALL = "all"
    ALL_NORMALIZED = "all_normalized"
    EAGLE3 = "eagle3"


@dataclass(kw_only=True)
class ModelInputs:
    """What one step reads. The documented inputs add their own fields to these."""

    kv_cache_inputs: KVCacheInputs | None = None
    lora_ids: Buffer | None = None
    lora_ranks: Buffer | None = None
    hidden_states: Buffer | list[Buffer] | None = None

    def update(self, **values: Any) -> None:
        """Overwrite existing fields with the values that are not None."""
        names = {f.name for f in fields(self)}
        for name, value in values.items():
            if name in names and value is not None:
                setattr(self, name, value)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        raise NotImplementedError(f"{type(self).__name__} does not list its buffers")


@dataclass
class ModelOutputs:
    """logits float32 [rows, V]; row i of the batch is logits[offsets[i]:offsets[i+1]]."""

    logits: Buffer
    next_token_logits: Buffer | None = None
    logit_offsets: Buffer | None = None
    hidden_states: Buffer | None = None


@dataclass(frozen=True)
class VisionWork:
    """What encoding one image holds at once, in elements: for plans, not for running.

    patches x width are its hidden states, patches x heads the queries of all heads, patches x
    inner the MLP's; scores are the attention weights of one layer, all heads.
    """

    patches: int
    width: int
    heads: int
    inner: int
    scores: int


@dataclass(frozen=True)
class LogProbabilities:
    """Natural-log probabilities of the scored tokens, and of the best tokens at each place."""

    token_log_probabilities: list[float]
    top_log_probabilities: list[dict[int, float]]


class ArchConfigWithKVCache(ABC):
    """A config class with the documented initialize / finalize split."""

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


class Model:
    """A loaded, callable network. Call it as the module it holds."""

    def __init__(self, module: Callable[..., Any], weights: Mapping[str, Buffer]) -> None:
        self.module = module
        self.weights = weights

    def __call__(self, *buffers: Any) -> Any:
        return self.module(*buffers)

    def execute(self, *buffers: Any) -> list[Any]:
        """As calling it, with the results always in a list."""
        result = self.module(*buffers)
        return list(result) if isinstance(result, (list, tuple)) else [result]


@dataclass
class InferenceSession:
    """The devices and the compile switch that models are loaded with."""

    devices: Sequence[Device] = ()
    compile: bool = True

    def load(
        self, module: nn.Module, weights_registry: Mapping[str, Buffer] | None = None
    ) -> Model:
        """Install weights (all of them, strictly), evaluate them, and wrap the module."""
        if weights_registry is not None:
            module.load_weights(list(weights_registry.items()), strict=True)
        parameters = module.parameters()
        mx.eval(parameters)
        module.eval()
        return Model(module, dict(_flatten(parameters)))


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, Buffer]]:
    if isinstance(tree, Mapping):
        items = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(str(i), v) for i, v in enumerate(tree)]
    else:
        return [(prefix, tree)]
    return [pair for k, v in items for pair in _flatten(v, f"{prefix}.{k}" if prefix else k)]


class PipelineModel(ABC, Generic[ContextT]):
    """One architecture, loaded. The engine calls prepare, execute, prepare_next, execute, ..."""

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        kv_cache_config: KVCacheConfig,
        weights: Weights,
        adapter: WeightsAdapter | None = None,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> None:
        if len(devices) > 1:
            raise NotImplementedError(f"{len(devices)} devices; one unified-memory device is run")
        pipeline_config.model.resolve(weights)
        self.pipeline_config = pipeline_config
        self.session = session
        self.devices = devices
        self.device_refs = [DeviceRef.from_device(device) for device in devices]
        self.kv_cache_config = kv_cache_config
        self.weights = weights
        self.adapter = adapter
        self.return_logits = return_logits
        self.return_hidden_states = return_hidden_states
        self.max_seq_len = self.calculate_max_seq_len(pipeline_config, self.huggingface_config)

    @property
    def huggingface_config(self) -> Any:
        """Raises: ConfigError naming the model path when there is none."""
        return self.pipeline_config.model.require_huggingface_config()

    @property
    def dtype(self) -> DType:
        return self.pipeline_config.model.dtype

    @property
    def signal_buffers(self) -> list[Buffer]:
        """One device has nothing to synchronise."""
        return []

    @classmethod
    def estimate_weights_size(cls, pipeline_config: PipelineConfig) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in pipeline_config.model.weight_path)

    @classmethod
    def estimate_activation_memory(
        cls, pipeline_config: PipelineConfig, huggingface_config: Any
    ) -> int:
        """Bytes that a step needs beyond weights and cache; 0 where nothing is documented."""
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
    ) -> ModelInputs:
        """Ragged inputs for the active tokens of every context."""

    @abstractmethod
    def execute(self, model_inputs: ModelInputs) -> ModelOutputs:
        """One step. Lazy: nothing is evaluated before the caller reads a result."""

    @abstractmethod
    def prepare_next_token_inputs(
        self, next_tokens: Buffer, prev_model_inputs: ModelInputs
    ) -> ModelInputs:
        """Inputs of the decode step after `prev`; next_tokens [B], not synchronised."""

    def encode_images(self, images: Sequence[ImageMetadata]) -> list[Buffer]:
        """Vision rows [M_i, E] of each image, independent of its neighbours. Lazy.

        The engine caches them and hands them back as `image_embeddings` of the step's inputs.
        """
        raise NotImplementedError(f"{type(self).__name__} has no vision model")

    def vision_work(self, image: ImageMetadata) -> VisionWork:
        """What `encode_images` needs for one image."""
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
    """A decoder whose `config` says its widths (nn.decoder.DecoderConfig)."""

    @property
    def config(self) -> Any: ...


class TextSide(Protocol):
    """What the engine may ask of a model's text side beyond running it."""

    @property
    def break_length(self) -> int | None: ...

    @property
    def decoder(self) -> DecoderSizes: ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    @property
    def traces(self) -> int: ...


class PipelineModelWithKVCache(PipelineModel[ContextT]):
    """A model whose attention reads a KV cache; `kv_params` says of what shape."""

    kv_params: KVCacheParams
    language: TextSide

    @property
    def cache_break_length(self) -> int | None:
        """Rows that grow past this length must be prefilled again (LongRoPE), or None."""
        return self.language.break_length

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded LoRA adapters; their slots count from 1."""
        return self.language.adapters

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        kv_cache_config: KVCacheConfig,
        weights: Weights,
        adapter: WeightsAdapter | None = None,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> None:
        super().__init__(
            pipeline_config,
            session,
            devices,
            kv_cache_config,
            weights,
            adapter,
            return_logits,
            return_hidden_states,
        )
        self.kv_params = self.get_kv_params(
            self.huggingface_config,
            pipeline_config,
            self.device_refs,
            kv_cache_config,
            pipeline_config.model.cache_dtype,
        )
        self.install(session)

    def install(self, session: InferenceSession) -> None:
        """Load the networks: the constructor's last act. A model without its own loads nothing."""

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
    """Keeps the documented one (empty) signal buffer per device, even for a single device."""

    devices: list[Device]

    @property
    def signal_buffers(self) -> list[Buffer]:
        if "_signal_buffers" not in self.__dict__:
            self._signal_buffers = [mx.zeros((0,), mx.uint8) for _ in self.devices]
        return self._signal_buffers


class HasRaggedRows(Protocol):
    """Inputs that say where each row of the flat batch begins."""

    tokens: Buffer
    input_row_offsets: Buffer | list[Buffer]


class LogProbabilitiesMixin:
    """Log-probabilities of sampled (and, with echo, prompt) tokens (spec, section 1.9)."""

    def compute_log_probabilities(
        self,
        session: InferenceSession,
        model_inputs: ModelInputs,
        model_outputs: ModelOutputs,
        next_tokens: Buffer,
        batch_top_n: list[int],
        batch_echo: list[bool],
    ) -> list[LogProbabilities | None]:
        """One entry per row, None where top_n is 0.

        Raises: InputError for echo without logits of all active tokens (set enable_echo).
        """
        del session
        inputs: HasRaggedRows = model_inputs  # pyright: ignore[reportAssignmentType]  # by duck
        rows = _row_bounds(inputs)
        sampled: list[int] = np.array(next_tokens).reshape(-1).tolist()
        active: list[int] = np.array(inputs.tokens).tolist()
        results: list[LogProbabilities | None] = []
        for i, (top_n, echo) in enumerate(zip(batch_top_n, batch_echo, strict=True)):
            if not top_n:
                results.append(None)
                continue
            if echo:
                logits = _echo_logits(model_outputs, i, rows)
                scored = [*active[rows[i] + 1 : rows[i + 1]], sampled[i]]
            else:
                assert model_outputs.next_token_logits is not None
                logits, scored = model_outputs.next_token_logits[i : i + 1], [sampled[i]]
            results.append(log_probabilities(logits, scored, top_n))
        return results


def log_probabilities(logits: Buffer, tokens: list[int], top_n: int) -> LogProbabilities:
    """Score `tokens` under logits [len(tokens), V]; each place lists its top_n and its token."""
    scores = logits.astype(mx.float32)
    scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    best = mx.argpartition(-scores, min(top_n, scores.shape[-1]) - 1, axis=-1)[:, :top_n]
    index = mx.concatenate([best, mx.array(tokens)[:, None].astype(best.dtype)], axis=-1)
    values = np.array(mx.take_along_axis(scores, index, axis=-1))
    own: list[float] = []
    tops: list[dict[int, float]] = []
    for ids, row in zip(np.array(index).tolist(), values.tolist(), strict=True):
        own.append(row[-1])
        ranked = sorted(zip(ids, row, strict=True), key=lambda pair: -pair[1])
        tops.append(dict(ranked))
    return LogProbabilities(own, tops)


def _row_bounds(inputs: HasRaggedRows) -> list[int]:
    offsets = inputs.input_row_offsets
    return np.array(offsets[0] if isinstance(offsets, list) else offsets).tolist()


def _echo_logits(outputs: ModelOutputs, row: int, rows: list[int]) -> Buffer:
    wanted = rows[row + 1] - rows[row]
    if outputs.logit_offsets is None:
        have = 1
        begin = row
    else:
        bounds: list[int] = np.array(outputs.logit_offsets).tolist()
        begin, have = bounds[row], bounds[row + 1] - bounds[row]
    if have != wanted:
        raise InputError(
            f"echo needs logits of all {wanted} tokens of row {row}, there are {have}; "
            "load the model with enable_echo"
        )
    return outputs.logits[begin : begin + have]


def require_inputs(inputs: ModelInputs, kind: type[Any]) -> None:
    """Raises: TypeError for another inputs class, ConfigError without a KV cache."""
    if not isinstance(inputs, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(inputs).__name__}")
    if inputs.kv_cache_inputs is None:
        raise ConfigError(f"{kind.__name__} without kv_cache_inputs; pass the cache of this batch")
