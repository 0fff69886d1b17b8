"""`speculative="lookup"`: tokens that are drafted are those that come without drafts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import GenerationResult, Pipeline, load
from mlx_vlm_pipes.engine.drafts import MOST
from mlx_vlm_pipes.engine.lookup import Lookup, propose
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.pipeline import collect
from tests.engine.drafting import always_worth, checked, draft_from, together
from tests.fixtures_helper import FIXTURES
from tests.nn.test_lora import BASE, write_adapter

LOOKUP: dict[str, Any] = {"speculative": "lookup"}
PROMPT = "Tell me about it."
LONG: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
DRAWN: dict[str, Any] = {**LONG, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load(FIXTURES / "llama-tied", dtype="float32") as made:
        yield made


def whole(pipe: Pipeline, prompt: str, answer: GenerationResult) -> list[int]:
    return [*pipe.encode(prompt).input_ids, *answer.tokens]


@pytest.mark.parametrize(
    ("tokens", "drafted"),
    [
        ([1, 2, 3, 4, 9, 2, 3, 4], [9, 2, 3]),  # three tokens before two
        ([7, 4, 5, 6, 4, 8, 4], [8, 4, 8]),  # one, the latest place; what repeats goes on
        ([3, 4, 8, 1, 9, 4], [8, 1, 9]),
        ([1, 2, 3], []),
        ([5], []),
        ([5, 5], [5, 5, 5]),
    ],
)
def test_what_followed_before_is_proposed(tokens: list[int], drafted: list[int]) -> None:
    assert propose(np.array(tokens, np.int64), 3) == drafted


def test_a_row_drafts_only_while_enough_is_kept() -> None:
    lookup, tokens = Lookup(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    lookup.watch(np.array(tokens))
    for token in (2, 3, 4):
        assert not lookup.is_on
        tokens.append(token)
        lookup.watch(np.array(tokens))
    assert lookup.is_on
    assert lookup.draft(np.array(tokens), 99) == [5, 6, 7, 8, 9, 1, 2]
    assert len(lookup.draft(np.array(tokens), 3)) == 3
    lookup.note(0, 7)
    assert not lookup.is_on


def ban_even(tokens: mx.array, logits: mx.array) -> mx.array:
    """A processor that reads the tokens it is shown."""
    banned = mx.arange(logits.shape[-1]) % 5 == tokens[-1] % 5
    return mx.where(banned, -mx.inf, logits)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": DRAWN,
    "filters": {**DRAWN, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {
        **DRAWN,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "greedy penalties": {"repetition_penalty": 1.5},
    "bias": {"logit_bias": {5: 3.0, 7: -float("inf")}},
    "processors": {**DRAWN, "logits_processors": [ban_even]},
    "scores": {"logprobs": 3, "prompt_logprobs": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_tokens_with_any_option(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = LONG | OPTIONS[name]
    plain = pipe.generate(PROMPT, **options)
    draft_from(monkeypatch, [whole(pipe, PROMPT, plain)])
    drafted = pipe.generate(PROMPT, **options, **LOOKUP)
    checked(plain, drafted)
    for a, b in zip(plain.logprobs or [], drafted.logprobs or [], strict=True):
        assert a.token_log_probabilities == pytest.approx(b.token_log_probabilities, abs=1e-4)


@pytest.mark.parametrize("length", range(1, 12))
def test_no_token_more_than_asked_for(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    plain = pipe.generate(PROMPT, **LONG)
    draft_from(monkeypatch, [whole(pipe, PROMPT, plain)], wrong_each=99)
    drafted = pipe.generate(PROMPT, max_tokens=length, ignore_eos=True, **LOOKUP)
    assert (drafted.tokens, drafted.finish_reason) == (plain.tokens[:length], "length")
    assert drafted.usage.accepted_tokens <= max(0, length - 2)


def test_an_answer_that_ends_inside_a_draft_leaves_a_sound_prefix(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipe.generate(PROMPT, **LONG)
    ends = next(t for i, t in enumerate(plain.tokens) if i > 3 and t not in plain.tokens[:i])
    asked: dict[str, Any] = {"stop_token_ids": [ends], "max_tokens": 30}
    short = pipe.generate(PROMPT, **asked)
    draft_from(monkeypatch, [whole(pipe, PROMPT, plain)], wrong_each=99)
    pipe.engine.forget()
    drafted = pipe.generate(PROMPT, **asked, **LOOKUP)
    assert (drafted.tokens, drafted.finish_reason) == (short.tokens, "stop")
    again = whole(pipe, PROMPT, plain)
    prefixes = pipe.engine.scheduler.state.prefixes
    length, _ = pipe.engine.worker.call(lambda: prefixes.match(np.array(again, np.int64)))
    assert length >= len(again) - len(plain.tokens) + len(short.tokens) - 1
    monkeypatch.undo()
    assert pipe.generate(PROMPT, **LONG).tokens == plain.tokens  # from that prefix


def test_beside_rows_that_do_not_speculate(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["Tell me about it.", "No.", "What do you see here, and why is it so?", "Yes?"]
    asked = [LONG, DRAWN, DRAWN | {"repetition_penalty": 1.2}, LONG | {"max_tokens": 9}]
    plain = [pipe.generate(p, **o) for p, o in zip(prompts, asked, strict=True)]
    draft_from(monkeypatch, [whole(pipe, p, a) for p, a in zip(prompts, plain, strict=True)])
    for speculating in ((0,), (0, 2), (1, 2, 3), (0, 1, 2, 3)):
        handles = [
            pipe.submit(p, **o, **(LOOKUP if i in speculating else {}))
            for i, (p, o) in enumerate(zip(prompts, asked, strict=True))
        ]
        answers = [collect(handle) for handle in handles]
        assert [a.tokens for a in answers] == [a.tokens for a in plain]
        assert any(answers[i].usage.accepted_tokens for i in speculating)
        assert not any(
            a.usage.drafted_tokens for i, a in enumerate(answers) if i not in speculating
        )


def test_one_of_them_goes_away(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pipe.generate(PROMPT, **LONG)
    draft_from(monkeypatch, [whole(pipe, PROMPT, plain)])
    goes = pipe.stream("No.", **LONG, **LOOKUP)
    stays = [pipe.submit(PROMPT, **LONG, **LOOKUP) for _ in range(2)]
    next(goes)
    goes.close()
    assert [collect(handle).tokens for handle in stays] == [plain.tokens] * 2
    assert not pipe.engine.running


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_cache(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    with load(BUNDLED, kv_bits=bits, dtype="float32") as pipe:
        plain = pipe.generate(PROMPT, **LONG)
        draft_from(monkeypatch, [whole(pipe, PROMPT, plain)])
        checked(plain, pipe.generate(PROMPT, **LONG, **LOOKUP))


def test_with_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "adapter", 4, 1, ["self_attn.q_proj", "mlp.down_proj"])
    with load(BASE, adapter=folder, dtype="float32") as pipe:
        names = [pipe.model.adapters[0], "base"]
        plain = [pipe.generate(PROMPT, adapter=name, **LONG) for name in names]
        assert plain[0].tokens != plain[1].tokens
        draft_from(monkeypatch, [whole(pipe, PROMPT, answer) for answer in plain])
        handles = [pipe.submit(PROMPT, adapter=name, **LONG, **LOOKUP) for name in names]
        drafted = [collect(handle) for handle in handles]
        together(plain, drafted)


def test_an_answer_of_a_form_and_n_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    with load() as pipe:
        asked: dict[str, Any] = {"regex": "[0-9]{3}( (red|blue) [0-9]{2}){4}", "max_tokens": 60}
        asked |= {"temperature": 1.0, "seed": 3}
        plain = pipe.generate_n(PROMPT, 3, **asked)
        draft_from(monkeypatch, [whole(pipe, PROMPT, answer) for answer in plain])
        together(plain, pipe.generate_n(PROMPT, 3, **asked, **LOOKUP))


def test_what_repeats_itself_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    always_worth(monkeypatch)
    prompt = "red circle, blue square, red circle, blue square, red circle, blue"
    with load() as pipe:
        asked: dict[str, Any] = {"max_tokens": 120, "ignore_eos": True, "raw": True}
        plain = pipe.generate(prompt, **asked)
        before = pipe.engine.stats.decode_steps
        drafted = pipe.generate(prompt, **asked, **LOOKUP)
        steps = pipe.engine.stats.decode_steps - before
        assert drafted.tokens == plain.tokens
        assert steps + drafted.usage.accepted_tokens in (len(plain.tokens) - 1, len(plain.tokens))
        assert steps < 60


def test_drafts_that_fail_are_given_up(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pipe.generate(PROMPT, **LONG)
    monkeypatch.setattr("mlx_vlm_pipes.engine.lookup.propose", lambda tokens, count: [3] * count)
    monkeypatch.setattr(Lookup, "__init__", _confident)
    always_worth(monkeypatch)
    drafted = pipe.generate(PROMPT, **LONG, **LOOKUP)
    assert drafted.tokens == plain.tokens
    assert 0 < drafted.usage.drafted_tokens <= 3 * MOST


def _confident(self: Lookup, most: int | None = None) -> None:
    super(Lookup, self).__init__(most, share=1.0)
    self._right, self._guess = 0, []


@pytest.mark.parametrize("value", ["drafts", "", 5, True])
def test_another_value_is_one_line(pipe: Pipeline, value: Any) -> None:
    with pytest.raises(
        InputError, match=r"^speculative is .*, expected 'lookup' or 'draft' or 'none'$"
    ):
        pipe.generate(PROMPT, speculative=value)
