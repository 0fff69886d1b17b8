"""config.json and generation_config.json of a GGUF file of the Llama family.

Sources: transformers 5.23 integrations/ggml.py and modeling_gguf_pytorch_utils.py; what they leave
out (rope_freqs, linear scaling) from llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any

from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel, clip
from mlx_vlm_pipes.gguf.header import GGUFHeader, TensorEntry

ARCHITECTURE = "llama"
GROUP_SIZE = 32
# type of tensors: bits of the MLX packing that holds it without loss, in groups of GROUP_SIZE
PACKED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q8_0": 8}
_HEAD, _EMBEDDING, _ROPE_FACTORS = "output", "token_embd", "rope_freqs.weight"
# `llama.<key>`: the one value that transformers' Llama computes with
_ONLY = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "attention.sliding_window": 0,
    "logit_scale": 0.0, "embedding_scale": 0.0, "residual_scale": 0.0,
    "use_parallel_residual": False,
}  # fmt: skip
# What Llama 3.1 and 3.2 say of their rope; a GGUF file holds the factors that follow from it.
_LLAMA3 = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_CLOSE = 1e-4  # the factors are rounded to float32, by torch and by us


def config_values(header: GGUFHeader) -> dict[str, Any]:
    """What transformers' config.json of the same model says, with MLX's `quantization`.

    Raises: UnsupportedModel naming what is not read; ConfigError for keys that are missing or
    contradict each other.
    """
    _require_supported(header)
    heads = _count(header, "attention.head_count")
    head_dim = _head_dim(header, heads)
    theta = _positive(header, "rope.freq_base", 10000.0)
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _count(header, "embedding_length"),
        "intermediate_size": _count(header, "feed_forward_length"),
        "num_hidden_layers": _count(header, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(header, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _count(header, "context_length"),
        "rms_norm_eps": _positive(header, "attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "vocab_size": _count(
            header, "vocab_size", len(tokens) if isinstance(tokens, list) else None
        ),
        "hidden_act": "silu",
        "tie_word_embeddings": f"{_HEAD}.weight" not in header.tensors,
    }
    scaling = _rope_scaling(header, head_dim, theta)
    if scaling is not None:
        values["rope_scaling"] = scaling
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        number = _token_id(header, key)
        if number is not None:
            values[f"{name}_token_id"] = number
    packed = _quantization(header)
    return values | ({"quantization": packed} if packed else {})


def generation_values(header: GGUFHeader) -> dict[str, Any]:
    """Every token that ends an answer: of the text, of a turn, of a message.

    Raises: ConfigError for one that is no number.
    """
    listed = (_token_id(header, key) for key in ("eos", "eot", "eom"))
    ends = list(dict.fromkeys(number for number in listed if number is not None))
    return {"eos_token_id": ends} if ends else {}


def _require_supported(header: GGUFHeader) -> None:
    said = header.metadata.get("general.architecture")
    if said == "clip" or header.metadata.get("general.type") == "mmproj":
        raise UnsupportedModel(
            f"{header.path}: the vision part of a model in GGUF, which is not read; use the"
            " model's safetensors"
        )
    if said != ARCHITECTURE:
        raise UnsupportedModel(
            f"{header.path}: GGUF of architecture '{clip(said)}'; only {ARCHITECTURE} is read,"
            " use the model's safetensors"
        )
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise UnsupportedModel(
            f"{header.path}: one of several files of a model; join them by llama-gguf-split --merge"
        )
    for key, only in _ONLY.items():
        value = header.metadata.get(f"{ARCHITECTURE}.{key}", only)
        if value != only:
            raise UnsupportedModel(
                f"{header.path}: {ARCHITECTURE}.{key} is {clip(value)}, which is not read"
            )


def _head_dim(header: GGUFHeader, heads: int) -> int:
    """Raises: UnsupportedModel where values have another size, or only a part is turned."""
    rotary = _count(header, "rope.dimension_count", _count(header, "embedding_length") // heads)
    sizes = {_count(header, f"attention.{part}_length", rotary) for part in ("key", "value")}
    if sizes != {rotary}:
        raise UnsupportedModel(
            f"{header.path}: keys and values of {sorted(sizes)}, of which {rotary} are turned;"
            " expected one size, all turned"
        )
    return rotary


def _rope_scaling(header: GGUFHeader, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = header.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UnsupportedModel(f"{header.path}: rope.scaling.type '{clip(kind)}' is not read")
    if _ROPE_FACTORS in header.tensors:
        if kind != "none":
            raise UnsupportedModel(f"{header.path}: rope_freqs with a {kind} rope are not read")
        return _llama3_scaling(header, head_dim, theta)
    factor = _positive(header, "rope.scaling.factor", 1.0)
    if kind == "none" or factor == 1.0:
        return None
    return {"rope_type": "linear", "factor": factor}


def _llama3_scaling(header: GGUFHeader, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Llama 3's scaling whose factors the file holds, one for each rotary pair.

    Raises: UnsupportedModel if no such scaling gives these factors.
    """
    entry = header.tensors[_ROPE_FACTORS]
    if entry.kind != "F32" or entry.shape != (head_dim // 2,):
        raise ConfigError(f"{header.path}: rope_freqs are {entry.kind} {list(entry.shape)}")
    stored = struct.unpack(f"<{head_dim // 2}f", header.read(entry))
    factor = max(stored)
    if stored == (1.0,) * len(stored):
        return None
    made = list(_llama3_factors(head_dim, theta, factor))
    if not all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(stored, made, strict=True)):
        raise UnsupportedModel(
            f"{header.path}: rope_freqs are not those of Llama 3.1 or 3.2; others are not read"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _llama3_factors(head_dim: int, theta: float, factor: float) -> Iterable[float]:
    """By what each rotary pair is slowed down. Source: convert_hf_to_gguf.py, LlamaModel."""
    original = _LLAMA3["original_max_position_embeddings"]
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < original / high:
            yield 1.0
        elif wavelength > original / low:
            yield factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            yield 1 / ((1 - smooth) / factor + smooth)


def _quantization(header: GGUFHeader) -> dict[str, Any] | None:
    """MLX's entry: the settings of most modules, and an entry for each of the others."""
    bits = {
        name.removesuffix(".weight"): PACKED_BITS[entry.kind]
        for name, entry in header.tensors.items()
        if is_packed(entry)
    }
    if not bits:
        return None
    widths = list(bits.values())
    common = max(set(widths), key=widths.count)
    others = {
        module: {"group_size": GROUP_SIZE, "bits": width}
        for module, width in bits.items()
        if width != common
    }
    return {"group_size": GROUP_SIZE, "bits": common, **others}


def is_packed(entry: TensorEntry) -> bool:
    """Whether a tensor is repacked for MLX; others are expanded to floats."""
    return entry.kind in PACKED_BITS and len(entry.shape) == 2 and entry.name.endswith(".weight")


def _count(header: GGUFHeader, key: str, default: int | None = None) -> int:
    """A positive whole number, or the default. Raises: ConfigError."""
    value = header.metadata.get(f"{ARCHITECTURE}.{key}", default)
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{header.path}: {ARCHITECTURE}.{key} is {clip(value)}; expected a whole number"
        )
    return value


def _positive(header: GGUFHeader, key: str, default: float | None = None) -> float:
    """A positive number, or the default. Raises: ConfigError."""
    value = header.metadata.get(f"{ARCHITECTURE}.{key}", default)
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise ConfigError(
            f"{header.path}: {ARCHITECTURE}.{key} is {clip(value)}; expected a positive number"
        )
    return value


def _token_id(header: GGUFHeader, name: str) -> int | None:
    """The number of a named token, where there is one. Raises: ConfigError."""
    number = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is not None and type(number) is not int:
        raise ConfigError(
            f"{header.path}: tokenizer.ggml.{name}_token_id is {clip(number)}; expected a whole"
            " number"
        )
    return number


def rotary_heads(header: GGUFHeader) -> dict[str, int]:
    """Heads of the projections whose rows lie in GGUF's order, by the last name of the module.

    Raises: as config_values.
    """
    _require_supported(header)
    heads = _count(header, "attention.head_count")
    return {"attn_q": heads, "attn_k": _count(header, "attention.head_count_kv", heads)}
