"""The bars of the project: ids, pixels, logits and greedy tokens are those of transformers.

Every fixture folder carries what transformers computed on it in float32 (tools/make_fixtures).
Where two readings of "right" are in use, ours is the `_alt` set (positions after a clip).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes import Pipeline, load
from tests.device import TOLERANCES, bar, same_best
from tests.fixtures_helper import FIXTURES, SAME_PILLOW, arguments, cases, reference

LOGITS_BAR = bar(2e-5)  # of the largest logit; the promise is 2e-3
PIXELS_BAR = 1e-5  # the promise is 1e-2


@pytest.fixture(scope="module", params=cases(), ids=lambda path: path.name)
def checkpoint(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Pipeline]]:
    pipe = load(request.param, dtype="float32")
    yield request.param, pipe
    pipe.close()


def comparable(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompts whose stored numbers hold for the installed Pillow."""
    prompts = facts["prompts"]
    return [p for p in prompts if SAME_PILLOW or not (p["images"] or p["videos"])]


def wanted(arrays: Any, prompt: str, name: str) -> Any:
    """A stored array; after clips the alternative reading of positions."""
    other = f"{prompt}/position_ids_alt" in arrays.files and name in ("logits", "greedy")
    return arrays[f"{prompt}/{name}{'_alt' if other else ''}"]


def test_every_prompt_equals_transformers(checkpoint: tuple[Path, Pipeline]) -> None:
    folder, pipe = checkpoint
    facts, arrays = reference(folder)
    for fact in comparable(facts):
        request = arguments(folder, fact)
        encoded = pipe.encode(**request)
        name = fact["name"]
        assert encoded.input_ids == arrays[f"{name}/input_ids"].tolist(), name
        for key in ("pixel_values", "pixel_values_videos"):
            if f"{name}/{key}" in arrays.files:
                got, want = getattr(encoded, key), arrays[f"{name}/{key}"]
                assert got.shape == want.shape, name
                assert np.abs(got - want).max() < PIXELS_BAR, name
        logits, want = pipe.logits(**request), wanted(arrays, name, "logits")
        assert logits.shape == want.shape
        assert np.abs(logits - want).max() < LOGITS_BAR * np.abs(want).max(), name
        assert same_best(logits, want), name
        greedy = wanted(arrays, name, "greedy").tolist()
        answer = pipe.generate(**request, max_tokens=facts["max_new"])
        assert answer.tokens == greedy or not TOLERANCES.same_tokens, name


def test_a_batch_gives_the_same_answers(checkpoint: tuple[Path, Pipeline]) -> None:
    folder, pipe = checkpoint
    facts, arrays = reference(folder)
    pipe.engine.forget()
    requests = []
    for fact in comparable(facts):
        request = arguments(folder, fact)
        if not fact["raw"]:
            request["messages"] = request.pop("prompt")
        requests.append(request)
    answers = pipe.generate_batch(requests, max_tokens=facts["max_new"])
    for fact, answer in zip(comparable(facts), answers, strict=True):
        greedy = wanted(arrays, fact["name"], "greedy").tolist()
        assert answer.tokens == greedy or not TOLERANCES.same_tokens, fact["name"]


@pytest.mark.reference
@pytest.mark.slow
def test_fixtures_are_still_what_transformers_computes(tmp_path: Path) -> None:
    """One case of each family is made anew with the installed torch and transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tools.make_fixtures.__main__ import main

    names = ["llama-tied", "idefics3", "pixtral", "internvl-qwen2", "qwen2vl", "qwen25vl"]
    names.append("qwen3vl")
    main([str(tmp_path), "--only", *names])
    for folder in [tmp_path / name for name in names]:
        facts, arrays = reference(folder)
        pipe = load(folder, dtype="float32")
        for fact in facts["prompts"]:
            got = pipe.logits(**arguments(folder, fact))
            want = wanted(arrays, fact["name"], "logits")
            assert np.abs(got - want).max() < LOGITS_BAR * np.abs(want).max()
        pipe.close()


@pytest.mark.reference
@pytest.mark.parametrize("name", ["internvl-llama", "internvl-qwen2", "smolvlm"])
def test_a_clip_equals_transformers(name: str) -> None:
    """Ids and frames from this package's processor: transformers' needs torchvision for clips."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, noise = FIXTURES / name, np.random.default_rng(1)
    clip = [noise.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(5)]
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    prompt = [{"role": "user", "content": content}]
    pipe = load(folder, dtype="float32")
    encoded = pipe.encode(prompt, videos=[clip])
    logits = pipe.logits(prompt, videos=[clip])
    pipe.close()
    names = ("pixel_values", "pixel_attention_mask")
    media = {n: torch.tensor(a) for n, a in encoded.hf_arrays.items() if n in names}
    assert media["pixel_values"].shape[-4] == 5
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = model.eval()(input_ids=torch.tensor([encoded.input_ids]), **media).logits[0].numpy()
    assert np.abs(logits - want).max() < LOGITS_BAR * np.abs(want).max()
    assert same_best(logits, want)
