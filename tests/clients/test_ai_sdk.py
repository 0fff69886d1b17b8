"""The AI SDK of npm (streamText, generateObject) against a server of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import CITIES, IMAGE

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


def test_ai_sdk(port: int, answer: str, text_answer: str, packages: Path) -> None:
    done = subprocess.run(
        ["node", "ai_sdk.mjs", str(port), str(IMAGE)], cwd=packages, capture_output=True,
        text=True, check=False, timeout=RUN_S, env={**os.environ, "AI_SDK_LOG_WARNINGS": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["text"].strip() == text_answer
    assert "".join(told["parts"]) == answer
    assert len(told["parts"]) > 1
    assert told["usage"]["outputTokens"] > 1
    assert told["object"]["city"] in CITIES
    assert told["input"]["city"] in CITIES
    assert told["refused"]["status"] == 404
    assert "no model 'none' here" in told["refused"]["message"]
