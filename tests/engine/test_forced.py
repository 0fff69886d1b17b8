"""Tokens that the form of an answer forces are run together, and change nothing of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.engine.worth import Worth
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.grammar import Thought
from tests.engine.drafting import always_worth, same

pytest.importorskip("llguidance")
NAMES = ("customer_identification_number", "shipping_address_line_one", "is_express_delivery")
KINDS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"enum": ["here", "there"]},
    {"type": "boolean"},
]
SCHEMA = {
    "type": "object",
    "properties": dict(zip(NAMES, KINDS, strict=True)),
    "required": list(NAMES),
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {"schema": SCHEMA, "max_tokens": 200, "temperature": 1.0, "seed": 4}
NONE: dict[str, Any] = {"speculative": "none"}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load(dtype="float32") as made:
        yield made


def steps(pipe: Pipeline, **options: Any) -> tuple[int, Any]:
    before = pipe.engine.stats.decode_steps
    answer = pipe.generate("An order, please.", **options)
    return pipe.engine.stats.decode_steps - before, answer


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.9, "logprobs": 2}])
def test_long_keys_take_few_steps(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    always_worth(monkeypatch)
    one_by_one, plain = steps(pipe, **(ASKED | options), **NONE)
    together, forced = steps(pipe, **(ASKED | options))
    same(plain, forced)
    assert plain.usage.drafted_tokens == 0
    assert forced.usage.accepted_tokens == forced.usage.drafted_tokens > 50
    assert together <= one_by_one - 0.8 * forced.usage.accepted_tokens


def test_beside_rows_without_a_form(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    always_worth(monkeypatch)
    free: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    asked: list[Any] = [
        {"prompt": "An order.", **ASKED},
        {"prompt": "Tell me.", **free},
        {"prompt": "Say it again: red, blue, red, blue", **free, "speculative": "lookup"},
        {"prompt": "Another.", **ASKED, "seed": 9, "speculative": "lookup"},
    ]
    plain = [pipe.generate_batch([{**request, **NONE}])[0] for request in asked]
    for one, other in zip(plain, pipe.generate_batch(asked), strict=True):
        same(one, other)


def test_they_are_not_run_where_that_takes_longer(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worth, "gain", lambda *_: 0.0)
    _, plain = steps(pipe, **ASKED, **NONE)
    _, answer = steps(pipe, **ASKED)
    same(plain, answer)
    assert answer.usage.drafted_tokens == 0


def test_nothing_is_forced_while_an_answer_thinks_or_may_begin_to(pipe: Pipeline) -> None:
    form = pipe.grammars.compile("regex", "yes, of course")
    ahead = form.start().forced()
    assert "".join(pipe.tokenizer.decode([token]) for token in ahead) == "yes, of course"
    close, ends = 5, [2]
    thinking = Thought(None, close, None, form.start(), ends=ends, vocab_size=pipe.model.vocab_size)
    assert thinking.forced() == []
    thinking.accept(close)
    assert thinking.forced() == ahead
    may_think = Thought(4, close, None, form.start(), ends=ends, vocab_size=pipe.model.vocab_size)
    assert may_think.forced() == []
    may_think.accept(ahead[0])
    assert may_think.forced() == ahead[1:]


def test_what_the_options_forbid_still_ends_that_request(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_worth(monkeypatch)
    token = pipe.tokenizer.encode("customer", add_special_tokens=False)[1]
    with pytest.raises(InputError, match="leave these out"):
        pipe.generate("An order.", **ASKED, logit_bias={token: -float("inf")})
    assert not pipe.engine.running
