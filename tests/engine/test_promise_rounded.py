"""What the promise is worth where numbers are rounded on the way: a quantised cache, bfloat16.

The order of a sum depends on how many rows a step has. In float32 that is noise of 1e-6 and no
token changes; a key or value beside a rounding step is moved by all of that step. So two ways of
running a request differ by less than the rounding itself does, and the same way gives the same
bits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import GenerationResult, Pipeline, load
from mlx_vlm_pipes.config import KVCacheConfig
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.kv_cache import QuantizedFormat
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.pipeline import collect
from tests.engine.models import finish, new_scheduler, open_model, prompt_ids, write_llama

ROOT = Path(__file__).parent.parent.parent / "examples"
QWEN, PICTURE = ROOT / "models" / "tiny-qwen2_5vl", str(ROOT / "images" / "star_and_triangle.png")
SHARE = 0.5  # of the rounding's own error
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Which two shapes are there, and in which colours?", "images": [PICTURE]},
    {"prompt": "Hello there! How many? " * 5},
    {"prompt": "Hello there! How many? " * 5 + "Two?"},
]
ASKED: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "logprobs": 1}


def configure(pipe: Pipeline, **limits: Any) -> None:
    pipe.engine.forget()
    pipe.engine.scheduler.state.config = replace(EngineConfig(), **limits)


def gap(a: GenerationResult, b: GenerationResult) -> float:
    """Largest difference of the best log-probabilities, up to the first place with other tokens."""
    found = 0.0
    for i, (x, y) in enumerate(zip(a.logprobs or [], b.logprobs or [], strict=True)):
        found = max(found, abs(x.token_log_probabilities[0] - y.token_log_probabilities[0]))
        if a.tokens[i] != b.tokens[i]:
            break
    return found


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        (BUNDLED, {"kv_bits": 4, "dtype": "float32"}),
        (QWEN, {"kv_bits": 8, "dtype": "float32"}),
        (QWEN, {"dtype": "bfloat16"}),
    ],
)
def test_ways_of_running_differ_by_less_than_the_rounding(
    folder: Path, options: dict[str, Any]
) -> None:
    with load(folder, dtype="float32") as exact:
        plain = [exact.logits(**request) for request in REQUESTS]
    with load(folder, **options) as pipe:
        configure(pipe, enable_prefix_caching=False)
        logits = [pipe.logits(**request) for request in REQUESTS]
        bar = SHARE * max(np.abs(a - b).max() for a, b in zip(logits, plain, strict=True))
        assert bar > 0.01
        alone = [pipe.generate(**request, **ASKED) for request in REQUESTS]
        again = [pipe.generate(**request, **ASKED) for request in REQUESTS]
        assert [a.logprobs for a in again] == [a.logprobs for a in alone]
        for limits in (
            {"enable_prefix_caching": False},  # one batch
            {"enable_prefix_caching": False, "prefill_chunk": 7, "running_chunk": 7},
            {},  # the third begins with the second
            {},
        ):
            configure(pipe, **limits)
            handles = [pipe.submit(**request, **ASKED) for request in REQUESTS]
            for handle, expected in zip(handles, alone, strict=True):
                assert gap(collect(handle), expected) < bar
            for request, expected in zip(REQUESTS, logits, strict=True):
                assert np.abs(pipe.logits(**request) - expected).max() < bar


@pytest.mark.parametrize("bits", [8, 4])
def test_noise_below_a_rounding_step_stays_below_the_rounding(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose sums depend much on the slices."""
    folder = write_llama(tmp_path / "llama", layers=8)

    def logits(**options: Any) -> np.ndarray:
        scheduler = new_scheduler(open_model(folder, **options))
        tokens = TokenBuffer(np.array(prompt_ids(150)))
        _, found = scheduler.submit_logits(TextContext(max_length=512, tokens=tokens))
        finish(scheduler)
        return found.whole()

    cache = KVCacheConfig(bits=bits)
    plain, whole = logits(), logits(kv_cache=cache)
    encode, keys = QuantizedFormat.encode, iter(mx.random.split(mx.random.key(0), 100))

    def noisy(self: QuantizedFormat, x: mx.array) -> Any:
        return encode(self, x * (1 + 3e-6 * mx.random.normal(x.shape, key=next(keys))))

    monkeypatch.setattr(QuantizedFormat, "encode", noisy)
    moved = np.abs(logits(kv_cache=cache) - whole)
    own = np.abs(whole - plain)
    assert moved.max() > 1e-4  # the bar of a plain cache
    assert moved.max() < SHARE * own.max()
    assert moved.mean() < SHARE * own.mean()
