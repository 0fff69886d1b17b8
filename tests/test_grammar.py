"""Answers that must have a form, alone and beside others."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.errors import ConfigError, InputError
from mlx_vlm_pipes.grammar import MOST_KEPT, Grammar, Grammars
from mlx_vlm_pipes.pipeline import Pipeline

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer"}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
ASKED = "Describe a circle."


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load() as pipe:
        yield pipe


def test_drawn_answers_keep_their_form(pipe: Pipeline) -> None:
    drawn = pipe.generate_n(ASKED, 12, schema=SCHEMA, temperature=1.5, seed=1)
    whole = [answer for answer in drawn if answer.finish_reason == "stop"]  # others were cut off
    assert len(whole) >= 6
    for answer in whole:
        value = json.loads(answer.text)
        assert value["colour"] in ("red", "blue")
        assert isinstance(value["size"], int)
    for answer in pipe.generate_n(ASKED, 8, regex="(yes|no) [0-9]{3}", temperature=2.0, seed=1):
        assert re.fullmatch("(yes|no) [0-9]{3}", answer.text)
    lark = 'start: "a" ("b" | "c")+ "d"'
    for answer in pipe.generate_n(ASKED, 8, grammar=lark, temperature=2.0, seed=1):
        assert re.fullmatch("a[bc]+d?", answer.text)
        assert answer.text.endswith("d") == (answer.finish_reason == "stop")


def test_a_form_is_compiled_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = Grammars._made

    def counted(self: Grammars, name: str, written: str) -> Grammar:
        made.append(written)
        return original(self, name, written)

    monkeypatch.setattr(Grammars, "_made", counted)
    pipe.generate_n(ASKED, 3, regex="[0-9]{2}", max_tokens=4)
    pipe.generate(ASKED, regex="[0-9]{2}", max_tokens=4)
    assert made == ["[0-9]{2}"]
    for i in range(MOST_KEPT):
        pipe.grammars.compile("regex", f"a{{{i + 1}}}")
    pipe.grammars.compile("regex", "[0-9]{2}")
    assert made.count("[0-9]{2}") == 2


def test_rows_of_a_batch_keep_what_they_get_alone(pipe: Pipeline) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "Who are you?", "temperature": 1.0, "seed": 5},
        {"prompt": ASKED, "schema": SCHEMA, "temperature": 1.0, "seed": 1},
        {"prompt": "Name a colour."},
        {"prompt": ASKED, "regex": "[ab]{4}", "repetition_penalty": 1.3},
        {"prompt": ASKED, "regex": "x+", "top_p": 0.5, "temperature": 1.0, "seed": 2,
         "max_tokens": 30},
    ]  # fmt: skip
    requests = [{"max_tokens": 40, **request} for request in requests]
    together = pipe.generate_batch(requests)  # pyright: ignore[reportArgumentType]
    for request, result in zip(requests, together, strict=True):
        options = {k: v for k, v in request.items() if k != "prompt"}
        assert result.tokens == pipe.generate(request["prompt"], **options).tokens


def test_a_form_that_is_over_ends_the_answer(pipe: Pipeline) -> None:
    result = pipe.generate(ASKED, regex="ab", logprobs=1)
    assert (result.text, result.finish_reason) == ("ab", "stop")
    assert len(result.logprobs) == len(result.tokens)
    assert "".join(chunk.text for chunk in pipe.stream(ASKED, regex="ab")) == "ab"


def test_a_number_alone_may_end_its_line(pipe: Pipeline) -> None:
    """A model that wants a line's end after its number would go on with digits for ever."""
    newline, digit = pipe.tokenizer.encode("\n1", add_special_tokens=False)
    for schema in ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"type": "integer"}):
        row = pipe.grammars.make({"schema": {**schema, "x-guidance": 5}}).start()
        assert not is_allowed(row, newline)
        row.accept(digit)
        assert is_allowed(row, newline)
        row.accept(newline)
        assert not is_allowed(row, digit)
        assert not is_allowed(row, newline)
    row = pipe.grammars.make({"schema": {"enum": [1, 2]}}).start()
    row.accept(digit)
    assert not is_allowed(row, newline)


def is_allowed(row: Any, token: int) -> bool:
    return bool(row.allowed()[token // 32] >> (token % 32) & 1)


def test_processors_cannot_bring_back_what_does_not_fit(pipe: Pipeline) -> None:
    def lift(tokens: Any, logits: Any) -> Any:
        return logits * 0 + 5

    result = pipe.generate(ASKED, regex="[0-9]{5}", logits_processors=[lift])
    assert re.fullmatch("[0-9]{5}", result.text)


def test_a_contradiction_fails_that_row_alone(pipe: Pipeline) -> None:
    a = pipe.tokenizer.require_token_id("a")
    for more in ({"min_tokens": 9}, {"logit_bias": {a: -float("inf")}}):
        bad = pipe.submit(ASKED, regex="a", **more)
        good = pipe.submit(ASKED, regex="(yes|no)")
        assert "".join(chunk.text for chunk in good) in ("yes", "no")
        with pytest.raises(InputError, match="min_tokens or logit_bias forbid"):
            list(bad)


WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"schema": {"type": "frog"}}, "schema: Invalid type: frog"),
    ({"schema": 5}, "a JSON schema or a pydantic class"),
    ({"schema": int}, "a JSON schema or a pydantic class"),
    ({"regex": "(a"}, "invalid regex"),
    ({"grammar": "start: x"}, "unknown name"),
    ({"regex": "a", "grammar": "b"}, "give one of them"),
    ({"regex": "a", "ignore_eos": True}, "ends with the form"),
    ({"regex": "a" * 70_000}, "regex has 70000 characters"),
    ({"regex": r"[^\s\S]"}, "no answer can have this form"),
    ({"schema": WIDE}, "form cannot be kept: Parser Error"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_a_mistake_is_one_line(pipe: Pipeline, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        pipe.generate(ASKED, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_may_know_its_schema(pipe: Pipeline) -> None:
    class Circle:
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return SCHEMA

    assert pipe.generate(ASKED, schema=Circle).text == pipe.generate(ASKED, schema=SCHEMA).text


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with load() as pipe, pytest.raises(ConfigError, match=r"mlx-vlm-pipes\[structured\]"):
        pipe.generate(ASKED, regex="a")


def test_reasoning_comes_before_the_form_and_ends_in_time(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the vocabulary is made to mean </think>: the bundled model has none."""
    end = pipe.tokenizer.require_token_id("<end_of_utterance>")
    ids = {"</think>": pipe.tokenizer.require_token_id("!")}
    monkeypatch.setattr(pipe.tokenizer, "token_id", ids.get)
    asked: dict[str, Any] = {"raw": True, "max_tokens": 40, "temperature": 1.0, "seed": 4}
    for budget in (0, 3):
        result = pipe.generate("Q: <think>", regex="[ab]{3}", thinking_budget=budget, **asked)
        thought, told = result.tokens[:budget], result.tokens[budget + 1 :]
        assert len(thought) == budget
        assert result.tokens[budget] == ids["</think>"]
        assert re.fullmatch("[ab]{3}", pipe.tokenizer.decode(told))
        assert told[-1] == end
    ids.clear()
    with pytest.raises(InputError, match="thinking_budget: this tokenizer has no </think>"):
        pipe.generate("Q", thinking_budget=3)
