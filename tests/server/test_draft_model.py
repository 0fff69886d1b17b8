"""A draft model behind the server."""

from __future__ import annotations

from functools import partial

import pytest

from mlx_vlm_pipes import load, serve
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.engine.drafting import always_worth
from tests.server.driving import call, running

CHAT = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 20, "ignore_eos": True}


def test_requests_draft_with_it_unless_they_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    always_worth(monkeypatch)
    models = Models({"a": partial(load, BUNDLED, draft=BUNDLED, dtype="float32"), "b": load})
    with running(Server(models, ServerSettings())) as port:
        texts, drafted = set[str](), list[dict[str, int]]()
        for more in ({"speculative": "none"}, {}, {"speculative": "draft", "num_draft_tokens": 2}):
            reply = call(port, CHAT, {**ASKED, **more})
            texts.add(reply.json["choices"][0]["message"]["content"])
            drafted.append(reply.json["usage"]["completion_tokens_details"])
        assert len(texts) == 1
        assert not any(drafted[0].values())
        assert all(counts["accepted_prediction_tokens"] > 8 for counts in drafted[1:])
        wrong = call(port, CHAT, {**ASKED, "num_draft_tokens": 8})
        assert (wrong.status, wrong.error["param"]) == (400, "num_draft_tokens")
        without = call(port, CHAT, {**ASKED, "model": "b", "speculative": "draft"})
        assert (without.status, "no draft model is loaded" in without.error["message"]) == (
            400,
            True,
        )
    models.close()


def test_a_name_has_one_draft_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn")
    assert serve.main(["--port", "0", "--draft-model", "D", "--draft-model", "E"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--draft-model E: 'tiny-idefics3' has a draft model already")
