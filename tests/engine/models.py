"""Random models of a chosen size, without a tokenizer, and requests made of token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import SamplingParams, TextContext, TokenBuffer
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.registry import find_room

VOCAB = 128


def write_llama(
    folder: Path,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    hidden: int = 64,
) -> Path:
    """A random Llama."""
    inner = hidden * 3 // 2
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": VOCAB,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    numbers = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCAB, hidden)}
    norms = ["model.norm"]
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj": (heads * head_dim, hidden),
            f"{at}.self_attn.k_proj": (kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj": (kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj": (hidden, heads * head_dim),
            f"{at}.mlp.gate_proj": (inner, hidden),
            f"{at}.mlp.up_proj": (inner, hidden),
            f"{at}.mlp.down_proj": (hidden, inner),
        }
        norms += [f"{at}.input_layernorm", f"{at}.post_attention_layernorm"]
    tensors = {
        f"{name}.weight": mx.array(numbers.normal(0, shape[1] ** -0.5, shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    tensors |= {f"{name}.weight": mx.ones((hidden,)) for name in norms}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def open_model(folder: Path, **options: Any) -> PipelineModelWithKVCache:
    """The model of a folder, on this thread, float32."""
    config = read_config(folder)
    return load_model(find_room(config), folder, config, LoadOptions(dtype="float32", **options))


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


class Silent:
    """A stream decoder that makes no text."""

    def add(self, token: int) -> str:
        del token
        return ""

    def flush(self) -> str:
        return ""


def new_scheduler(model: PipelineModelWithKVCache, **limits: Any) -> Scheduler:
    return Scheduler(model, EngineConfig(**{"enable_prefix_caching": False, **limits}))


def submit(scheduler: Scheduler, ids: list[int], count: int, *, logprobs: int = 0) -> Handle:
    """A greedy request for exactly `count` tokens."""
    params = SamplingParams(temperature=0, max_new_tokens=count)
    context = TextContext(
        max_length=16384,
        tokens=TokenBuffer(np.array(ids)),
        sampling_params=params,
        log_probabilities=logprobs,
    )
    return scheduler.submit(context, Silent())


def finish(scheduler: Scheduler) -> None:
    while scheduler.step():
        pass


def tokens_of(handle: Handle) -> list[int]:
    return [chunk.token for chunk in handle if chunk.token is not None]
