"""The page at / : shut in by its policy, and told what it shows."""

from __future__ import annotations

import re

from mlx_vlm_pipes import load
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.server.driving import call, running
from tests.server.test_server import chat


def test_the_page_and_what_it_asks_for() -> None:
    with load() as pipe:
        models = Models({"shapes": lambda: pipe})
        models.load(models.first)
        with running(Server(models, ServerSettings())) as port:
            page = call(port, "/")
            told = call(port, "/v1/plan", chat()).json
    html, policy = page.body.decode(), page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)=|https?:|innerHTML|insertAdjacent|eval\(| on\w+=""", html)
    (seen,) = told["media"]
    assert (seen["tiles"]["rows"], seen["tokens"]) == (1, told["image_tokens"])
