"""Which rows share arrays: what is held follows the sum of the rows' lengths."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.kv_cache import KVCache, capacity_bucket, most_held, row_bucket
from mlx_vlm_pipes.kv_cache.buckets import partition
from tests.kv_cache.test_cache import check, decode, params, prefill


def held(needs: list[int]) -> int:
    return sum(share.slots * share.capacity for share in partition(needs))


@pytest.mark.parametrize("seed", range(8))
def test_any_lengths_are_held_within_the_promise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        count = int(rng.integers(1, 70))
        spread = rng.choice([1.0, 1.2, 3.0, 100.0])
        needs = (rng.integers(1, 4000) * spread ** rng.random(count)).astype(int) + 1
        shares = partition(needs.tolist())
        assert sorted(i for share in shares for i in share.rows) == list(range(count))
        for share in shares:
            assert len(share.rows) <= share.slots
            assert max(needs[i] for i in share.rows) <= share.capacity
        assert held(needs.tolist()) <= most_held(needs.tolist())
        if needs.sum() > 64 * count + 10_000 and needs.min() > 213:
            assert held(needs.tolist()) <= 1.3 * needs.sum()


def test_what_may_be_held_never_falls_where_rows_grow_or_join() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        needs = (3000 ** rng.random(rng.integers(1, 20))).astype(int).tolist()
        before = most_held(needs)
        assert before <= row_bucket(len(needs)) * capacity_bucket(max(needs))
        assert before <= most_held([*needs, 1])
        needs[0] += int(rng.integers(1, 500))
        assert before <= most_held(needs)


def test_rows_of_like_lengths_are_one_group() -> None:
    for needs in ([100], [100] * 8, [90, 100, 120, 110], [40, 500], [3000, 3100, 3050]):
        assert len(partition(needs)) == 1
    assert [share.rows for share in partition([3000, *[40] * 15])] == [tuple(range(1, 16)), (0,)]


def test_sixteen_rows_one_of_32k_tokens_hold_what_they_need() -> None:
    cache, numbers = KVCache(params()), range(1, 17)
    rows = {n: prefill(cache, n, 32_000 if n == 3 else 60 + n) for n in numbers}
    mx.eval([row.arrays() for row in rows.values()])
    mx.synchronize()
    mx.clear_cache()
    own = sum(row.length for row in rows.values()) * cache.params.bytes_per_token
    before = mx.get_active_memory() - sum(row.nbytes for row in rows.values())
    mx.reset_peak_memory()
    cache.place(list(rows.values()))
    mx.synchronize()
    assert mx.get_active_memory() - before <= 1.3 * own
    assert mx.get_peak_memory() - before <= 1.3 * own + own / 2 + 1e6  # one layer of two, again
    assert cache.nbytes <= 1.3 * own
    decode(cache, rows)
    check(cache, {n: row for n, row in rows.items() if n in (1, 3, 16)})


def test_groups_are_not_made_anew_at_every_step() -> None:
    """Rows of many lengths over 300 steps: few sizes, and what is held stays near the lengths."""
    cache = KVCache(params())
    rows = [prefill(cache, n, 40 * (n + 1)) for n in range(12)]
    shapes = []
    for _ in range(300):
        cache.place(cache.placed or rows)
        shapes.append(cache.shapes)
        tokens = sum(row.length for row in rows)
        assert sum(slots * capacity for slots, capacity in cache.shapes) <= 1.3 * tokens + 1800
        for row in rows:
            row.length += 1
    changes = sum(a != b for a, b in itertools.pairwise(shapes))
    assert changes <= 300 // 64 * 4
    assert len(shapes[-1]) <= 4


def test_a_row_that_joins_or_leaves_moves_no_other_group() -> None:
    cache = KVCache(params())
    long, short = prefill(cache, 1, 3000), [prefill(cache, n, 50) for n in range(2, 6)]
    cache.place([long, *short])
    assert sorted(cache.shapes) == [(1, 3072), (4, 64)]
    rows = {1: long, **dict(enumerate(short, 2))}
    late = prefill(cache, 6, 40)
    cache.release(short[0])
    del rows[2]
    cache.place([*rows.values(), late])  # into the slot that is free
    assert sorted(cache.shapes) == [(1, 3072), (4, 64)]
    check(cache, {**rows, 6: late})
    cache.release(long)
    assert cache.shapes == ((4, 64),)
