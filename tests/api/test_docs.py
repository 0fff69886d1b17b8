"""docs/api.md is true: its example runs, its names are there."""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.architectures.llama3 import Llama3Config, Llama3Inputs
from mlx_vlm_pipes.architectures.qwen2_5vl import Qwen2_5VLInputs
from mlx_vlm_pipes.config import KVCacheConfig, KVCacheParams, ModelConfig, RuntimeConfig
from mlx_vlm_pipes.config import PipelineConfig as Pipeline

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    heads = {i for i, row in enumerate(cells[1:]) if set("".join(row)) <= set("-| ")}
    return [row for i, row in enumerate(cells) if not {i, i - 1} & heads]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_example_answers_as_the_pipeline_does(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/api.md", "exec"), names)
    pipe = load(dtype="float32")
    picture = np.full((96, 128, 3), 200, np.uint8)
    answer = pipe.generate(
        "What is in the picture?", [picture], max_tokens=5, ignore_eos=True, temperature=0.0
    )
    pipe.close()
    assert [token.item() for token in names["tokens"]] == answer.tokens
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("row", rows(section("Names")), ids=lambda row: row[0])
def test_every_name_is_where_the_page_says(row: list[str]) -> None:
    *_, names, place = row if len(row) == 2 else (row[2], row[1])
    module = import_module(quoted(place)[0])
    assert quoted(names)
    for name in quoted(names):
        assert name in vars(module), name


FIELDS = {
    field.name
    for kind in (
        Llama3Config, Llama3Inputs, Qwen2_5VLInputs, KVCacheConfig, KVCacheParams, ModelConfig,
        RuntimeConfig, Pipeline,
    )
    for field in dataclasses.fields(kind)
}  # fmt: skip


@pytest.mark.parametrize("title", ["Without effect here", "Settings of the engine", "LoRA"])
def test_every_setting_is_a_field(title: str) -> None:
    for row in rows(section(title)):
        for name in quoted(row[0]):
            assert name.rpartition(".")[2] in FIELDS, name


def test_anchors_that_the_code_points_to_are_there() -> None:
    anchors = {line[3:].lower().replace(",", "").replace(" ", "-") for line in PAGE.splitlines()
               if line.startswith("## ")}  # fmt: skip
    package = Path(__file__).parents[2] / "mlx_vlm_pipes"
    for path in package.rglob("*.py"):
        for anchor in re.findall(r"docs/api\.md#([\w-]+)", path.read_text(encoding="utf-8")):
            assert anchor in anchors, f"{path.name}: {anchor}"
