"""The compiled decode step: few traces, no copy of the cache, the numbers of eager steps."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.kv_cache import capacity_bucket
from tests.engine.models import (
    finish,
    new_scheduler,
    open_model,
    prompt_ids,
    submit,
    tokens_of,
    write_llama,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def generate(
    model: PipelineModelWithKVCache, rows: int, count: int, length: int = 20
) -> list[list[int]]:
    scheduler = new_scheduler(model)
    handles = [submit(scheduler, prompt_ids(length + i, i), count) for i in range(rows)]
    finish(scheduler)
    return [tokens_of(handle) for handle in handles]


def test_one_trace_for_each_capacity_over_600_tokens(folder: Path) -> None:
    model = open_model(folder)
    compiled = generate(model, 1, 600)
    buckets = {capacity_bucket(length + 1) for length in range(20, 620)}
    assert model.language.traces == len(buckets) == 10
    assert generate(model, 1, 600) == compiled
    assert model.language.traces == len(buckets)  # the second run traces nothing
    eager = open_model(folder, compile=False)
    assert generate(eager, 1, 600) == compiled
    assert eager.language.traces == 0


def step_peak(scheduler: Scheduler) -> int:
    """The most bytes a step allocates beyond what is there, away from bucket borders."""
    for _ in range(4):
        scheduler.step()
    mx.synchronize()
    peaks = []
    for _ in range(6):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        scheduler.step()
        mx.synchronize()
        peaks.append(mx.get_peak_memory() - before)
    return max(peaks)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_does_not_copy_the_cache(folder: Path, rows: int, bits: int | None) -> None:
    from mlx_vlm_pipes.config import KVCacheConfig

    model = open_model(folder, kv_cache=KVCacheConfig(bits=bits))
    peaks, sizes = [], []
    for length in (60, 600):
        scheduler = new_scheduler(model, prefill_chunk=512)
        for i in range(rows):
            submit(scheduler, prompt_ids(length, i), 40)
        while len(scheduler.running) < rows:
            scheduler.step()
        peaks.append(step_peak(scheduler))
        sizes.append(scheduler.state.cache.nbytes)
    # scores and masks grow with the capacity; the keys of one layer are a quarter of the cache
    assert sizes[1] > 4 * sizes[0]
    assert peaks[1] - peaks[0] < sizes[1] / 5, (peaks, sizes)


def test_slices_are_as_the_whole(folder: Path) -> None:
    model = open_model(folder)
    answers = []
    for size in (1000, 64, 7):
        scheduler = new_scheduler(model, prefill_chunk=size)
        handle = submit(scheduler, prompt_ids(150), 12)
        finish(scheduler)
        answers.append(tokens_of(handle))
    assert answers[0] == answers[1] == answers[2]
