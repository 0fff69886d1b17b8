"""Values of a wrong type or size, wherever the API takes some: one line, nothing else happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.conversion import ConvertOptions
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.errors import EngineClosed, InputError, PipesError
from tests.fixtures_helper import FIXTURES

FOLDER = FIXTURES / "llama-tied"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load(FOLDER, dtype="float32") as made:
        yield made
    with pytest.raises(EngineClosed):
        made.generate("Hello")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("path", 5), ("path", b"x"), ("path", []), ("max_length", 0), ("max_length", 1.5),
        ("max_length", "5"), ("max_length", True), ("engine", 5), ("engine", {}), ("compile", "x"),
        ("compile", None), ("compile", 1), ("revision", 5), ("adapter", 5), ("adapter", [5]),
        ("adapter", b"x"), ("kv_bits", "x"), ("kv_bits", 8.0), ("kv_bits", True),
        ("vision_config_overrides", 5), ("vision_config_overrides", "x"),
    ],
)  # fmt: skip
def test_load(name: str, wrong: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*, expected "):
        load(**{"path": FOLDER, name: wrong})


@pytest.mark.parametrize("wrong", [{"dtype": 5}, {"dtype": None}, {"device": 5}, {"kv_bits": 3}])
def test_load_names_that_do_not_exist(wrong: Any) -> None:
    with pytest.raises(PipesError):
        load(FOLDER, **wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("kv_bytes", "x"), ("kv_bytes", 1.5), ("kv_bytes", -1), ("prefix_bytes", None),
        ("max_batch_size", True), ("image_batch", 0), ("enable_prefix_caching", "x"),
        ("running_wait_ms", math.inf),
    ],
)  # fmt: skip
def test_engine_config(name: str, wrong: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*, expected "):
        EngineConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("model", 5), ("model", None), ("out", b"x"), ("lora", True), ("bits", "4"), ("bits", 4.0),
        ("group_size", True), ("mode", []), ("mixed", {}), ("dtype", 5), ("measure", 1),
        ("quantize_vision", "x"), ("dequantize", None), ("revision", []), ("shard_bytes", 0),
    ],
)  # fmt: skip
def test_convert(name: str, wrong: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*, expected "):
        ConvertOptions(**{"model": FOLDER, "out": "out", name: wrong})


@pytest.mark.parametrize(
    ("ask", "line"),
    [
        (lambda p: p.generate_batch([5]), "a request is 5, expected a prompt, messages, or a"),
        (lambda p: p.generate_batch([None]), "a request is None, expected"),
        (lambda p: p.generate_batch([b"x"]), "a request is b'x', expected"),
        (
            lambda p: p.generate_batch([["a"]]),
            "message 0 is a text; several prompts are for generate_batch",
        ),
        (lambda p: p.generate_batch(None), "requests is None, expected a list"),
        (lambda p: p.generate_batch("Hello"), "requests is 'Hello', expected a list"),
        (lambda p: p.generate_batch({"prompt": "x"}), "requests is {'prompt': 'x'}, expected a l"),
        (lambda p: p.generate_batch([{"prompt": 5}]), "prompt is 5, expected a text or a list"),
        (lambda p: p.generate_batch([{"messages": 5}]), "prompt is 5, expected a text or a list"),
        (lambda p: p.generate_n("x", "3"), "n is '3', expected a whole number of at least 1"),
        (lambda p: p.generate_n("x", 1.5), "n is 1.5, expected a whole number of at least 1"),
        (lambda p: p.generate_n("x", True), "n is True, expected a whole number of at least 1"),
        (lambda p: p.generate(None), "prompt is None, expected a text or a list of messages"),
        (lambda p: p.submit(5), "prompt is 5, expected a text or a list of messages"),
        (lambda p: p.logits(b"x"), "prompt is b'x', expected a text or a list of messages"),
        (lambda p: p.logits("x", adapter=[]), "adapter is [], expected a text"),
        (lambda p: p.generate("x", adapter="a" * 3000), f"no adapter '{'a' * 56}...; loaded: no"),
        (
            lambda p: p.generate("x", max_tokens=10**5000),
            "21 prompt tokens and int that cannot be written new ones make",
        ),
        (lambda p: p.generate("x", logprobs=400), "logprobs is 400, expected at most 324, the si"),
        (lambda p: p.generate("x", logprobs=10**9), "logprobs is 1000000000, expected at most 324"),
        (lambda p: p.generate("x", stop_token_ids=[3, 324]), "stop_token_ids is 324, expected to"),
        (lambda p: p.generate("x", logit_bias={324: 1.0}), "logit_bias for token 324"),
        (
            lambda p: p.generate("x", min_tokens=9, max_tokens=4),
            "min_tokens is 9, expected at most max_tokens, which is 4",
        ),
        (lambda p: p.generate("x", min_tokens=300), "min_tokens is 300, expected at most max_tok"),
    ],
)
def test_requests(pipe: Pipeline, ask: Callable[[Any], object], line: str) -> None:
    with pytest.raises(InputError) as caught:
        ask(pipe)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert not pipe.engine.scheduler.is_busy


def test_the_largest_values_that_are_right(pipe: Pipeline) -> None:
    result = pipe.generate("x", max_tokens=2, min_tokens=2, logprobs=324, stop_token_ids=[323])
    assert len(result.logprobs[0].top_log_probabilities[0]) == 324


def test_the_coldest_temperatures_are_greedy_and_the_narrowest_filters_keep_one(
    pipe: Pipeline,
) -> None:
    greedy = pipe.generate("Hello", max_tokens=4).tokens
    for options in (
        {"temperature": 1e-45}, {"temperature": 1e-320}, {"temperature": 1e-31},
        {"temperature": 1e-29}, {"temperature": 1.0, "top_p": 1e-320},
        {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "min_p": 1.0},
    ):  # fmt: skip
        assert pipe.generate("Hello", max_tokens=4, **options).tokens == greedy, options
    huge = pipe.generate("Hello", max_tokens=3, logit_bias={7: 1e300}, temperature=1.0, top_p=0.5)
    assert huge.tokens == [7, 7, 7]
