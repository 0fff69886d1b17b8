"""A server with two models for the clients that others wrote: one that sees shapes, one whose
template takes tools."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.server.driving import running
from tests.server.test_tools import TEMPLATE
from tests.test_documents import SERVED, blocks

IMAGE = Path(__file__).parents[2] / "examples" / "images" / "shapes.png"
ENCODED = base64.b64encode(IMAGE.read_bytes()).decode()
ASK = "Describe the picture."
URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}}
CHAT: Any = [{"role": "user", "content": [URL, {"type": "text", "text": ASK}]}]
WHO: Any = [{"role": "user", "content": "Who?"}]
CITIES = ("Bonn", "Ulm")


def from_guide(title: str, port: int) -> str:
    """The block of this title on the page about clients, for the server of these tests."""
    page = Path(__file__).parents[2] / "docs" / "guide" / "clients.md"
    (code,) = (block.code for block in blocks(page) if block.title == title)
    for name, served in (("HuggingFaceTB/SmolVLM-256M-Instruct", "shapes"), (SERVED, "")):
        assert name in code
        code = code.replace(name, served or f"127.0.0.1:{port}")
    return code


@pytest.fixture(scope="package")
def pipe() -> Iterator[Pipeline]:
    with load() as pipe:
        yield pipe


@pytest.fixture(scope="package")
def answer(pipe: Pipeline) -> str:
    return pipe.generate(ASK, IMAGE).text.strip()


@pytest.fixture(scope="package")
def text_answer(pipe: Pipeline) -> str:
    return pipe.generate(WHO, max_tokens=20).text.strip()


@pytest.fixture(scope="package")
def port(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("model") / "tools"
    shutil.copytree(BUNDLED, folder)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with load(folder) as calling:
        models = Models({"shapes": lambda: pipe, "calling": lambda: calling})
        models.load(models.first)
        with running(Server(models, ServerSettings())) as port:
            yield port
