"""`load(draft=...)`: a smaller model drafts, and the answers are those that come without it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.engine.draft_model import PAUSE, DraftModel
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.errors import ConfigError, InputError
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.pipeline import collect
from tests.engine.drafting import always_worth, same, together
from tests.engine.driving import fixture_requests
from tests.engine.test_lookup import DRAWN, LONG, OPTIONS, PROMPT
from tests.fixtures_helper import FIXTURES

OWN = FIXTURES / "llama-tied"
PLAIN: dict[str, Any] = {"speculative": "none"}


@pytest.fixture(autouse=True)
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    always_worth(monkeypatch)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    """Drafts by the model itself: all of them are right."""
    with load(OWN, dtype="float32", draft=OWN) as made:
        yield made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Drafts by a model of the same shapes with drawn weights: hardly any is right."""
    folder = tmp_path_factory.mktemp("drawn") / "model"
    shutil.copytree(OWN, folder)
    numbers, weights = np.random.default_rng(0), mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    drawn = {
        n: mx.array(numbers.normal(0, 0.3, w.shape)).astype(w.dtype) for n, w in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), drawn)
    with load(OWN, dtype="float32", draft=folder) as made:
        yield made


def model_of(pipe: Pipeline) -> DraftModel:
    found = pipe.engine.scheduler.draft_model
    assert found is not None
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_all_that_it_drafts_is_right(pipe: Pipeline, name: str) -> None:
    options = LONG | OPTIONS[name]
    plain, drafted = pipe.generate(PROMPT, **options, **PLAIN), pipe.generate(PROMPT, **options)
    same(plain, drafted)
    assert plain.usage.drafted_tokens == 0
    if name != "processors":  # these it is not shown
        assert drafted.usage.accepted_tokens >= 0.9 * drafted.usage.drafted_tokens > 20


@pytest.mark.parametrize("name", ["greedy", "drawn", "penalties"])
def test_what_is_wrong_is_taken_back(other: Pipeline, name: str) -> None:
    options = LONG | OPTIONS[name] | {"max_tokens": 3 * PAUSE}
    plain, drafted = other.generate(PROMPT, **options, **PLAIN), other.generate(PROMPT, **options)
    same(plain, drafted)
    assert drafted.usage.accepted_tokens < 0.2 * drafted.usage.drafted_tokens
    assert drafted.usage.drafted_tokens <= 8 * 7  # then it rests


def test_rows_that_come_and_go(pipe: Pipeline, other: Pipeline) -> None:
    prompts = ["Tell me about it.", "No.", "What do you see here, and why is it so?", "Yes?"]
    asked = [LONG, DRAWN | {"num_draft_tokens": 2}, DRAWN | PLAIN, LONG | {"max_tokens": 9}]
    for own in (pipe, other):
        plain = [own.generate(p, **(o | PLAIN)) for p, o in zip(prompts, asked, strict=True)]
        goes = own.stream(prompts[2], **LONG)
        first = own.submit(prompts[0], **asked[0])
        next(goes)
        goes.close()
        rest = [own.submit(p, **o) for p, o in zip(prompts[1:], asked[1:], strict=True)]
        answers = [collect(handle) for handle in (first, *rest)]
        for one, answer in zip(plain, answers, strict=True):
            same(one, answer)
        assert not own.engine.running
        assert not model_of(own).state.cache.placed
    together(plain[:1], [pipe.generate(prompts[0], **LONG)])


def test_stop_strings_and_lengths(pipe: Pipeline) -> None:
    whole = pipe.generate(PROMPT, **LONG, **PLAIN)
    for stop in (whole.text[3:5], whole.text[9:12]):
        asked: dict[str, Any] = {**LONG, "stop": [stop]}
        same(pipe.generate(PROMPT, **asked, **PLAIN), pipe.generate(PROMPT, **asked))
    for length in range(1, 12):
        answer = pipe.generate(PROMPT, max_tokens=length, ignore_eos=True)
        assert (answer.tokens, answer.finish_reason) == (whole.tokens[:length], "length")


