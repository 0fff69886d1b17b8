"""16-bit numbers, 4-bit weights, an 8-bit cache: as near to float32 as transformers comes.

The bars are the mean divergences of transformers in the same numbers, over the same positions
(`python benchmarks/half_precision.py --positions 400`). float32 itself is that of transformers
(test_against_transformers; benchmarks/RESULTS.md for these models: 1e-12), and stands for it here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.loading import BUNDLED
from tools.train_tiny.tasks import messages_of, unseen_case

QWEN = Path(__file__).parent.parent / "examples" / "models" / "tiny-qwen2_5vl"
MODELS = {BUNDLED: "idefics3", QWEN: "qwen2_5_vl"}
SEED, POSITIONS = 7, 400  # as the benchmark draws them
THEIRS = {  # transformers 5.23: the sum over both models' 429 and 403 positions, over their number
    "bfloat16": 1.91e-4,
    "float16": 3.4e-6,
    "4-bit": 4.91e-4,
    "8-bit cache": 3.38e-4,
}
NOISE = 1.3  # of so few positions; over 8,000 the ratio is at most 1.1 (benchmarks/RESULTS.md)


@cache
def requests(model_type: str) -> list[dict[str, Any]]:
    """Pictures with questions, more than the positions take."""
    cases = (unseen_case(model_type, SEED, index) for index in range(30))
    return [{"prompt": messages_of(c), "images": c.images} for c in cases if not c.clip]


def logits(folder: Path, model_type: str, dtype: str, kv_bits: int | None = None) -> np.ndarray:
    """float64 [T, V] of at least POSITIONS positions."""
    parts: list[np.ndarray] = []
    with load(folder, dtype=dtype, kv_bits=kv_bits) as pipe:
        for request in requests(model_type):
            parts.append(pipe.logits(**request).astype(np.float64))
            if sum(map(len, parts)) >= POSITIONS:
                break
    return np.concatenate(parts)


def divergences(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence at each position, [T]."""
    p, q = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        for x in (wanted, found)
    )
    p, q = p - wanted.max(-1, keepdims=True), q - found.max(-1, keepdims=True)
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    folder, made = tmp_path_factory.mktemp("packed"), {}
    for model in MODELS:
        made[model] = folder / model.name
        convert(
            ConvertOptions(model=model, out=made[model], bits=4, dtype="bfloat16", measure=False)
        )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("line", list(THEIRS))
def test_mean_divergence_from_float32(line: str, packed: dict[Path, Path]) -> None:
    found = []
    for model, model_type in MODELS.items():
        folder = packed[model] if line == "4-bit" else model
        dtype = "float16" if line == "float16" else "bfloat16"
        half = logits(folder, model_type, dtype, 8 if line == "8-bit cache" else None)
        found.append(divergences(logits(folder, model_type, "float32"), half))
    assert np.concatenate(found).mean() < NOISE * THEIRS[line]
