"""The AI SDK of npm (streamText, generateObject) against a server of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import CITIES, IMAGE, from_guide

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
INSTALL_S, RUN_S = 300, 120


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with the versions that package.json names, installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node or npm is missing")
    for name in ("package.json", "ai_sdk.mjs"):
        shutil.copy(HERE / name, tmp_path)
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(
        ["npm", "install", *quiet], cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=INSTALL_S,
    )  # fmt: skip
    if done.returncode and "ENOTFOUND" in done.stderr:
        pytest.skip("npm's registry cannot be reached")
    assert done.returncode == 0, done.stderr
    return tmp_path


def node(packages: Path, *words: str) -> str:
    """What a script prints."""
    done = subprocess.run(
        ["node", *words], cwd=packages, capture_output=True, text=True, check=False, timeout=RUN_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_ai_sdk(port: int, answer: str, text_answer: str, packages: Path) -> None:
    told = json.loads(node(packages, "ai_sdk.mjs", str(port), str(IMAGE)).splitlines()[-1])
    assert told["text"].strip() == text_answer
    assert "".join(told["parts"]) == answer
    assert len(told["parts"]) > 1
    assert told["usage"]["outputTokens"] > 1
    assert told["object"]["city"] in CITIES
    assert told["input"]["city"] in CITIES
    assert told["refused"]["status"] == 404
    assert "no model 'none' here" in told["refused"]["message"]
    (packages / "guide.mjs").write_text(from_guide("ai-sdk", port))
    shutil.copy(IMAGE, packages / "cat.png")
    assert node(packages, "guide.mjs") == f"{answer}\ncolour\n"
