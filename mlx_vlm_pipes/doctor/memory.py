"""How much memory a model takes, from shapes alone."""

from __future__ import annotations

import math

from mlx_vlm_pipes.architectures.registry import Room
from mlx_vlm_pipes.doctor.report import GB, Checkup
from mlx_vlm_pipes.doctor.tensors import Tensors
from mlx_vlm_pipes.engine.engine import machine_memory
from mlx_vlm_pipes.hf_config import optional_int, text_config

TOKENS = 4096
CHUNK = 2048  # tokens of one prefill step, at most
WIDE = 8  # hidden states that a layer holds at once


def estimate_memory(room: Room, tensors: Tensors, checkup: Checkup) -> None:
    """Bytes to load (floats in the dtype that this machine would use) and to run TOKENS tokens.

    Warns if this machine has less. Raises: ConfigError for sizes that make no sense.
    """
    model = tensors.pipeline.model
    config = model.require_huggingface_config()
    room_class = room.model_class()
    size = model.dtype.size_in_bytes
    load = sum(
        math.prod(w.shape) * (size if w.dtype.is_float() else w.dtype.size_in_bytes)
        for w in tensors.state.values()
    )
    params = room_class.get_kv_params(
        config, tensors.pipeline, model.devices, model.kv_cache, model.cache_dtype
    )
    text = text_config(config)
    hidden = optional_int(text, "hidden_size", default=4096)
    inner = optional_int(text, "intermediate_size", default=4 * hidden)
    vocab = optional_int(text, "vocab_size", default=32000)
    step = CHUNK * (WIDE * hidden + 3 * inner) * size + 2 * vocab * 4
    checkup.load_bytes = load
    checkup.run_bytes = needed = load + params.bytes_per_token * TOKENS + step
    checkup.max_tokens = room_class.calculate_max_seq_len(tensors.pipeline, config)
    if needed > machine_memory():
        checkup.warn(
            "memory",
            f"needs {needed / GB:.1f} GB to run, this machine has"
            f" {machine_memory() / GB:.1f} GB; use a quantised version",
        )
