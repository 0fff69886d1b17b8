"""A decode step takes other forms on a GPU than on a CPU, and groups of rows: the same numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.interfaces import Phase, ReturnLogits, StepMode
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.nn.decoder import DenseDecoder
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.language_model import EAGER_STEPS, LanguageModel
from mlx_vlm_pipes.nn.rope import RopeSpec
from mlx_vlm_pipes.nn.rope_scaling import YarnRope

LAYERS, KEY_HEADS, DIM = 2, 2, 64
LENGTHS = (5, 1500, 9, 70)
YARN = {"rope": RopeSpec(DIM, 10000.0, scaling=YarnRope(4.0, 64, 1.2))}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "8 bits": {"bits": 8},
    "8 bits, a scale that is no power of two": {"bits": 8, "attention_scale": 0.11},
    "norms of queries and keys": {"qk_norm": True},
    "norms, 8 bits": {"qk_norm": True, "bits": 8},
    "magnitude": YARN,
    "magnitude, 8 bits": {**YARN, "bits": 8},
    "part of a head, pairs side by side": {"rope": RopeSpec(32, 10000.0, interleaved=True)},
    "window": {"sliding_window": 40},
}  # fmt: skip
QUICK = ("plain", "8 bits")  # the others are slow


def params(bits: int | None, *, on_gpu: bool) -> KVCacheParams:
    device = DeviceRef.GPU() if on_gpu else DeviceRef.CPU()
    return KVCacheParams(DType.float32, KEY_HEADS, DIM, LAYERS, [device], bits=bits)


def decoder(**changes: Any) -> DenseDecoder:
    sizes: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 64, "num_layers": LAYERS, "num_heads": 4,
        "num_kv_heads": KEY_HEADS, "head_dim": DIM, "vocab_size": 32, "attention_scale": 0.125,
        "rope": RopeSpec(DIM, 10000.0), "tie_word_embeddings": True,
    }  # fmt: skip
    made, rng = DenseDecoder(DecoderConfig(**(sizes | changes))), np.random.default_rng(0)
    made.update(tree_map(lambda a: mx.array(rng.normal(0, 0.3, a.shape)), made.parameters()))
    made.fuse()
    return made


def run(
    model: LanguageModel, rows: list[int], steps: int, bits: int | None, *, on_gpu: bool
) -> Any:
    """Logits [steps, B, V] of decode steps after prompts of LENGTHS[row] tokens."""
    cache = KVCache(params(bits, on_gpu=on_gpu))
    lengths = [LENGTHS[row] for row in rows]
    kv = cache_inputs(cache, [cache.new_row() for _ in rows])
    ids = np.concatenate([np.random.default_rng(row).integers(0, 32, LENGTHS[row]) for row in rows])
    offsets = mx.array(np.cumsum([0, *lengths]))
    model(mx.array(ids), offsets, mx.array([1]), kv, mode=StepMode())
    increment_cache_lengths(kv, lengths)
    found = []
    for step in range(steps):
        tokens = mx.array([(7 * row + step) % 32 for row in rows])
        mode, bounds = StepMode(Phase.DECODE), mx.arange(len(rows) + 1)
        found.append(np.array(model(tokens, bounds, mx.array([1]), kv, mode=mode).logits))
        increment_cache_lengths(kv, [1] * len(rows))
    return np.stack(found), cache.shapes


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_forms_and_groups_give_what_a_row_gives_alone(kind: str) -> None:
    changes = dict(KINDS[kind])
    bits = changes.pop("bits", None)
    weights = decoder(**changes)
    atol = 2e-5 if bits is None else 2e-2  # a number beside a rounding step may fall to either side
    alone = LanguageModel(
        weights, params(bits, on_gpu=False), ReturnLogits.LAST_TOKEN, compile=False
    )
    expected = [run(alone, [row], 3, bits, on_gpu=False)[0][:, 0] for row in range(4)]
    for on_gpu in (False, True):
        model = LanguageModel(weights, params(bits, on_gpu=on_gpu), ReturnLogits.LAST_TOKEN)
        for rows in ([1], [3, 1, 2, 0], [0, 2]):
            found, shapes = run(model, rows, 3, bits, on_gpu=on_gpu)
            assert len(shapes) == (2 if len(rows) == 4 else 1)
            for i, row in enumerate(rows):
                np.testing.assert_allclose(found[:, i], expected[row], atol=atol)


def test_a_batch_of_groups_is_compiled_once_it_has_run_for_a_while() -> None:
    language = LanguageModel(decoder(), params(None, on_gpu=False), ReturnLogits.LAST_TOKEN)
    found, _ = run(language, [0, 1], EAGER_STEPS + 3, None, on_gpu=False)
    assert language.traces == (1 if language._compiled else 0)
    eager = LanguageModel(
        language.decoder, params(None, on_gpu=False), ReturnLogits.LAST_TOKEN, compile=False
    )
    expected, _ = run(eager, [0, 1], EAGER_STEPS + 3, None, on_gpu=False)
    np.testing.assert_array_equal(found, expected)


def test_compiled_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_vlm_pipes.nn.language_model.MOST_SIZES", 2)
    language = LanguageModel(decoder(), params(None, on_gpu=False), ReturnLogits.LAST_TOKEN)
    batches = ([0], [1], [2, 3], [0])  # three sizes, the first of them twice
    found = [run(language, rows, 1, None, on_gpu=False)[0] for rows in batches]
    assert len({run(language, rows, 1, None, on_gpu=False)[1] for rows in batches}) == 3
    assert language.traces > (3 if language._compiled else -1)  # a forgotten size is traced anew
    assert len(language._runs) <= 2
    np.testing.assert_array_equal(found[0], found[3])
