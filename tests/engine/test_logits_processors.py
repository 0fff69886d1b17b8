"""Functions of a request that change its logits: mlx-lm's contract."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.pipeline import collect
from tests.fixtures_helper import FIXTURES

PROMPT = "Tell me about it."
WARM = {"max_tokens": 12, "ignore_eos": True, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load(FIXTURES / "llama-tied", dtype="float32") as made:
        yield made


def banning(*tokens: int) -> Callable[[mx.array, mx.array], mx.array]:
    """Writes into the logits that it is given, as mlx-lm's own processors do."""

    def ban(_: mx.array, logits: mx.array) -> mx.array:
        logits[:, mx.array(tokens)] = -mx.inf
        return logits

    return ban


def forcing(token: int) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda _, logits: mx.where(mx.arange(logits.shape[-1]) == token, mx.inf, logits)


def test_what_a_processor_is_given(pipe: Pipeline) -> None:
    seen: list[list[int]] = []

    def watch(tokens: mx.array, logits: mx.array) -> mx.array:
        assert (tokens.dtype, logits.dtype) == (mx.int32, mx.float32)
        assert logits.shape[0] == 1
        seen.append(tokens.tolist())  # pyright: ignore[reportArgumentType]  # 1-D
        return logits.astype(mx.float16).astype(mx.float32)

    prompt = pipe.encode(PROMPT).input_ids
    result = pipe.generate(PROMPT, logits_processors=[watch], **WARM)
    expected = [[*prompt, *result.tokens[:i]] for i in range(12)]
    assert seen[:12] == expected
    assert len(seen) <= 13


def test_processors_come_first_and_one_after_the_other(pipe: Pipeline) -> None:
    bias = {3: 5.0, 7: 4.0, 11: 2.0}
    more = {**WARM, "repetition_penalty": 1.3, "presence_penalty": 0.5, "top_k": 20, "top_p": 0.9}

    def add(token: int, logits: mx.array) -> mx.array:
        return logits + mx.where(mx.arange(logits.shape[-1]) == token, bias[token], 0.0)

    chain = [lambda _, logits, token=token: add(token, logits) for token in bias]
    expected = pipe.generate(PROMPT, logit_bias=bias, **more)
    assert pipe.generate(PROMPT, logits_processors=chain, **more).tokens == expected.tokens
    both = [forcing(9), banning(9)]
    assert 9 not in pipe.generate(PROMPT, logits_processors=both, **WARM).tokens
    assert set(pipe.generate(PROMPT, logits_processors=[forcing(9)], **WARM).tokens) == {9}


def test_scores_are_of_the_models_own_logits(pipe: Pipeline) -> None:
    greedy = {"max_tokens": 1, "logprobs": 2}
    free = pipe.generate(PROMPT, **greedy)
    best = free.tokens[0]
    banned = pipe.generate(PROMPT, logits_processors=[banning(best)], **greedy)
    assert banned.tokens[0] != best
    assert free.logprobs is not None
    assert banned.logprobs is not None
    top = [scores[0].top_log_probabilities[0] for scores in (free.logprobs, banned.logprobs)]
    assert top[1][best] == top[0][best]


def test_each_row_of_a_batch_has_its_own(pipe: Pipeline) -> None:
    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        if len(tokens) > 20:
            raise LookupError("no such word")
        return logits

    plain = [pipe.generate(PROMPT, **{**WARM, "seed": i}).tokens for i in range(3)]
    requests: list[Any] = [{"prompt": PROMPT, "seed": i} for i in range(3)]
    requests[1]["logits_processors"] = [forcing(9)]
    mixed = pipe.generate_batch(requests, **{k: v for k, v in WARM.items() if k != "seed"})
    assert [r.tokens for r in mixed] == [plain[0], [9] * 12, plain[2]]
    several = pipe.generate_n(PROMPT, 3, logits_processors=[banning(plain[1][0])], **WARM)
    assert all(plain[1][0] not in result.tokens for result in several)

    handles = [
        pipe.submit(PROMPT, **{**WARM, "seed": i}, logits_processors=[broken] if i == 1 else None)
        for i in range(3)
    ]
    assert collect(handles[0]).tokens == plain[0]
    with pytest.raises(LookupError, match="no such word"):
        collect(handles[1])
    assert collect(handles[2]).tokens == plain[2]


def test_what_is_no_logits_is_one_line(pipe: Pipeline) -> None:
    size = pipe.logits(PROMPT).shape[1]
    for made, found in {
        "nothing": (lambda t, x: None, "NoneType"),
        "a row": (lambda t, x: x[0], rf"float32 \[{size}\]"),
        "numpy": (lambda t, x: np.array(x), "ndarray"),
        "whole numbers": (lambda t, x: x.astype(mx.int32), rf"int32 \[1, {size}\]"),
    }.values():
        with pytest.raises(InputError, match=rf"<lambda> returned .*{found}; expected logits"):
            pipe.generate(PROMPT, logits_processors=[made], max_tokens=1)
    for wrong in (5, "ban", [5], banning(1)):
        with pytest.raises(InputError, match="expected a list of functions"):
            pipe.generate(PROMPT, logits_processors=wrong)  # pyright: ignore[reportArgumentType]


def test_a_processor_that_asks_its_own_model_is_told(pipe: Pipeline, tmp_path: Path) -> None:
    asks = (
        lambda *_: pipe.generate("And you?", max_tokens=1),
        lambda *_: pipe.logits("And you?"),
        lambda *_: pipe.save_prefix(tmp_path / "you.safetensors", "And you?"),
    )
    for ask in asks:
        with pytest.raises(InputError, match="a logits processor asks the model that waits for it"):
            pipe.generate(PROMPT, logits_processors=[ask], max_tokens=2)
    assert not list(tmp_path.iterdir())


def test_a_processor_cannot_end_the_engine(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="logits_processors: <lambda> raised SystemExit"):
        pipe.generate(PROMPT, logits_processors=[lambda t, x: sys.exit(1)], max_tokens=2)
    assert pipe.generate(PROMPT, max_tokens=2, ignore_eos=True).finish_reason == "length"


@pytest.mark.reference
def test_those_of_mlx_lm(pipe: Pipeline) -> None:
    utils = pytest.importorskip("mlx_lm.sample_utils")
    penalty = utils.make_logits_processors(repetition_penalty=1.7, repetition_context_size=1000)
    greedy = {"max_tokens": 24, "ignore_eos": True}
    ours = pipe.generate(PROMPT, repetition_penalty=1.7, **greedy).tokens
    assert pipe.generate(PROMPT, logits_processors=penalty, **greedy).tokens == ours
    assert ours != pipe.generate(PROMPT, **greedy).tokens
    all_kinds = utils.make_logits_processors(
        logit_bias={9: 50.0}, presence_penalty=60.0, frequency_penalty=0.1
    )
    tokens = pipe.generate(PROMPT, logits_processors=all_kinds, **greedy).tokens
    assert tokens[0] == 9
    assert tokens[1] != 9
