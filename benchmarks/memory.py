"""What memory follows: loading the parameters, a decode step the cache, the pool what is in use.

    python benchmarks/memory.py [--rounds 3]

Load: SmolLM2-135M's shape, plain and packed, as shares of the parameters' bytes. Steps: one layer
(so short that two steps overlap, on a CPU too) at growing contexts, handed over early and late.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from decode import SHAPES, write_model
from engine import submit

from mlx_vlm_pipes import EngineConfig
from mlx_vlm_pipes.engine.handover import ALWAYS, NEVER
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.registry import find_room

ONE_LAYER = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
WAYS = {"early": ALWAYS, "late": NEVER}  # overlap_bytes


def open_folder(folder: Path, dtype: str = "auto") -> PipelineModelWithKVCache:
    config = read_config(folder)
    return load_model(find_room(config), folder, config, LoadOptions(dtype=dtype))


def pack(folder: Path, packed: Path) -> None:
    """The matrices of a plain checkpoint in 4 bits, groups of 64."""
    tensors: dict[str, mx.array] = {}
    loaded: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # pyright: ignore[reportAssignmentType]  # of safetensors, a dict
    for name, array in loaded.items():
        tensors[name] = array.astype(mx.bfloat16)
        if array.ndim == 2:
            path = name.removesuffix("weight")
            parts = mx.quantize(tensors[name], group_size=64, bits=4)
            tensors |= zip([name, path + "scales", path + "biases"], parts, strict=True)
    mx.save_safetensors(str(packed / "model.safetensors"), tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (packed / "config.json").write_text(json.dumps(config))


def in_use() -> int:
    """Bytes, without what was measured before."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def measure_load(folder: Path, name: str, dtype: str) -> None:
    before = in_use()
    mx.reset_peak_memory()
    model = open_folder(folder, dtype)
    size = model.weight_bytes
    active, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    print(
        f"{name} as {dtype}: {size / 1e6:.1f} MB of parameters, active {active / size:.3f}, "
        f"peak while loading {peak / size:.3f}"
    )


def measure_steps(model: PipelineModelWithKVCache, rows: int, length: int, way: str) -> list[float]:
    """Milliseconds a step; memory in use and at its peak, as shares of the cache."""
    limits = EngineConfig(enable_prefix_caching=False, overlap_bytes=WAYS[way])
    scheduler = Scheduler(model, limits)
    before, times, active = in_use(), [], []
    for _ in range(rows):
        submit(scheduler, length, 40 + 12 * rows)
    while len(scheduler.running) < rows:
        scheduler.step()
    for _ in range(5):
        scheduler.step()
    mx.synchronize()
    mx.reset_peak_memory()
    for _ in range(20):
        begun = time.perf_counter()
        scheduler.step()
        times.append(time.perf_counter() - begun)
        active.append(mx.get_active_memory() - before)
    size = scheduler.state.cache.nbytes
    peak = mx.get_peak_memory() - before
    scheduler.fail_all(RuntimeError("measured"))
    mx.clear_cache()
    return [1e3 * statistics.median(times), statistics.median(active) / size, peak / size]


def measure_pool(model: PipelineModelWithKVCache) -> None:
    """One row that grows to 3,000 tokens."""
    scheduler, shares = Scheduler(model, EngineConfig(enable_prefix_caching=False)), []
    submit(scheduler, 500, 2500)
    while scheduler.step():
        if scheduler.state.cache.nbytes:
            shares.append(mx.get_cache_memory() / scheduler.state.cache.nbytes)
    print(f"pool of freed buffers, of the cache: {statistics.mean(shares):.2f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        plain, packed, one = (Path(name) / part for part in ("plain", "packed", "one"))
        for folder in (plain, packed, one):
            folder.mkdir()
        write_model(plain, SHAPES["smollm"])
        pack(plain, packed)
        for dtype in ("float32", "bfloat16"):
            measure_load(plain, "float32 file", dtype)
            measure_load(packed, "4-bit file", dtype)
        write_model(one, {**ONE_LAYER, "num_hidden_layers": 8})
        measure_pool(open_folder(one))
        write_model(one, ONE_LAYER)
        model = open_folder(one)
        for rows in (1, 8):
            for length in (128, 1000, 8000):
                found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
                for _ in range(rounds):
                    for way, runs in found.items():
                        runs.append(measure_steps(model, rows, length, way))
                report = ", ".join(
                    f"{way} {best[0]:.2f} ms, active {best[1]:.2f}, peak {best[2]:.2f}"
                    for way, runs in found.items()
                    for best in [min(runs)]
                )
                print(f"{rows} rows, {length} tokens: {report}")


if __name__ == "__main__":
    main()
