"""A real model, SmolLM2-135M-Instruct as GGUF, against what transformers makes of the same file.

`python tools/real_checkpoint.py` fetches it; `pytest -m real` runs these tests alone. The numbers
were written by `python -m tools.real_reference`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.loading import load
from mlx_vlm_pipes.pipeline import Pipeline
from tests.fixtures_helper import FIXTURES
from tools.real_checkpoint import checkpoint_path

PATH = checkpoint_path()
PROMPTS = json.loads((FIXTURES / "real" / "prompts.json").read_text(encoding="utf-8"))
CLOSE = 1e-4  # of the largest logit
COLUMNS = 64  # of tools/real_reference.py
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PATH.is_file(), reason="run: python tools/real_checkpoint.py"),
]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load(PATH, dtype="float32") as opened:
        yield opened


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """The same numbers as plain float32, by `convert`: MLX's packed products are slow on a CPU."""
    folder = tmp_path_factory.mktemp("real") / "floats"
    written(folder, dtype="float32", dequantize=True)
    with load(folder, dtype="float32") as opened:
        yield opened


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "real" / "logits.npz"))


def whole_ids(number: int) -> list[int]:
    """A prompt and its greedy answer."""
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
    floats: Pipeline, arrays: dict[str, np.ndarray], number: int
) -> None:
    require_close(logits_of(floats, whole_ids(number)), arrays, number)


def test_logits_of_the_packed_weights(pipe: Pipeline, arrays: dict[str, np.ndarray]) -> None:
    require_close(logits_of(pipe, PROMPTS[2]["ids"]), arrays, 2)


def test_greedy_tokens_alone_and_together(floats: Pipeline) -> None:
    asked: dict[str, Any] = {"max_tokens": 64, "min_tokens": 64}
    alone = floats.generate(PROMPTS[0]["messages"], **asked)
    assert alone.tokens == PROMPTS[0]["greedy"]
    together = floats.generate_batch([{"prompt": p["messages"]} for p in PROMPTS], **asked)
    assert [answer.tokens for answer in together] == [p["greedy"] for p in PROMPTS]


def test_greedy_tokens_of_the_packed_weights(pipe: Pipeline) -> None:
    requests = [{"prompt": prompt["messages"]} for prompt in PROMPTS[:3]]
    answers = pipe.generate_batch(requests, max_tokens=8, min_tokens=8)
    assert [answer.tokens for answer in answers] == [p["greedy"][:8] for p in PROMPTS[:3]]


def test_convert_writes_the_packed_weights_as_they_are(
    floats: Pipeline, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    written(tmp_path / "packed", dtype="float16")
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size < 1.01 * PATH.stat().st_size
    with load(tmp_path / "packed", dtype="float32") as packed:
        require_close(logits_of(packed, PROMPTS[0]["ids"]), arrays, 0)
        encoded = packed.encode(PROMPTS[0]["messages"])
    assert encoded.input_ids == floats.encode(PROMPTS[0]["messages"]).input_ids


def test_a_quantised_cache_keeps_its_promise(floats: Pipeline) -> None:
    """README: other ways of running differ by less than the rounding itself does."""
    ids = whole_ids(0)
    exact = logits_of(floats, ids)
    with load(floats.processor.folder, dtype="float32", kv_bits=8) as rounded:
        whole = logits_of(rounded, ids)
        rounded.engine.scheduler.state.config = EngineConfig(prefill_chunk=33)
        sliced = logits_of(rounded, ids)
    own = np.abs(whole - exact).mean()
    assert own > 0.01
    assert np.abs(sliced - whole).mean() < own


def written(folder: Path, **options: Any) -> None:
    convert(ConvertOptions(model=PATH, out=folder, measure=False, **options))


def require_close(logits: np.ndarray, arrays: dict[str, np.ndarray], number: int) -> None:
    """Against transformers' numbers, at the first positions if there are fewer of ours."""
    count = len(logits)
    bar = CLOSE * np.abs(logits).max()
    some, log_sums = arrays[f"{number}/some"][:count], arrays[f"{number}/log_sum"][:count]
    assert np.abs(logits[:, :: logits.shape[1] // COLUMNS] - some).max() < bar
    assert np.abs(log_sum(logits) - log_sums).max() < bar
    assert np.array_equal(logits.argmax(-1), arrays[f"{number}/best"][:count])


def logits_of(pipe: Pipeline, ids: list[int]) -> np.ndarray:
    """float32 [T, V]"""
    tokens = TokenBuffer(np.array(ids))
    return pipe.engine.prompt_logits(TextContext(tokens=tokens, max_length=8192))


def log_sum(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[:, None]).sum(-1))
