"""Rows that move between their own arrays and the batch's: nobody's tokens may change."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.kv_cache import (
    CacheRow,
    KVCache,
    capacity_bucket,
    decode_places,
    write_decode,
    write_one,
)

LAYERS, DIM = 2, 32


def params(bits: int | None = None) -> KVCacheParams:
    return KVCacheParams(
        dtype=DType.float32, n_kv_heads=1, head_dim=DIM, num_layers=LAYERS,
        devices=[DeviceRef.CPU()], bits=bits,
    )  # fmt: skip


def token(row: int, place: int, layer: int) -> float:
    return row + place / 1000 + layer * 100


def prefill(cache: KVCache, number: int, length: int) -> CacheRow:
    row = cache.new_row()
    row.reserve(length + 1)
    for layer in range(LAYERS):
        values = np.array([token(number, p, layer) for p in range(length)], np.float32)
        block = mx.array(np.broadcast_to(values[None, None, :, None], (1, 1, length, DIM)))
        row.append(layer, block, -block, 0)
    row.length = length
    return row


def content(cache: KVCache, row: CacheRow, layer: int) -> np.ndarray:
    """A row's keys, one number a token, wherever it lies."""
    twin = cache.copy_row(row, row.length)
    keys, values = np.array(twin.arrays()[layer])
    assert np.array_equal(keys, -values)
    return keys[0, 0, :, 0]


def check(cache: KVCache, rows: dict[int, CacheRow]) -> None:
    for number, row in rows.items():
        for layer in range(LAYERS):
            expected = [token(number, p, layer) for p in range(row.length)]
            np.testing.assert_allclose(content(cache, row, layer), expected, rtol=1e-6)


def decode(cache: KVCache, rows: dict[int, CacheRow]) -> None:
    """One decode step that writes each row's next token."""
    numbers = {number: i for i, number in enumerate(rows)}
    slots = cache.slot_rows(list(rows.values()))
    named = {i: number for number, i in numbers.items()}
    lengths, arrays, out, begin = np.array(cache.lengths()), cache.take(), [], 0
    for group in range(0, len(arrays), LAYERS):
        _, count, _, capacity, _ = arrays[group].shape
        own = slice(begin, begin + count)
        where = mx.array(lengths[own])
        for i in range(LAYERS):
            fresh = np.zeros((count, 2, DIM), np.float32)
            for place, row in enumerate(slots[own]):
                if row is not None:
                    number = named[row]
                    fresh[place, 0] = token(number, rows[number].length, i)
            fresh[:, 1] = -fresh[:, 0]
            layer, new = (arrays[group + i],), (mx.array(fresh),)
            if count == 1:
                out += write_one(layer, new, where)
            else:
                out += write_decode(layer, new, decode_places(where, 1, capacity))
        begin += count
    cache.give(out)
    for row in rows.values():
        row.length += 1


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_come_grow_and_go_keep_their_tokens(seed: int) -> None:
    random.seed(seed)
    cache, rows, staged = KVCache(params()), {}, {}
    for number in range(1, 40):
        action = random.random()
        if action < 0.4:
            staged[number] = prefill(cache, number, random.choice([1, 5, 63, 64, 130, 900]))
        elif action < 0.55 and rows:
            number, row = random.choice(list(rows.items()))
            keep = random.random() < 0.5
            cache.release(row, keep=keep)
            del rows[number]
            if keep:
                staged[number] = row
        elif staged or rows:
            rows |= staged
            staged = {}
            order = sorted(rows.values(), key=lambda row: 99 if row.slot is None else row.slot)
            if random.random() < 0.2:
                random.shuffle(order)
            cache.place(order)
            needs = [row.length + 1 for row in rows.values()]
            spare = max(sum(max(0.3 * n, 64) for n in needs), 64 * len(needs) + 1024)
            assert sum(slots * capacity for slots, capacity in cache.shapes) <= sum(needs) + spare
            for _ in range(random.randint(1, 3)):
                cache.place(cache.placed)
                decode(cache, rows)
        check(cache, rows | staged)


def test_capacity_is_given_back() -> None:
    cache = KVCache(params())
    long, short = prefill(cache, 1, 500), prefill(cache, 2, 10)
    cache.place([long, short])
    assert cache.shapes == ((2, 512),)
    cache.release(long)
    assert cache.shapes == ((1, 64),)
    check(cache, {2: short})
    cache.release(short)
    assert cache.nbytes == 0


def test_capacity_buckets_waste_at_most_what_they_promise() -> None:
    for tokens in range(1, 70_000):
        capacity = capacity_bucket(tokens)
        assert tokens <= capacity <= max(tokens + 63, 1.125 * tokens)
    assert len({capacity_bucket(n) for n in range(1, 2049)}) == 8 + 8 + 8


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_per_token_is_what_the_arrays_take(bits: int) -> None:
    cache = KVCache(params(bits))
    row = cache.new_row()
    row.reserve(128)
    assert row.nbytes == 128 * cache.params.bytes_per_token
