"""A real model, SmolLM2-135M-Instruct as GGUF, against what transformers makes of the same file.

`python tools/real_checkpoint.py` fetches it; `pytest -m real` runs these tests alone. The numbers
were written by `python -m tools.real_reference`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.loading import load
from mlx_vlm_pipes.pipeline import Pipeline
from tests.fixtures_helper import FIXTURES
from tools.real_checkpoint import checkpoint_path

PATH = checkpoint_path()
PROMPTS = json.loads((FIXTURES / "real" / "prompts.json").read_text(encoding="utf-8"))
CLOSE = 1e-4  # of the largest logit
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PATH.is_file(), reason="run: python tools/real_checkpoint.py"),
]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load(PATH, dtype="float32") as opened:
        yield opened


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "real" / "logits.npz"))


def whole(number: int) -> list[int]:
    return PROMPTS[number]["ids"] + PROMPTS[number]["greedy"]


def test_prompts_are_the_same_tokens(pipe: Pipeline) -> None:
    for prompt in PROMPTS:
        assert list(pipe.encode(prompt["messages"]).input_ids) == prompt["ids"]


def test_text_is_cut_as_the_model_was_trained() -> None:
    """Digits one by one, which transformers' reading of the file knows nothing of."""
    with load(PATH) as pipe:
        encode = pipe.processor.tokenizer.encode
        # ids that others publish for SmolLM2's own tokenizer.json
        assert encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
        assert encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
        assert encode("  multiple   spaces") == [216, 2701, 256, 5600]


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_logits_at_all_positions(
    pipe: Pipeline, arrays: dict[str, np.ndarray], number: int
) -> None:
    logits = logits_of(pipe, whole(number))
    compare(logits, arrays, number)
