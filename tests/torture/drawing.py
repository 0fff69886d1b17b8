"""What several sections share: processors and pipelines of fixtures, drawn requests, answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlx_vlm_pipes import GenerationResult, Pipeline, load
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.processing.base import TextProcessor
from mlx_vlm_pipes.registry import find_room
from tests.fixtures_helper import FIXTURES
from tests.torture.pictures import draw_picture
from tests.torture.section import Section, require

TEXT = ("llama-tied", "mistral-window", "phi3-longrope")
VISION = (
    "idefics3", "pixtral", "internvl-qwen2", "qwen2vl", "qwen25vl", "qwen3vl", "smolvlm",
)  # fmt: skip
WITH_CLIPS = ("smolvlm", "internvl-qwen2", "qwen2vl", "qwen25vl", "qwen3vl")
FAMILIES = (*TEXT, *VISION)
EXAMPLES = FIXTURES.parent.parent / "examples" / "models"
TRAINED = {  # with heads that are wide enough for a quantised cache
    "tiny-idefics3": BUNDLED, "tiny-internvl": EXAMPLES / "tiny-internvl",
    "tiny-pixtral": EXAMPLES / "tiny-pixtral", "tiny-qwen2_5vl": EXAMPLES / "tiny-qwen2_5vl",
}  # fmt: skip
WORDS = ["river", "What", "is", "it?", "The", "letter", "128", "naïve", "東京", "🙂", "don't", "\n",
         "blue", "two  spaces", "é", "a", "of", "picture", "describe"]  # fmt: skip
SHARED = ["You are asked about pictures. Answer in few words. " * 3, "Once upon a time " * 6]
NOISE = 1e-4  # in a log-probability: what float32 sums in another order differ by at most
Request = dict[str, Any]


def open_processor(folder: Path) -> TextProcessor:
    """A checkpoint's processor alone."""
    config = read_config(folder)
    return find_room(config).processor_class()(folder, config.to_dict())


class Pipelines:
    """Fixtures and trained models, float32 unless told otherwise, each loaded once."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], Pipeline] = {}

    def get(self, family: str, **options: Any) -> Pipeline:
        key = (family, repr(sorted(options.items())))
        if key not in self._open:
            folder = TRAINED.get(family, FIXTURES / family)
            self._open[key] = load(folder, **{"dtype": "float32", **options})
        return self._open[key]

    def close(self) -> None:
        for pipe in self._open.values():
            pipe.close()
        self._open.clear()


class PipelineSection(Section):
    """A section whose cases share pipelines."""

    small: ClassVar[int] = 5
    limit_s: ClassVar[float] = 120.0

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed, folder)
        self._pipes = Pipelines()

    def close(self) -> None:
        self._pipes.close()


def configure(pipe: Pipeline, **limits: Any) -> None:
    """Empty caches, and other limits, while nothing runs."""
    pipe.engine.forget()
    pipe.engine.scheduler.state.config = replace(EngineConfig(), **limits)


def draw_limits(rng: random.Random) -> dict[str, Any]:
    """Limits that change how requests are cut, batched and kept."""
    chunk = rng.choice([1, 5, 16, 33, 200, 2048])
    return {
        "max_batch_size": rng.choice([1, 2, 3, 5, 16]),
        "prefill_chunk": chunk,
        "running_chunk": rng.choice([1, 7, 16, 64, 512]),
        "running_wait_ms": rng.choice([0.1, 5.0, 250.0]),
        "image_batch": rng.choice([1, 2, 4]),
        "enable_prefix_caching": rng.random() < 0.7,
        "prefix_bytes": rng.choice([0, 20_000, 200_000, 1 << 30]),
        "image_bytes": rng.choice([0, 20_000, 256 << 20]),
        "overlap_bytes": rng.choice([0, 8 << 20]),
    }


def draw_request(rng: random.Random, family: str, *, longest: int = 60) -> Request:
    """A prompt, perhaps with pictures or a clip, and how it is to be answered."""
    words = rng.choices(WORDS, k=rng.choice([1, 2, 5, 20, longest]))
    text = rng.choice(["", "", *SHARED]) + " ".join(words)
    request: Request = {"prompt": text, "max_tokens": rng.choice([1, 2, 6, 14]), "logprobs": 3}
    if family in (*VISION, *TRAINED) and rng.random() < 0.6:
        sides, count = [28, 31, 48, 75], rng.choice([1, 1, 2])
        request["images"] = [draw_picture(rng, sides) for _ in range(count)]
    elif family in WITH_CLIPS and rng.random() < 0.4:
        side = [rng.choice([28, 48])]
        request["videos"] = [[draw_picture(rng, side) for _ in range(rng.choice([2, 4]))]]
    if rng.random() < 0.5:
        request |= draw_sampling(rng)
    return request


def draw_sampling(rng: random.Random) -> Request:
    """Some of the options that decide the next token and the end."""
    options = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 2.5]), "top_p": rng.choice([0.3, 0.9, 1.0]),
        "top_k": rng.choice([-1, 1, 5, 50]), "min_p": rng.choice([0.0, 0.05, 0.5]),
        "repetition_penalty": rng.choice([1.0, 1.3]), "presence_penalty": rng.choice([0.0, 1.0]),
        "frequency_penalty": rng.choice([0, 0.5]), "stop": rng.choice([None, "a", ["the", "ing"]]),
        "logit_bias": rng.choice([{}, {5: 3.0, 9: -100.0}]), "ignore_eos": rng.random() < 0.5,
        "min_tokens": rng.choice([0, 1]), "prompt_logprobs": rng.random() < 0.2,
    }  # fmt: skip
    chosen = rng.sample(sorted(options), rng.randint(1, 6))
    return {"seed": rng.randrange(2**32), **{name: options[name] for name in chosen}}


def difference(found: GenerationResult, expected: GenerationResult) -> str:
    """What sets two answers apart, in words; empty where they are the same but for noise.

    Tokens may part where two are equally likely but for noise; nothing behind that is compared.
    """
    pairs = zip(found.tokens, expected.tokens, strict=False)
    parted = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if parted is None and len(found.tokens) != len(expected.tokens):
        return f"{len(found.tokens)} tokens, alone {len(expected.tokens)}"
    scores = list(zip(found.logprobs or [], expected.logprobs or [], strict=False))
    for i, (a, b) in enumerate(scores[:parted]):
        gap = abs(a.token_log_probabilities[0] - b.token_log_probabilities[0])
        if not gap < NOISE:
            return f"log-probabilities {gap:.1e} apart at token {i}"
    if parted is not None and not _tie(scores[parted][1].top_log_probabilities[0]):
        return f"tokens {found.tokens}, alone {expected.tokens}"
    if parted is None and found.text != expected.text:
        return f"text {found.text!r}, alone {expected.text!r}"
    return ""


def _tie(best: Mapping[int, float]) -> bool:
    first, second, *_ = sorted(best.values(), reverse=True)
    return first - second < NOISE


def same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    """Raises: Broken where logits differ by more than noise."""
    require(found.shape == expected.shape, f"logits {found.shape}, alone {expected.shape}")
    gap = float(np.abs(found - expected).max())
    require(gap < 3e-3 * float(np.abs(expected).max()), f"logits {gap:.1e} apart")
