"""`model.model(*inputs.buffers)`: the documented arrays alone make a step, and hold its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.config import KVCacheConfig
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import ModelOutputs
from mlx_vlm_pipes.kv_cache import (
    KVCacheInputs,
    KVCacheInputsPerDevice,
    RowCacheInputs,
    increment_cache_lengths,
)
from tests.architectures.driving import new_cache, relative
from tests.device import bar
from tests.engine.models import open_model, write_llama
from tests.fixtures_helper import FIXTURES, longest_prompts

PAGE = 8
Step = Callable[[Any], ModelOutputs]


def context(ids: np.ndarray) -> TextContext:
    return TextContext(tokens=TokenBuffer(ids.astype(np.int64)), max_length=10_000)


def open_paged(folder: Path) -> Any:
    return open_model(folder, kv_cache=KVCacheConfig(kv_cache_page_size=PAGE))


def drive(
    model: Any, pairs: list[tuple[np.ndarray, np.ndarray]], step: Step
) -> tuple[list[np.ndarray], RowCacheInputs]:
    """Two chunks and two decode steps over prompts; last logits [B, V] of each, and the rows.

    The decode steps are given the prompts' own last tokens.
    """
    contexts = [context(ids[:-2]) for ids, _ in pairs]
    kv = new_cache(model, len(contexts))
    rows, logits = kv.inputs[0], []
    assert isinstance(rows, RowCacheInputs)
    for row, (ids, _) in zip(rows.rows, pairs, strict=True):
        row.planned_length = len(ids)
    for one in contexts:
        one.tokens.chunk(5)
    inputs = model.prepare_initial_token_inputs([contexts], kv)
    logits.append(np.array(step(inputs).logits))
    increment_cache_lengths(kv, [5] * len(contexts))
    for one in contexts:
        one.tokens.advance_chunk()
    inputs = model.prepare_initial_token_inputs([contexts], kv)
    logits.append(np.array(step(inputs).logits))
    increment_cache_lengths(kv, [one.tokens.active_length for one in contexts])
    for place in (-2, -1):
        following = mx.array([int(ids[place]) for ids, _ in pairs])
        inputs = model.prepare_next_token_inputs(following, inputs)
        logits.append(np.array(step(inputs).logits))
        increment_cache_lengths(kv, [1] * len(contexts))
    return logits, rows


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "phi3-longrope"])
def test_buffers_give_the_logits_of_execute_and_of_transformers(name: str) -> None:
    folder = FIXTURES / name
    model, pairs = open_paged(folder), longest_prompts(folder)
    given: list[np.ndarray] = []

    def by_buffers(inputs: Any) -> ModelOutputs:
        buffers = inputs.buffers
        _, bounds, _, blocks, lengths, table, longest = buffers
        counts = np.diff(np.array(bounds).astype(int)).tolist()
        assert np.array(longest).tolist() == [[max(counts), int(mx.max(lengths).item())]]
        old = np.array(blocks)
        outputs = model.model(*buffers)
        new = np.array(blocks)  # the very object that was handed in
        changed = [
            (int(table[i, t // PAGE].item()), t % PAGE)
            for i, count in enumerate(counts)
            for t in range(int(lengths[i].item()), int(lengths[i].item()) + count)
        ]
        for page, place in changed:
            assert new[page, :, :, place].any()
            assert not old[page, :, :, place].any()
            new[page, :, :, place] = 0
        np.testing.assert_array_equal(new, old)  # and nothing else was
        given.append(np.array(blocks))
        return outputs

    found, rows = drive(model, pairs, by_buffers)
    expected, plain = drive(model, pairs, model.execute)
    for place, ours, theirs in zip((4, -3, -2, -1), found, expected, strict=True):
        assert relative(ours, theirs) < bar(2e-5)
        truth = np.stack([logits[place] for _, logits in pairs])
        assert relative(ours, truth) < bar(2e-5)
    np.testing.assert_allclose(np.array(rows.kv_blocks), np.array(plain.kv_blocks), atol=bar(2e-5))
    np.testing.assert_allclose(given[-1], np.array(plain.kv_blocks), atol=bar(2e-5))


def test_keys_lie_in_their_pages_after_the_rotation() -> None:
    """Keys and values of the first layer, from the stored weights by Llama's formula."""
    folder = FIXTURES / "llama-tied"
    model, (ids, _) = open_paged(folder), longest_prompts(folder)[-1]
    kv = new_cache(model)
    mx.eval(model.execute(model.prepare_initial_token_inputs([[context(ids)]], kv)).logits)
    increment_cache_lengths(kv, [len(ids)])
    weights: Any = mx.load(str(folder / "model.safetensors"))
    table, norm, keys, values = (
        np.array(weights[f"model.{part}.weight"], np.float64)
        for part in (
            "embed_tokens", "layers.0.input_layernorm",
            "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj",
        )
    )  # fmt: skip
    x = table[ids]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
    k, v = ((x @ w.T).reshape(len(ids), 2, 16) for w in (keys, values))
    angles = np.arange(len(ids))[:, None, None] / 10000.0 ** (np.arange(0, 16, 2) / 16)
    a, b = k[..., :8], k[..., 8:]
    turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    blocks = np.array(kv.inputs[0].kv_blocks)
    found = blocks[:, :, 0].swapaxes(0, 1).reshape(2, -1, 2, 16)  # pages of one row, in order
    np.testing.assert_allclose(found[0, : len(ids)], np.concatenate(turned, -1), atol=bar(1e-5))
    np.testing.assert_allclose(found[1, : len(ids)], v, atol=bar(1e-5))
    assert not found[:, len(ids) :].any()


