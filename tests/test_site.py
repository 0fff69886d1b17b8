"""The site: what it takes from the code is whole, figures are the tools', it builds strictly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import mlx_vlm_pipes
from mlx_vlm_pipes import errors
from mlx_vlm_pipes.__main__ import COMMANDS
from mlx_vlm_pipes.options import ALIASES, ELSEWHERE, OPTIONS
from mlx_vlm_pipes.registry import families
from tools import model_sizes, pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_every_option_is_in_the_table_once() -> None:
    named = re.findall(r"^\| `(\w+)`", pages.options(), re.MULTILINE)
    assert sorted(named) == sorted(OPTIONS)


def test_every_name_of_others_is_told() -> None:
    assert set(re.findall(r"^\| `(\w+)`", pages.aliases(), re.MULTILINE)) == {*ALIASES, *ELSEWHERE}


def test_every_error_is_told_with_what_it_is_for() -> None:
    kinds = {name for name, value in vars(errors).items()
             if isinstance(value, type) and issubclass(value, Exception)}  # fmt: skip
    told = re.findall(r"- `(\w+)`: \w+", pages.error_classes())
    assert sorted(told) == sorted(kinds)


def test_every_public_name_and_command_has_its_heading() -> None:
    told = pages.python()
    for name in mlx_vlm_pipes.__all__:
        value = getattr(mlx_vlm_pipes, name)
        is_error = isinstance(value, type) and issubclass(value, (Exception, Warning))
        assert is_error or f"## {name}\n" in told, name
    assert re.findall(r"^## (.*)$", pages.commands(), re.MULTILINE) == list(COMMANDS)


def test_every_part_that_a_page_asks_for_is_there() -> None:
    asked = {name for page in DOCS.rglob("*.md") for name in pages.MARK.findall(page.read_text())}
    assert asked == pages.PARTS.keys()


@pytest.mark.parametrize("room", families())
def test_every_architecture_has_a_page_and_a_row(room: str) -> None:
    assert (DOCS / "architectures" / f"{room}.md").is_file()
    assert f"[`{room}`]({room}.md)" in (DOCS / "architectures" / "index.md").read_text()


def test_every_extra_is_told() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[project")[0]
    told = re.findall(r"`([\w-]+)`", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)) <= set(told)


def test_every_path_of_the_server_is_told_and_there() -> None:
    source = (ROOT / "mlx_vlm_pipes" / "server" / "app.py").read_text(encoding="utf-8")
    served = {path for path in re.findall(r'Route\("([^"]+)"', source) if "{" not in path}
    page = (DOCS / "guide" / "server.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `/")]
    assert {path for row in rows for path in re.findall(r"`(/[^`]*)`", row)} == served


def test_the_repository_s_address_is_the_same_everywhere() -> None:
    address = re.search(r'Homepage = "([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert address is not None
    owner = address[1].removeprefix("https://github.com/")
    files = [
        *ROOT.glob("*.md"),
        ROOT / "CITATION.cff",
        ROOT / "pyproject.toml",
        *DOCS.rglob("*.md"),
    ]
    for file in files:
        for found in re.findall(r"github\.com/([\w-]+/[\w-]*pipes)\b", file.read_text()):
            assert found == owner, file


SMALLEST = "HuggingFaceTB/SmolVLM-256M-Instruct"


def test_the_smallest_model_s_row_is_what_the_tool_computes() -> None:
    assert_rows([SMALLEST])


@pytest.mark.slow
def test_all_rows_are_what_the_tool_computes() -> None:
    assert_rows(list(model_sizes.MODELS))


def assert_rows(names: list[str]) -> None:
    """The page has these rows, and the parameters are as many as the models' cards say."""
    sizes, page = model_sizes.measured(names), (DOCS / "guide" / "which-model.md").read_text()
    for rows in model_sizes.tables(sizes):
        assert rows in page
    for name, size in sizes.items():
        assert size.parameters / 1e9 == pytest.approx(model_sizes.MODELS[name].billions, rel=0.01)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "python.html").is_file()
    for page in tmp_path.rglob("*.html"):  # mkdocs does not look into HTML that pages hold
        for source in re.findall(r'<img[^>]* src="([^":]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / source).is_file(), f"{page.name}: {source}"
