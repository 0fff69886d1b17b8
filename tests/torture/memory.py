"""Hundreds of requests of all lengths and pictures, some cancelled, some wrong: memory is flat.

The bar, from the 100th request to the 500th: with empty caches MLX's active memory grows by less
than FLAT_BYTES, its pool by less than POOL_BYTES and the resident set by less than RESIDENT_BYTES;
with full ones active memory stays within the budgets of prefixes and pictures and BATCH_BYTES.
"""

from __future__ import annotations

import gc
import os
import random
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.errors import PipesError
from mlx_vlm_pipes.pipeline import collect
from tests.fixtures_helper import FIXTURES
from tests.torture import section
from tests.torture.drawing import VISION, draw_request
from tests.torture.section import Case, require

FLAT_BYTES, POOL_BYTES, RESIDENT_BYTES = 50_000, 50_000, 30_000_000
BATCH_BYTES = 10_000_000  # what rows and the last step may hold
LIMITS = EngineConfig(prefix_bytes=400_000, image_bytes=100_000, max_batch_size=6)
SHORT, WHOLE = (20, 40), (100, 500)  # requests: before the first look, in all


@dataclass(frozen=True)
class Held:
    """Bytes with empty caches."""

    active: int
    pool: int
    resident: int


class Section(section.Section):
    """Case 0 is a short run; the others are whole ones, a family each."""

    small: ClassVar[int] = 1
    limit_s: ClassVar[float] = 900.0

    @property
    def whole(self) -> int:
        return 1 + len(VISION)

    def draw(self, index: int) -> Case:
        rng, family = self.rng(index), VISION[index % len(VISION)]
        warm, count = WHOLE if index else SHORT
        return Case(f"{family}: {count} requests", lambda: _run(family, warm, count, rng))


def _run(family: str, warm: int, count: int, rng: random.Random) -> None:
    with load(FIXTURES / family, dtype="float32", engine=LIMITS) as pipe:
        done = 0
        while done < warm:
            done += _some(pipe, family, rng)
        first = _held(pipe)
        most = first.active + LIMITS.prefix_bytes + LIMITS.image_bytes + BATCH_BYTES
        while done < count:
            done += _some(pipe, family, rng)
            full = pipe.engine.worker.call(mx.get_active_memory)
            require(full < most, f"{full} bytes are active after {done} requests, {most} allowed")
        last = _held(pipe)
    told = f"after {warm} requests {first}, after {done} {last}"
    require(last.active < first.active + FLAT_BYTES, f"active memory grows: {told}")
    require(last.pool < first.pool + POOL_BYTES, f"the pool grows: {told}")
    require(last.resident < first.resident + RESIDENT_BYTES, f"the resident set grows: {told}")


def _some(pipe: Pipeline, family: str, rng: random.Random) -> int:
    """A few requests at once and one that is wrong; returns their number."""
    requests = [draw_request(rng, family) for _ in range(rng.choice([1, 1, 2, 5]))]
    handles = [pipe.submit(**request) for request in requests]
    for handle in handles:
        if rng.random() < 0.15:
            handle.close()
        else:
            collect(handle)
    wrong: dict[str, Any] = rng.choice([{"images": [b"x"]}, {"top_p": 9}, {"max_tokens": 10**9}])
    try:
        pipe.generate("Hello", **wrong)
    except PipesError:
        return len(requests) + 1
    raise AssertionError(f"{wrong} was taken")


def _held(pipe: Pipeline) -> Held:
    gc.collect()
    pipe.engine.forget()
    active = pipe.engine.worker.call(mx.get_active_memory)
    return Held(active, pipe.engine.worker.call(mx.get_cache_memory), _resident())


def _resident() -> int:
    """The resident set now where the system tells it, else the most it has been."""
    path = Path("/proc/self/statm")
    if path.exists():
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