def test_pages_of_ones_own_in_any_order() -> None:
    """Somebody's own arrays, stepped over as the documentation of paged caches says."""
    folder = FIXTURES / "llama-tied"
    model, pairs = open_paged(folder), longest_prompts(folder)
    wide = max(-(-len(ids) // PAGE) for ids, _ in pairs)
    order = np.random.default_rng(0).permutation(2 * wide + 1)[: 2 * wide].reshape(2, wide)
    blocks = mx.zeros((2 * wide + 1, *model.kv_params.shape_per_block))
    done = [0, 0]
    for share in (0.4, 1.0):
        parts = [ids[n : int(len(ids) * share)] for n, (ids, _) in zip(done, pairs, strict=True)]
        bounds = mx.array(np.cumsum([0, *map(len, parts)]).astype(np.uint32))
        longest = mx.array([[max(map(len, parts)), max(done)]], dtype=mx.uint32)
        out = model.model(
            mx.array(np.concatenate(parts)), bounds, mx.array([1]), mx.zeros((0,), mx.uint8),
            blocks, mx.array(done, dtype=mx.uint32), mx.array(order.astype(np.uint32)), longest,
        )  # fmt: skip
        done = [n + len(part) for n, part in zip(done, parts, strict=True)]
        truth = np.stack([logits[n - 1] for n, (_, logits) in zip(done, pairs, strict=True)])
        assert relative(np.array(out.logits), truth) < bar(2e-5)


def prepared(model: Any) -> Any:
    return model.prepare_initial_token_inputs(
        [[context(np.arange(6)), context(np.arange(3))]], new_cache(model, 2)
    )


def test_splits_of_replicas_stand_where_signal_buffers_stand() -> None:
    model = open_paged(FIXTURES / "llama-tied")
    inputs = prepared(model)
    expected = np.array(model.model(*inputs.buffers).logits)
    inputs = prepared(model)
    inputs.data_parallel_splits = [[0, 1, 2]]
    assert inputs.buffers[3].dtype == mx.int64
    np.testing.assert_array_equal(np.array(model.model(*inputs.buffers).logits), expected)
    inputs.data_parallel_splits = [[0, 1, 3]]
    with pytest.raises(InputError, match="data_parallel_splits end at 3 for 2 rows"):
        model.model(*inputs.buffers)


def test_a_step_that_was_not_counted_is_noticed() -> None:
    model = open_paged(FIXTURES / "llama-tied")
    inputs = prepared(model)
    assert inputs.kv_cache_inputs is not None
    stale = inputs.buffers
    model.execute(inputs)
    for again in (lambda: model.execute(inputs), lambda: model.model(*inputs.buffers)):
        with pytest.raises(InputError, match="row 0 holds 6 tokens of the step before"):
            again()
    increment_cache_lengths(inputs.kv_cache_inputs, [6, 3])
    with pytest.raises(InputError, match=r"of rows with \[6, 3\] cached .* are \[0, 0\]"):
        model.model(*stale)
    again = model.prepare_next_token_inputs(mx.array([1, 2]), inputs)
    assert model.execute(again).logits.shape[0] == 2


def test_what_no_step_can_be_made_of_is_refused() -> None:
    model = open_paged(FIXTURES / "llama-tied")
    inputs = prepared(model)
    *first, view, lengths, table, longest = inputs.buffers
    blocks = mx.array(view)
    plain = KVCacheInputs([KVCacheInputsPerDevice(blocks, lengths, table, longest)])
    inputs.kv_cache_inputs = plain
    with pytest.raises(TypeError, match=r"KVCacheInputsPerDevice; .* cache_inputs\(cache, rows\)"):
        model.execute(inputs)
    wrong: list[tuple[list[Any], type[Exception], str]] = [
        ([], TypeError, "the model takes"),
        ([blocks, lengths, table], TypeError, "the model takes"),
        ([blocks, lengths, table, longest, mx.zeros((2,))], TypeError, "the model takes"),
        ([blocks[:1], lengths, table, longest], InputError, "row 1 needs 1 pages"),
        ([blocks, lengths + 3, table, longest + 9], InputError, "row 0 needs 2 pages"),
        ([blocks, lengths, table[:1], longest], InputError, "lookup_table"),
        ([blocks, lengths, table, longest * 0], InputError, "max_lengths"),
        ([blocks[:, :, :1], lengths, table, longest], InputError, "kv_blocks"),
    ]
    for arrays, kind, message in wrong:
        with pytest.raises(kind, match=message):
            model.model(*first, *arrays)
    assert model.model(*inputs.buffers).logits.shape[0] == 2  # arrays alone are enough for this


def test_a_quantised_cache_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    model: Any = open_model(folder, kv_cache=KVCacheConfig(bits=8))
    with pytest.raises(InputError, match=r"8 bits .* use execute"):
        model.model(*prepared(model).buffers)
