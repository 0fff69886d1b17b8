"""The cache is written in place while a decode step is in flight."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vlm_pipes.config import KVCacheConfig
from mlx_vlm_pipes.engine.handover import ALWAYS, NEVER, copied_share, overlaps
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from tests.engine.models import finish, new_scheduler, open_model, prompt_ids, submit, write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: fewer operations than MLX lets run ahead, so that two steps overlap on a CPU."""
    return write_llama(tmp_path_factory.mktemp("one") / "llama", layers=1, heads=32, kv_heads=32)


def decoding(model: PipelineModelWithKVCache, rows: int, length: int, **limits: int) -> Scheduler:
    """A scheduler with these rows in it, a step in flight, at the size they will keep."""
    scheduler = new_scheduler(model, **limits)
    for i in range(rows):
        submit(scheduler, prompt_ids(length, i), 30)
    while len(scheduler.running) < rows:
        scheduler.step()
    for _ in range(4):
        scheduler.step()
    return scheduler


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("rows", "length"), [(1, 1900), (8, 200)])
def test_a_step_in_flight_holds_one_cache(
    folder: Path, rows: int, length: int, bits: int | None
) -> None:
    model = open_model(folder, kv_cache=KVCacheConfig(bits=bits))
    gc.collect()  # what tests before have left
    mx.synchronize()
    weights = mx.get_active_memory()
    scheduler = decoding(model, rows, length)
    cache = scheduler.state.cache
    assert not overlaps(scheduler.state)
    for _ in range(10):
        scheduler.step()
        assert mx.get_active_memory() - weights < 1.2 * cache.nbytes
    assert copied_share(scheduler.state, scheduler.step, model.device) < 0.2


def test_the_answers_do_not_depend_on_it(folder: Path) -> None:
    model = open_model(folder)
    found = []
    for most in (NEVER, ALWAYS):
        scheduler = new_scheduler(model, overlap_bytes=most)
        handles = [submit(scheduler, prompt_ids(40, i), 20 + i) for i in range(3)]
        finish(scheduler)
        found.append([[chunk.token for chunk in handle] for handle in handles])
    assert found[0] == found[1]
