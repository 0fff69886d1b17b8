"""Which encoding a checkpoint's weights have, and whether the one asked for fits them.

Order: a packed format that config.json declares and the tensors show; else the floating type that
most elements have. A float label casts on load (packed weights stay packed and compute in it).
Names, dtypes and shapes only: no tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.weights import ScaledFormat, WeightData

# encoding: (dtype that the config reports, dtype of the cache)
ENCODINGS: dict[str, tuple[DType, DType]] = {
    "float32": (DType.float32, DType.float32),
    "bfloat16": (DType.bfloat16, DType.bfloat16),
    "float16": (DType.float16, DType.float16),
    "q4_0": (DType.uint8, DType.float32),
    "q4_k": (DType.uint8, DType.float32),
    "q6_k": (DType.uint8, DType.float32),
    "gptq": (DType.uint8, DType.bfloat16),
    "float8_e4m3fn": (DType.float8_e4m3fn, DType.bfloat16),
    "float4_e2m1fnx2": (DType.uint8, DType.bfloat16),
}
COMPUTE_TYPES = ("float32", "float16", "bfloat16")
GGUF_ENCODINGS = ("q4_0", "q4_k", "q6_k")  # say what is stored; computed in their cache's dtype
_WITH_COMPUTE = ("mlx", "gptq")  # a type to compute in may follow: "mlx:float32"

_PACKED = {
    "mlx": (".scales",),
    "gptq": (".qweight",),
    "awq": (".qweight",),
    "compressed-tensors": (".weight_packed",),
    "float4_e2m1fnx2": (".weight_packed", ".weight_scale_2"),
}
_FLOATS = tuple(DType[name] for name in COMPUTE_TYPES)


@dataclass(frozen=True)
class Stored:
    """What the files hold. kind: a key of _PACKED, or "float"; own: the encoding without a label.

    has_float8: float8 weights, not just the float8 scales of another format. blocks: encodings of
    a GGUF file's tensors.
    scales_dtype: what packed MLX weights compute in; packing: the declared record, where it is so.
    """

    kind: str
    own: str
    has_float8: bool
    scales_dtype: DType
    packing: QuantizationConfig | None
    blocks: frozenset[str] = frozenset()


def split_encoding(encoding: str) -> tuple[str, DType | None]:
    """An encoding's name, and the type that packed weights are to compute in, if one is said.

    Raises: ConfigError for a name that is none.
    """
    kind, colon, compute = encoding.partition(":")
    suffix_fits = kind in _WITH_COMPUTE and compute in COMPUTE_TYPES if colon else True
    if (kind not in ENCODINGS and kind not in _WITH_COMPUTE) or not suffix_fits:
        known = ", ".join(dict.fromkeys((*ENCODINGS, *_WITH_COMPUTE)))
        raise ConfigError(f"quantization_encoding {encoding!r}; use None or one of {known}")
    return kind, DType[compute] if compute else None


def stored_encoding(
    tensors: Mapping[str, WeightData], declared: QuantizationConfig | ScaledFormat | None
) -> Stored:
    """What a checkpoint's tensors are, by name and dtype, given what config.json declares."""
    kind = "float"
    if isinstance(declared, QuantizationConfig):
        kind = declared.quant_method
    elif declared is not None and declared.format in ("nvfp4", "mxfp4"):
        kind = "float4_e2m1fnx2"
    if kind != "float" and not any(name.endswith(_PACKED[kind]) for name in tensors):
        kind = "float"  # declared, but nothing is packed
    narrow = DType.float8_e4m3fn
    plain = dominant_type(tensors.values(), _FLOATS)
    own = plain.name
    if kind in ("mlx", "gptq", "float4_e2m1fnx2"):
        own = kind
    elif kind == "float":
        own = dominant_type(tensors.values(), (*_FLOATS, narrow)).name
    scales = [weight for name, weight in tensors.items() if name.endswith(".scales")]
    return Stored(
        kind=kind,
        own=own,
        has_float8=kind == "float" and any(w.dtype is narrow for w in tensors.values()),
        scales_dtype=dominant_type(scales, _FLOATS, default=plain),
        packing=declared if isinstance(declared, QuantizationConfig) and kind != "float" else None,
        blocks=frozenset(_block_names(tensors.values())),
    )


def _block_names(tensors: Iterable[WeightData]) -> Iterator[str]:
    for weight in tensors:
        encoding = weight.quantization_encoding
        if encoding is not None and encoding.is_gguf:
            yield encoding.name.lower()


def dominant_type(
    tensors: Iterable[WeightData], types: Iterable[DType], default: DType = DType.float32
) -> DType:
    """The one of `types` that most elements have; `default` where none has any."""
    counts = dict.fromkeys(types, 0)
    for weight in tensors:
        if weight.dtype in counts:
            counts[weight.dtype] += math.prod(weight.shape)
    return max(counts, key=lambda kind: counts[kind]) if any(counts.values()) else default


def fitting_encoding(label: str | None, found: Stored) -> str:
    """The encoding that a label means for these weights. Raises: ConfigError if it fits none."""
    if label is None:
        return found.own
    kind, _ = split_encoding(label)
    if kind in COMPUTE_TYPES:
        return f"{found.kind}:{label}" if found.kind in ("mlx", "gptq") else label
    fits = found.has_float8 if kind == "float8_e4m3fn" else kind in {found.kind, *found.blocks}
    if not fits:
        stored = found.own if found.kind == "float" else found.kind
        raise ConfigError(
            f"quantization_encoding {label!r}, but the weights are {stored}; leave it None, or"
            f" name a type to compute in ({', '.join(COMPUTE_TYPES)})"
        )
    return label
