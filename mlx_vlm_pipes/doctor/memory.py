"""How much memory a model takes, from shapes alone, by the arithmetic of `Pipeline.plan`."""

from __future__ import annotations

from mlx_vlm_pipes.checkpoint.blueprint import Checkpoint, blueprint
from mlx_vlm_pipes.doctor.report import GB, Checkup
from mlx_vlm_pipes.doctor.tensors import Tensors
from mlx_vlm_pipes.engine.memory import fuses_attention, machine_memory
from mlx_vlm_pipes.engine.plan import cache_bytes, peak_bytes, prefill_bytes
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.registry import Room

TOKENS = 4096


def estimate_memory(room: Room, tensors: Tensors, checkup: Checkup) -> None:
    """Bytes to load (floats in the dtype that this machine would use) and to run TOKENS tokens.

    Warns if this machine has less. Raises: ConfigError for sizes that make no sense.
    """
    model = tensors.pipeline.model
    config = model.require_huggingface_config()
    room_class = room.model_class()
    load = sum(weight.nbytes for weight in tensors.state.values())
    params = room_class.get_kv_params(
        config, tensors.pipeline, model.devices, model.kv_cache, model.cache_dtype
    )
    limits = EngineConfig.from_pipeline(tensors.pipeline, machine_memory(), load)
    _, decoder = blueprint(room_class, Checkpoint(tensors.pipeline, tensors.state))
    device, dtype = model.devices[0].to_device(), params.dtype.to_mx()
    fused = fuses_attention(device, decoder.head_dim, dtype)
    step = prefill_bytes(decoder, params.dtype.size_in_bytes, TOKENS, limits, fused=fused)
    checkup.load_bytes = load
    checkup.run_bytes = needed = peak_bytes(load, cache_bytes(params, TOKENS), step, limits)
    checkup.max_tokens = room_class.calculate_max_seq_len(tensors.pipeline, config)
    if needed > machine_memory():
        checkup.warn(
            "memory",
            f"needs {needed / GB:.1f} GB to run, this machine has"
            f" {machine_memory() / GB:.1f} GB; use a quantised version",
        )