def test_a_long_prompt_is_read_in_slices_and_its_beginning_once(pipe: Pipeline) -> None:
    small = EngineConfig(prefill_chunk=16, running_chunk=8)
    with load(OWN, dtype="float32", draft=OWN, engine=small) as own:
        prompt, model = "and so it went on and on, " * 8, model_of(own)
        plain = own.generate(prompt, **LONG, **PLAIN)
        drafted = own.generate(prompt, **LONG)
        same(plain, drafted)
        assert model.slices >= len(own.encode(prompt).input_ids) // 16
        assert drafted.usage.accepted_tokens > 5
        before = model.slices
        same(plain, own.generate(prompt, **LONG))
        assert model.slices == before
        assert model.state.stats.cached_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["other", "pipe"])
def test_the_distribution_is_kept(draft: str, request: pytest.FixtureRequest) -> None:
    own: Pipeline = request.getfixturevalue(draft)
    asked: dict[str, Any] = {"temperature": 1.0, "top_k": 2, "max_tokens": 3, "ignore_eos": True}
    expected = chances(own, asked["max_tokens"])
    draws, counts = 400, dict.fromkeys(expected, 0)
    for begin in range(0, draws, 8):
        seeds = range(begin, begin + 8)
        answers = own.generate_batch([{"prompt": PROMPT, "seed": s, **asked} for s in seeds])
        for answer in answers:
            counts[tuple(answer.tokens)] += 1
    statistic = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in expected.items())
    assert statistic < 24.3  # chi-square of 7 degrees of freedom at 0.001


def chances(own: Pipeline, count: int) -> dict[tuple[int, ...], float]:
    """The probability of each answer of so many tokens, two at each place, by the logits alone."""
    found: dict[tuple[int, ...], float] = {}
    prompt = own.encode(PROMPT)
    ids = list(prompt.input_ids)
    for places in itertools.product(range(2), repeat=count):
        chance, tokens = 1.0, list[int]()
        for place in places:
            prompt.input_ids[:] = ids + tokens
            last = own.logits(prompt)[-1]
            best = np.argsort(-last, kind="stable")[:2]
            share = 1 / (1 + np.exp(last[best[1]] - last[best[0]]))
            chance *= share if place == 0 else 1 - share
            tokens.append(int(best[place]))
        found[tuple(tokens)] = float(chance)
    prompt.input_ids[:] = ids
    return found


@pytest.mark.parametrize("name", ["idefics3", "qwen25vl"])
def test_pictures_are_left_out(name: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True}
    with load(FIXTURES / name, dtype="float32", draft=FIXTURES / name) as own:
        requests = fixture_requests(FIXTURES / name)
        plain = [own.generate(**r, **asked, **PLAIN) for r in requests.values()]
        handles = [own.submit(**r, **asked) for r in requests.values()]
        drafted = [collect(handle) for handle in handles]
        assert any(answer.usage.image_tokens for answer in drafted)
        together(plain, drafted)


def test_its_memory_is_in_the_plan(pipe: Pipeline) -> None:
    with load(OWN, dtype="float32") as alone:
        assert pipe.engine.weight_bytes == 2 * alone.engine.weight_bytes
        assert pipe.plan(PROMPT).kv_bytes == 2 * alone.plan(PROMPT).kv_bytes
        assert pipe.plan(PROMPT, **PLAIN).kv_bytes == alone.plan(PROMPT).kv_bytes
        assert pipe.engine.config.kv_bytes < alone.engine.config.kv_bytes


def test_a_draft_model_that_fails_is_a_warning(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipe.generate(PROMPT, **LONG, **PLAIN)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(DraftModel, "_run", fail)
        with pytest.warns(RuntimeWarning, match="nothing is drafted: no room"):
            same(plain, pipe.generate(PROMPT, **LONG))
    again = pipe.generate(PROMPT, **LONG)
    same(plain, again)
    assert again.usage.accepted_tokens > 5


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(OWN, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 399, "content": "<x>"})
    path.write_text(json.dumps(tokenizer))
    message = (
        r"^draft model renamed: \d+ tokens are not those of llama-tied, first .*: number \d+ there,"
        r" (none|number \d+) here; a draft model needs the same tokenizer$"
    )
    with pytest.raises(ConfigError, match=message):
        load(OWN, draft=folder)


def test_without_one_nothing_can_be_drafted() -> None:
    with load(BUNDLED) as alone, pytest.raises(InputError, match="no draft model is loaded"):
        alone.generate(PROMPT, speculative="draft")
    with pytest.raises(InputError, match=r"^draft is 5, expected a folder, a hub id or None$"):
        load(BUNDLED, draft=5)  # pyright: ignore[reportArgumentType]
