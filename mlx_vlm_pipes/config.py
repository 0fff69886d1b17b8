"""What a pipeline is built from: PipelineConfig, ModelConfig and the KV-cache parameters.

Plain dataclasses; construction does no I/O (docs/api.md#configuration).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_vlm_pipes.dtypes import DeviceRef, DeviceSpec, DType, scan_available_devices
from mlx_vlm_pipes.encoding import (
    COMPUTE_TYPES,
    ENCODINGS,
    GGUF_ENCODINGS,
    fitting_encoding,
    split_encoding,
    stored_encoding,
)
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig, read_config
from mlx_vlm_pipes.quantization import LoRAConfig, QuantizationConfig, QuantizationEncoding
from mlx_vlm_pipes.weights import (
    Weights,
    find_weight_files,
    load_state_dict,
    load_weights,
    parse_quantization,
)


@dataclass
class KVCacheConfig:
    """How keys and values are kept.

    kv_cache_page_size: tokens of a page in the view of the cache (docs/api.md#kv-cache); the
    storage has none. enable_prefix_caching: prompts reuse what earlier ones left in the cache.
    device_memory_utilization: share of the memory that the pipeline may take, weights included
    (engine.state.EngineConfig.from_pipeline). kv_cache_format: element type of the cache, None for
    what the encoding implies. bits: 8 or 4 quantises in groups of group_size numbers, None keeps
    the element type. Raises: ConfigError for a value out of range.
    """

    kv_cache_page_size: int = 128
    enable_prefix_caching: bool = True
    device_memory_utilization: float = 0.9
    kv_cache_format: str | None = None
    bits: int | None = None
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (None, 4, 8):
            raise ConfigError(f"KV cache of {self.bits} bits; 4, 8 or None are possible")
        _at_least_one("kv_cache_page_size", self.kv_cache_page_size)
        share = self.device_memory_utilization
        if not 0 < share <= 1:
            raise ConfigError(f"device_memory_utilization is {share}, expected 0 < share <= 1")

    @property
    def cache_dtype(self) -> DType:
        """The element type asked for, else float32. Raises: ConfigError for other formats."""
        if self.kv_cache_format is None:
            return DType.float32
        if self.kv_cache_format not in COMPUTE_TYPES:
            raise ConfigError(
                f"kv_cache_format {self.kv_cache_format!r}; use one of {', '.join(COMPUTE_TYPES)}"
            )
        return DType[self.kv_cache_format]

    def to_params(
        self,
        dtype: DType,
        n_kv_heads: int,
        head_dim: int,
        num_layers: int,
        devices: list[DeviceRef],
        data_parallel_degree: int = 1,
    ) -> KVCacheParams:
        """The parameters of a cache on these devices. Heads that do not divide among them count as
        the largest share; what this process has, the loaded model says (own_kv_heads)."""
        size = max(1, len(devices) // data_parallel_degree)
        is_uneven = n_kv_heads > size and n_kv_heads % size > 0
        return KVCacheParams(
            dtype=dtype,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            num_layers=num_layers,
            devices=devices,
            enable_prefix_caching=self.enable_prefix_caching,
            page_size=self.kv_cache_page_size,
            data_parallel_degree=data_parallel_degree,
            bits=self.bits,
            group_size=self.group_size,
            own_kv_heads=-(-n_kv_heads // size) if is_uneven else None,
        )


@dataclass
class KVCacheParams:
    """Shape and type of the cache. page_size in tokens; bits and group_size if it is quantised.

    dtype is that of keys and values as they are made and read, and of the view of them. With
    bits it is not what is stored: packed integers are, with a scale and a bias of this dtype for
    each group. bytes_per_block is a block in dtype, bytes_per_token what is really stored, both on
    one device. own_kv_heads: what the device of this process has of a model on several ranks, whose
    shares may be uneven.

    Raises: ConfigError if the heads do not divide among the devices, or if
    data_parallel_degree is neither 1 nor the number of devices.
    """

    dtype: DType
    n_kv_heads: int
    head_dim: int
    num_layers: int
    devices: list[DeviceRef]
    enable_prefix_caching: bool = False
    page_size: int = 128
    data_parallel_degree: int = 1
    bits: int | None = None
    group_size: int = 64
    own_kv_heads: int | None = None
    n_kv_heads_per_device: int = field(init=False)

    def __post_init__(self) -> None:
        if self.data_parallel_degree not in (1, self.n_devices):
            raise ConfigError(
                f"data_parallel_degree {self.data_parallel_degree} with {self.n_devices} devices; "
                "use 1 or the number of devices"
            )
        if self.own_kv_heads is not None:
            self.n_kv_heads_per_device = self.own_kv_heads
            return
        if self.n_kv_heads % self.tensor_parallel_degree:
            raise ConfigError(
                f"{self.n_kv_heads} KV heads do not divide among {self.n_devices} devices; use"
                f" {math.gcd(self.n_kv_heads, self.n_devices)}"
            )
        self.n_kv_heads_per_device = self.n_kv_heads // self.tensor_parallel_degree

    @property
    def n_devices(self) -> int:
        return len(self.devices)

    @property
    def tensor_parallel_degree(self) -> int:
        return max(1, self.n_devices // self.data_parallel_degree)

    @property
    def dtype_shorthand(self) -> str:
        return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(
            self.dtype.name, self.dtype.name
        )

    @property
    def shape_per_block(self) -> list[int]:
        """[2, layers, page_size, KV heads, head_dim]; 0 is key, 1 is value."""
        return [2, self.num_layers, self.page_size, self.n_kv_heads_per_device, self.head_dim]

    @property
    def bytes_per_block(self) -> int:
        return math.prod(self.shape_per_block) * self.dtype.size_in_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers, quantised or not."""
        elements = 2 * self.num_layers * self.n_kv_heads_per_device * self.head_dim
        if self.bits is None:
            return elements * self.dtype.size_in_bytes
        group = kv_group_size(self.head_dim, self.group_size)
        return elements * self.bits // 8 + 2 * (elements // group) * self.dtype.size_in_bytes


def kv_group_size(head_dim: int, wanted: int) -> int:
    """The largest group size MLX knows that divides head_dim, at most `wanted`.

    Raises: ConfigError for a head_dim that no group divides.
    """
    for group in (128, 64, 32):
        if group <= wanted and head_dim % group == 0:
            return group
    raise ConfigError(
        f"a quantised KV cache needs a head_dim that 32 divides, this model has {head_dim}"
    )


class _ReadAtFirstUse:
    """A dataclass field that is config.json of `model_path`, unless something else was set."""

    def __get__(self, owner: ModelConfig | None, _: type) -> Any:
        if owner is None:  # dataclass asks for the default
            return None
        fields = vars(owner)
        if fields["_huggingface_config"] is None and owner.model_path:
            with suppress(ConfigError):
                fields["_huggingface_config"] = read_config(Path(owner.model_path))
        return fields["_huggingface_config"]

    def __set__(self, owner: ModelConfig, value: Any) -> None:
        vars(owner)["_huggingface_config"] = value


@dataclass
class ModelConfig:
    """One checkpoint and how to read it.

    device_specs: the one device that the model is built and run on. max_length in tokens, None for
    the model's own limit. rope_type: the rotary pairs of a GGUF file are turned back as it is
    read, so any but None is refused. use_subgraphs=False: the decode step is not compiled.
    """

    model_path: str = ""
    weight_path: list[Path] = field(default_factory=list)
    quantization_encoding: str | None = None
    device_specs: list[DeviceSpec] = field(default_factory=scan_available_devices)
    max_length: int | None = None
    kv_cache: KVCacheConfig = field(default_factory=KVCacheConfig)
    rope_type: str | None = None
    use_subgraphs: bool = True
    data_parallel_degree: int = 1
    enable_echo: bool = False
    vision_config_overrides: dict[str, Any] = field(default_factory=dict)
    huggingface_config: Any = _ReadAtFirstUse()  # None while config.json cannot be read
    _quant: QuantizationConfig | None = None
    _scales_dtype: DType | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 0:
            raise ConfigError(f"max_length is {self.max_length}, expected a number of tokens")
        if self.data_parallel_degree < 1:
            raise ConfigError(
                f"data_parallel_degree is {self.data_parallel_degree}, expected 1 or more replicas"
            )

    def resolve(self, weights: Weights | Mapping[str, Any] | None = None) -> ModelConfig:
        """Settle the encoding and the packing by config.json and the weights' headers.

        Model constructors do so with their weights; by hand it is needed for `initialize` alone.
        weights: those to look at, by default weight_path, filled in from model_path. A float
        encoding other than the stored one casts on load. Returns self; a second call changes
        nothing. Raises: ConfigError for an encoding that nobody knows or the weights contradict,
        CheckpointError for files that cannot be read.
        """
        if self.quantization_encoding is not None:
            split_encoding(self.quantization_encoding)  # refuse nonsense before files are opened
        if weights is None:
            self.weight_path = self.weight_path or find_weight_files(self.model_path)
            weights = load_weights(self.weight_path)
        declared = parse_quantization(self.require_huggingface_config().to_dict())
        found = stored_encoding(load_state_dict(weights), declared)
        self.quantization_encoding = fitting_encoding(self.quantization_encoding, found)
        self._quant, self._scales_dtype = found.packing, found.scales_dtype
        return self

    def require_huggingface_config(self) -> HuggingFaceConfig:
        """Raises: ConfigError naming the path when config.json cannot be read."""
        if self.huggingface_config is None:
            raise ConfigError(f"no Hugging Face configuration in {self.model_path!r}")
        return self.huggingface_config

    @property
    def devices(self) -> list[DeviceRef]:
        return [spec.to_ref() for spec in self.device_specs]

    @property
    def dtype(self) -> DType:
        """The dtype that the encoding means; for packed MLX weights that of their scales.

        Raises: ConfigError for an encoding that is not resolved, or that nobody knows.
        """
        kind, compute = self._encoding()
        if compute is not None:
            return compute
        if kind != "mlx":
            return ENCODINGS[kind][0]
        if self._scales_dtype is None:
            raise ConfigError("the dtype of 'mlx' is that of the scales; call resolve() first")
        return self._scales_dtype

    @property
    def cache_dtype(self) -> DType:
        """kv_cache_format if given, else what the encoding implies.

        Raises: ConfigError for an encoding or a format that nobody knows.
        """
        if self.kv_cache.kv_cache_format is not None or self.quantization_encoding is None:
            return self.kv_cache.cache_dtype
        kind, compute = self._encoding()
        if compute is not None or kind == "mlx":
            return self.dtype
        return ENCODINGS[kind][1]

    @property
    def graph_quantization_encoding(self) -> QuantizationEncoding | None:
        """The packed encoding, None for plain floats. Raises: ConfigError as dtype."""
        name = self._encoding()[0].upper()
        return QuantizationEncoding[name] if name in QuantizationEncoding.__members__ else None

    @property
    def compute_dtype(self) -> DType | None:
        """The float type that weights are cast or expanded to, None to keep the stored ones.

        Raises: ConfigError for an encoding that nobody knows.
        """
        if self.quantization_encoding is None:
            return None
        kind, compute = self._encoding()
        if kind in COMPUTE_TYPES:
            return DType[kind]
        if kind in GGUF_ENCODINGS:
            return ENCODINGS[kind][1]
        return DType.bfloat16 if kind.startswith(("float8", "float4")) else compute

    def _encoding(self) -> tuple[str, DType | None]:
        if self.quantization_encoding is None:
            raise ConfigError(
                "quantization_encoding is not set; call resolve() to read the weights"
            )
        return split_encoding(self.quantization_encoding)


MAXModelConfig = ModelConfig


@dataclass
class RuntimeConfig:
    """Limits of one engine (engine.state.EngineConfig.from_pipeline).

    max_batch_size: requests that run together, None for the engine's own limit.
    max_batch_input_tokens: the most tokens of one slice of prefill. enable_chunked_prefill=False:
    a prompt is one slice, and one longer than max_batch_input_tokens is refused. max_num_steps:
    the engine decodes one step ahead, so any but -1 is refused.
    Raises: ConfigError for a limit that would let nothing run.
    """

    max_batch_size: int | None = None
    max_batch_input_tokens: int = 8192
    enable_chunked_prefill: bool = True
    max_num_steps: int = -1

    def __post_init__(self) -> None:
        if self.max_batch_size is not None:
            _at_least_one("max_batch_size", self.max_batch_size)
        _at_least_one("max_batch_input_tokens", self.max_batch_input_tokens)


@dataclass
class PipelineConfig:
    """Everything a pipeline model is built from.

    draft_model and speculative: any but None is refused; `load(draft=)` takes a draft model.
    """

    model: ModelConfig
    draft_model: ModelConfig | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    lora: LoRAConfig | None = None
    speculative: Any = None

    def require_supported(self) -> None:
        """Raises: ConfigError naming a setting that has another value than the one possible."""
        only: dict[str, tuple[object, object]] = {
            "runtime.max_num_steps": (self.runtime.max_num_steps, -1),
            "draft_model": (self.draft_model, None),
            "speculative": (self.speculative, None),
            "model.rope_type": (self.model.rope_type, None),
        }
        for name, (value, default) in only.items():
            if value != default:
                raise ConfigError(f"{name} is not supported; leave it at its default, {default}")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}, expected at least 1")


def weights_format(weight_path: list[Path]) -> Literal["gguf", "safetensors"]:
    """The one kind of weight file in the list. Raises: ConfigError if empty, mixed or unknown."""
    suffixes = {Path(path).suffix for path in weight_path}
    if suffixes == {".safetensors"}:
        return "safetensors"
    if suffixes == {".gguf"}:
        return "gguf"
    raise ConfigError(
        f"weight files of kind {sorted(suffixes) or 'none'}; expected only .safetensors, or .gguf"
    )


def upper_bounded_default(upper_bound: int, default: int | None) -> int:
    """`default` if given, else the bound. Raises: ConfigError if default exceeds the bound."""
    if default is None:
        return upper_bound
    if default > upper_bound:
        raise ConfigError(f"{default} exceeds the limit {upper_bound}")
    return default
