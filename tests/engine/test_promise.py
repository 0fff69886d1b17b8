"""The promise: how a request is run never changes its answer. All architectures, float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes import GenerationResult, Pipeline, load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.engine.state import EngineConfig
from tests.device import bar
from tests.engine.drafting import draft_from, together
from tests.engine.driving import FAMILIES, fixture_requests
from tests.fixtures_helper import FIXTURES

LENGTH, BAR = 24, bar(1e-4)  # tokens; largest difference of a log-probability or logit
Answers = dict[str, GenerationResult]
ASKED: dict[str, Any] = {"max_tokens": LENGTH, "ignore_eos": True, "logprobs": 5}


class Family:
    """One checkpoint: its prompts, and what each answers alone, cold, in one slice, compiled."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.folder = folder or FIXTURES / name
        self.pipe = load(self.folder, dtype="float32")
        self.requests = fixture_requests(FIXTURES / name)
        self.configure(enable_prefix_caching=False)
        self.alone = self.one_by_one()
        self.logits = {name: self.pipe.logits(**r) for name, r in self.requests.items()}

    def configure(self, **limits: Any) -> None:
        """Other limits, empty caches."""
        self.pipe.engine.forget()
        state = self.pipe.engine.scheduler.state
        state.config = replace(EngineConfig(), **limits)

    def one_by_one(self, pipe: Pipeline | None = None) -> Answers:
        pipe = pipe or self.pipe
        return {name: pipe.generate(**r, **ASKED) for name, r in self.requests.items()}

    def together(self, names: list[str]) -> Answers:
        """The named prompts in one batch, submitted in this order."""
        handles = [self.pipe.submit(**self.requests[name], **ASKED) for name in names]
        return {name: collect(handle) for name, handle in zip(names, handles, strict=True)}

    def check(self, answers: Answers) -> None:
        for name, answer in answers.items():
            expected = self.alone[name]
            assert answer.tokens == expected.tokens, name
            assert difference(answer, expected) < BAR, name


def collect(handle: Any) -> GenerationResult:
    from mlx_vlm_pipes.pipeline import collect as read

    return read(handle)


def difference(a: GenerationResult, b: GenerationResult) -> float:
    """The largest difference between the log-probabilities of two equal answers."""
    assert a.logprobs is not None
    assert b.logprobs is not None
    gaps = [
        abs(x.token_log_probabilities[0] - y.token_log_probabilities[0])
        for x, y in zip(a.logprobs, b.logprobs, strict=True)
    ]
    return max(gaps)


# all architectures, the two kinds of cache that look at a row's length, and packed weights
PACKED = "qwen25vl-v5"


@pytest.fixture(scope="module", params=[*FAMILIES, "mistral-window", "phi3-longrope", PACKED])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    folder = None
    if request.param == PACKED:
        folder = tmp_path_factory.mktemp("packed") / "model"
        source = FIXTURES / request.param
        convert(ConvertOptions(model=source, out=folder, bits=4, group_size=32, measure=False))
    made = Family(request.param, folder)
    yield made
    made.pipe.close()


def test_any_mix_in_a_batch_is_as_alone(family: Family) -> None:
    names = list(family.requests)
    for mix in (names, names[::-1], names[:2] * 3):
        family.configure(enable_prefix_caching=False)
        family.check(family.together(mix))
    stats = family.pipe.engine.stats
    assert 0 < stats.traces <= stats.buckets


def test_a_warm_prefix_is_as_a_cold_one(family: Family) -> None:
    family.configure()
    family.check(family.one_by_one())
    warm = family.one_by_one()
    family.check(warm)
    if family.pipe.model.cache_break_length is None:  # a crossed row is no prefix of a short one
        assert all(a.usage.cached_tokens == a.usage.prompt_tokens - 1 for a in warm.values())
    assert all(a.usage.images_encoded == 0 for a in warm.values())


@pytest.mark.parametrize("size", [1, 7, 64])
def test_any_prefill_slice_is_as_the_whole(family: Family, size: int) -> None:
    family.configure(prefill_chunk=size, running_chunk=size, enable_prefix_caching=False)
    names = [n for n, a in family.alone.items() if a.usage.prompt_tokens <= 100 or size > 1]
    family.check(family.together(names))
    for name in names:
        request = family.requests[name]
        assert np.abs(family.pipe.logits(**request) - family.logits[name]).max() < BAR


def test_compiled_is_as_eager(family: Family) -> None:
    eager = load(family.folder, dtype="float32", compile=False)
    try:
        family.check(family.one_by_one(eager))
        assert eager.engine.stats.traces == 0
    finally:
        eager.close()


def test_a_cancelled_neighbour_changes_nothing(family: Family) -> None:
    family.configure()
    first, *_ = names = list(family.requests)
    goes = family.pipe.stream(**family.requests[names[-1]], **ASKED)
    stays = [family.pipe.submit(**family.requests[name], **ASKED) for name in (first, names[-1])]
    assert len(list(islice(goes, 3))) == 3
    del goes
    family.check({name: collect(h) for name, h in zip((first, names[-1]), stays, strict=True)})


def test_drafted_tokens_are_as_plain(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    family.configure(enable_prefix_caching=False)
    prompts = {name: family.pipe.encode(**r).input_ids for name, r in family.requests.items()}
    draft_from(monkeypatch, [[*prompts[n], *family.alone[n].tokens] for n in prompts])
    monkeypatch.setitem(ASKED, "speculative", "lookup")
    answers = family.together(list(family.requests)[:3])
    family.check(answers)
    together([family.alone[name] for name in answers], list(answers.values()))
