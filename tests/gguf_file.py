"""GGUF files made of stored checkpoints, by the `gguf` package's own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.fixtures_helper import FIXTURES

_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
ENDS = ("bos", "eos")


def write_case(
    path: Path, case: str, kind: str = "F32", rounded: str = "F32", **changes: Any
) -> Path:
    """A stored Llama as GGUF, as convert_hf_to_gguf.py of llama.cpp writes it.

    kind: of the matrices, after they have been through `rounded`; the rest is float32. changes: of
    the metadata, dots as `__`; None leaves an entry out.
    """
    import gguf

    number = gguf.GGMLQuantizationType[rounded]

    folder = FIXTURES / case
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for name, values in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        key = heads.get(name.split(".")[-2])
        turned = values if key is None else pairs_together(values, config[key])
        if values.ndim == 2:
            turned = gguf.dequantize(gguf.quantize(turned, number), number)
        tensors[gguf_name(name)] = (turned, kind if values.ndim == 2 else "F32")
    entries = {**model_entries(config), **tokenizer_entries(folder, config["vocab_size"])}
    entries |= {key.replace("__", "."): value for key, value in changes.items()}
    return write(path, entries, tensors)


def write(
    path: Path, entries: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]]
) -> Path:
    """A file of metadata and of tensors; uint8 arrays are blocks already."""
    import gguf

    writer = gguf.GGUFWriter(path, entries["general.architecture"])
    for key, value in entries.items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: "bool", int: "uint32", float: "float32", str: "string"}
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for name, (values, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        blocks = values if values.dtype == np.uint8 else gguf.quantize(values, number)
        writer.add_tensor(name, blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _text(token: Any) -> str:
    return token if isinstance(token, str) else token["content"]


def gguf_name(name: str) -> str:
    """llama.cpp's name for one of Hugging Face's."""
    module, _, part = name.rpartition(".")
    if module.startswith("model.layers."):
        number, _, rest = module.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{_NAMES[rest]}.{part}"
    return f"{_NAMES[module]}.{part}"


def pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    cut = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(cut.swapaxes(1, 2)).reshape(rows.shape)


def model_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads", "rope.dimension_count": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
        "vocab_size": "vocab_size",
    }  # fmt: skip
    entries = {f"llama.{key}": config[name] for key, name in sizes.items()}
    return {"general.architecture": "llama", "general.name": "tiny", **entries}


def tokenizer_entries(folder: Path, size: int) -> dict[str, Any]:
    made = json.loads((folder / "tokenizer.json").read_text())
    named = json.loads((folder / "tokenizer_config.json").read_text())
    control = {token["content"]: token["id"] for token in made["added_tokens"]}
    by_number = {number: token for token, number in {**made["model"]["vocab"], **control}.items()}
    tokens = [by_number.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [3 if t in control else 1 if n in by_number else 5 for n, t in enumerate(tokens)]
    prefix = "tokenizer.ggml."
    return {
        f"{prefix}model": "gpt2",
        f"{prefix}pre": "llama-bpe",
        f"{prefix}tokens": tokens,
        f"{prefix}token_type": kinds,
        f"{prefix}merges": [" ".join(merge) for merge in made["model"]["merges"]],
        **{f"{prefix}{key}_token_id": tokens.index(_text(named[f"{key}_token"])) for key in ENDS},
        "tokenizer.chat_template": named["chat_template"],
    }
