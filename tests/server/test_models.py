"""Several models behind one server: opened when asked for, unloaded when there is no room."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.errors import ApiError
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.server.driving import call, running, until

ASKED = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
CHAT = "/v1/chat/completions"


def loaded(models: Models) -> list[str]:
    return [model.name for model in models.all() if model.pipe is not None]


def small(**memory: Any) -> Models:
    """Three names for the bundled model, which takes 5.3 MB."""
    return Models(dict.fromkeys("abc", load), dict.fromkeys("abc", lambda: 5_000_000), **memory)


def test_each_is_opened_when_it_is_asked_for() -> None:
    models = small()
    with running(Server(models, ServerSettings())) as port:
        assert loaded(models) == []
        told = [call(port, CHAT, {**ASKED, "model": name}).json for name in "ab"]
        assert [one["model"] for one in told] == ["a", "b"]
        assert loaded(models) == ["a", "b"]
        budgets = [models.find(name).pipe.engine.config.kv_bytes for name in "ab"]
        assert budgets[0] == budgets[1]
        models.find("c").open, alone = load, load()
        with alone:
            assert sum(budgets) <= alone.engine.config.kv_bytes
    models.close()


def test_the_least_recently_used_makes_room() -> None:
    models = small(memory_bytes=13_000_000)  # two of them, in nine tenths of it
    for name in "ab":
        models.load(models.find(name))
    models.find("a").last_use = time.monotonic()
    models.load(models.find("c"))
    assert loaded(models) == ["a", "c"]
    with models.find("a").held(), models.find("c").held():
        with pytest.raises(ApiError, match="does not fit beside the models in use") as caught:
            models.load(models.find("b"))
        assert caught.value.status == 503
    models.load(models.find("b"))
    assert len(loaded(models)) == 2
    models.close()
    assert loaded(models) == []


def test_idle_models_are_unloaded_and_come_back() -> None:
    models = small()
    server = Server(models, ServerSettings(idle_unload_s=0.2))
    with running(server, lifespan="on") as port:
        first = call(port, CHAT, {**ASKED, "model": "b"}).json["choices"]
        until(lambda: loaded(models) == [])
        assert call(port, CHAT, {**ASKED, "model": "b"}).json["choices"] == first


def test_while_it_starts_a_server_says_so() -> None:
    models = small()
    models.is_starting = True
    with running(Server(models, ServerSettings())) as port:
        reply = call(port, CHAT, ASKED)
        assert (reply.status, reply.error["code"]) == (503, "loading")
        assert call(port, "/health").status == 503
        models.is_starting = False
        assert call(port, "/health").status == 200
