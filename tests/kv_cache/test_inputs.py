"""The documented arrays say what lies in the rows and what the coming step is."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.kv_cache import (
    CacheRow,
    KVCache,
    KVCacheInputs,
    KVCacheInputsPerDevice,
    cache_inputs,
    increment_cache_lengths,
)

LAYERS, HEADS, DIM, PAGE = 3, 2, 32, 4


def params(bits: int | None = None) -> KVCacheParams:
    return KVCacheParams(
        dtype=DType.float32, n_kv_heads=HEADS, head_dim=DIM, num_layers=LAYERS,
        devices=[DeviceRef.CPU()], page_size=PAGE, bits=bits,
    )  # fmt: skip


def numbers(seed: int, length: int) -> np.ndarray:
    """Keys and values of a row, [2, L, K, length, D]."""
    shape = (2, LAYERS, HEADS, length, DIM)
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def row_of(cache: KVCache, tokens: np.ndarray) -> CacheRow:
    row = cache.new_row()
    if tokens.shape[3]:
        row.write(mx.array(tokens), 0)
    row.length = tokens.shape[3]
    return row


def unpaged(blocks: mx.array, pages: np.ndarray, length: int) -> np.ndarray:
    """Tokens of a row, one by one, as the documented layout says: [2, L, K, length, D]."""
    found = np.array(blocks)
    assert found.shape[1:] == (2, LAYERS, PAGE, HEADS, DIM)
    own = [found[pages[t // PAGE], :, :, t % PAGE] for t in range(length)]
    return np.stack(own, axis=3) if own else np.zeros((2, LAYERS, HEADS, 0, DIM), np.float32)


def test_a_row_twice_and_a_row_of_another_cache_are_refused() -> None:
    cache, other = KVCache(params()), KVCache(params())
    row, stranger = row_of(cache, numbers(1, 5)), row_of(other, numbers(2, 3))
    with pytest.raises(InputError, match="given twice"):
        cache_inputs(cache, [row, row])
    early = cache_inputs(cache, [row, stranger])  # staged: it owns its arrays
    cache.place([row])
    other.place([stranger])  # both in slot 0
    with pytest.raises(InputError, match="row 1 lies in another KVCache"):
        cache_inputs(cache, [row, stranger])
    with pytest.raises(InputError, match="row 1 lies in another KVCache"):
        early.inputs[0].kv_blocks.shape  # noqa: B018


@pytest.mark.parametrize("bits", [None, 8])
def test_staged_and_placed_rows_are_seen_in_pages(bits: int | None) -> None:
    cache, lengths = KVCache(params(bits)), [5, 0, 9, 4]
    tokens = [numbers(i, n) for i, n in enumerate(lengths)]
    rows = [row_of(cache, t) for t in tokens]
    cache.place([rows[2], rows[0]])  # in slots of another order; the others stay staged
    kv = cache_inputs(cache, rows)
    before = kv.flatten()
    assert [a.shape for a in before] == [(6, 2, LAYERS, PAGE, HEADS, DIM), (4,), (4, 3), (1, 2)]
    np.testing.assert_array_equal(np.array(before[3]), [[0, 9]])
    kv.expect([1, 3, 8, 0])
    blocks, cached, table, longest = kv.flatten()
    assert [a.dtype for a in (blocks, cached, table, longest)] == [mx.float32, *[mx.uint32] * 3]
    np.testing.assert_array_equal(np.array(cached), lengths)
    np.testing.assert_array_equal(np.array(longest), [[8, 9]])
    pages = np.array(table)
    # 6, 3, 17 and 4 tokens; 9 is behind the last of the pages 0 to 8
    expected = [[0, 1, 9, 9, 9], [2, 9, 9, 9, 9], [3, 4, 5, 6, 7], [8, 9, 9, 9, 9]]
    np.testing.assert_array_equal(pages, expected)
    for i, (own, length) in enumerate(zip(tokens, lengths, strict=True)):
        if bits is not None and length:
            packed = mx.quantize(mx.array(own), 32, bits)
            own = np.array(mx.dequantize(*packed, group_size=32, bits=bits))
        np.testing.assert_array_equal(unpaged(blocks, pages[i], length), own)
    assert not np.array(blocks)[7].any()  # room for the coming tokens


def test_tokens_that_are_not_counted_are_seen_and_survive_being_moved() -> None:
    cache, tokens = KVCache(params()), numbers(0, 7)
    row = row_of(cache, tokens[:, :, :, :5])
    kv = cache_inputs(cache, [row])
    row.write(mx.array(tokens[:, :, :, 5:]), 5)
    kv.inputs[0].wrote([2])
    cache.place([row])
    cache.place([row_of(cache, numbers(1, 3))])  # pushes the row out
    assert row.slot is None
    blocks, lengths, table, _ = kv.flatten()
    assert np.array(lengths).tolist() == [5]
    np.testing.assert_array_equal(unpaged(blocks, np.array(table)[0], 7), tokens)
    increment_cache_lengths(kv, [2])
    np.testing.assert_array_equal(np.array(cache.read(row, 0, 7)), tokens)


def test_tokens_are_counted_once_and_no_more_than_were_written() -> None:
    cache = KVCache(params())
    row = row_of(cache, numbers(0, 5))
    kv = cache_inputs(cache, [row])
    with pytest.raises(InputError, match="1 tokens to count in row 0 where 0 were written"):
        increment_cache_lengths(kv, [1])
    kv.inputs[0].wrote([3])
    with pytest.raises(InputError, match=r"row 0 holds 3 tokens .* call increment_cache_lengths"):
        kv.inputs[0].require_counted()
    increment_cache_lengths(kv, [2])  # the third was a draft that is given up
    kv.inputs[0].require_counted()
    assert row.length == row.filled == 7


def test_an_announcement_is_of_one_step() -> None:
    cache = KVCache(params())
    kv = cache_inputs(cache, [row_of(cache, numbers(0, 5))])
    kv.expect([3])
    kv.inputs[0].wrote([3])
    assert np.array(kv.inputs[0].max_lengths).tolist() == [[0, 5]]
    kv.expect([1])  # of the step after, before the step's tokens are counted
    increment_cache_lengths(kv, [3])
    assert np.array(kv.inputs[0].max_lengths).tolist() == [[1, 8]]
    with pytest.raises(InputError, match="of 1 rows for a batch of 2"):
        kv.expect([1, 1])


def test_arrays_given_by_hand_are_handed_on_and_count_nothing() -> None:
    arrays = [mx.zeros((n,)) for n in (1, 2, 3, 4)]
    kv = KVCacheInputs([KVCacheInputsPerDevice(*arrays)])
    assert all(a is b for a, b in zip(kv.flatten(), arrays, strict=True))
    assert KVCacheInputsPerDevice(*arrays, kv_scales=mx.zeros((5,))).flatten()[4].shape == (5,)
    for wrong, found in ((kv, "KVCacheInputsPerDevice"), (KVCacheInputs(), "nothing")):
        with pytest.raises(TypeError, match=rf"hold {found}; expected .*cache_inputs\(cache, rows"):
            increment_cache_lengths(wrong, [1])
