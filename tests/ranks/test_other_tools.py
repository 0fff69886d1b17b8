"""The same tokens as transformers on a real model, and as mlx-lm's own sharded loading."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mlx_vlm_pipes.conversion import ConvertOptions, convert
from tests.fixtures_helper import FIXTURES
from tests.ranks.launched import launch
from tests.ranks.rank import Job
from tools.real_checkpoint import checkpoint_path

PATH = checkpoint_path()
PROMPTS = json.loads((FIXTURES / "real" / "prompts.json").read_text(encoding="utf-8"))
END = 2  # <|im_end|>, which the stored answers go on after


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as float32: 9 heads, 3 KV heads, a tied head of 49,152 rows."""
    folder = tmp_path_factory.mktemp("real") / "floats"
    convert(ConvertOptions(model=PATH, out=folder, measure=False, dtype="float32", dequantize=True))
    return folder


def answers_of_mlx_lm(job: Job, size: int, folder: Path) -> list[list[list[int]]]:
    """By rank, for each prompt."""
    request = folder / "mlx-lm.json"
    request.write_text(json.dumps(asdict(job)))
    said = launch(size, "tests.ranks.mlx_lm_rank", [str(request)], folder, 500)
    return [rank["tokens"] for rank in said]


@pytest.mark.real
@pytest.mark.skipif(not PATH.is_file(), reason="run: python tools/real_checkpoint.py")
@pytest.mark.parametrize("size", [2, 3])
def test_tokens_are_those_of_transformers(size: int, floats: Path, tmp_path: Path) -> None:
    """KV heads 1 and 2, and 1 each; each rank reads and holds its part and the embedding."""
    new = {2: 64, 3: 24}[size]
    job = Job(str(floats), None, [PROMPTS[0]["ids"]], new=new, banned=END)
    request = tmp_path / "request.json"
    request.write_text(json.dumps([asdict(job)]))
    ranks = [said[0] for said in launch(size, "tests.ranks.rank", [str(request)], tmp_path, 500)]
    whole = 538_060_032
    held = {2: [308_028_672, 343_418_112], 3: [254_944_512] * 3}[size]
    largest = 49_152 * 576 * 4
    for rank, own in zip(ranks, held, strict=True):
        assert rank["tokens"] == [PROMPTS[0]["greedy"][:new]]
        assert rank["weight_bytes"] == rank["read_bytes"] == own < whole
        assert rank["active"] <= 1.02 * own
        assert rank["peak"] <= rank["active"] + largest
    if size == 3:  # what mlx-lm can cut: as many heads for each
        pytest.importorskip("mlx_lm")
        mine = answers_of_mlx_lm(replace(job, new=16), 3, tmp_path)
        assert mine == [[PROMPTS[0]["greedy"][:16]]] * 3


@pytest.mark.slow
@pytest.mark.reference
def test_tokens_are_those_of_mlx_lm_sharded(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    ids = [[5, 9, 17, 3, 44, 8, 21], list(range(10, 60))]
    job = Job(str(FIXTURES / "llama-tied"), None, ids, new=24)
    theirs = answers_of_mlx_lm(job, 2, tmp_path)
    request = tmp_path / "request.json"
    request.write_text(json.dumps([asdict(job)]))
    ours = launch(2, "tests.ranks.rank", [str(request)], tmp_path)
    assert [rank[0]["tokens"] for rank in ours] == theirs
    assert theirs[0] == theirs[1]
