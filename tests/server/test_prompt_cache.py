"""`serve --prompt-cache`: what another process computed is there for the first request."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_vlm_pipes import load, serve
from mlx_vlm_pipes.errors import ConfigError, PrefixError
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from tests.server.driving import call, running

SYSTEM = {"role": "system", "content": "You look at shapes, and tell what you see. " * 20}
CHAT = "/v1/chat/completions"


def models_of(*argv: str) -> Models:
    args = serve.build_parser().parse_args(argv)
    return Models(serve._openers(args, serve._given_models(args), {}))


def ask(models: Models, name: str) -> tuple[str, int]:
    messages = [SYSTEM, {"role": "user", "content": "How many?"}]
    with running(Server(models, ServerSettings())) as port:
        told = call(port, CHAT, {"model": name, "messages": messages, "max_tokens": 8}).json
    usage = told["usage"]
    return told["choices"][0]["message"]["content"], usage["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the prefix of a system message."""
    (tmp_path / "saved").mkdir()
    with load() as pipe:
        asked = [SYSTEM, {"role": "user", "content": "Who?"}]
        assert pipe.save_prefix(tmp_path / "saved" / "system", asked).tokens > 200
    return tmp_path / "saved"


def test_the_first_request_finds_the_prefix(folder: Path) -> None:
    cold = ask(models_of(), "tiny-idefics3")
    assert cold[1] == 0
    text, cached = ask(models_of("--prompt-cache", str(folder)), "tiny-idefics3")
    assert (text, cached > 200) == (cold[0], True)
    two = [f"--model={name}={BUNDLED}" for name in "ab"]
    models = models_of(*two, f"--prompt-cache=b={folder / 'system'}")
    assert (ask(models, "a"), ask(models, "b")) == (cold, (text, cached))


def test_a_prefix_that_does_not_fit_is_refused_by_name(folder: Path) -> None:
    models = models_of("--kv-bits", "8", "--prompt-cache", str(folder))
    with pytest.raises(PrefixError, match="saved/system: saved with a KV cache of float32"):
        models.load(models.first)
    with pytest.raises(ConfigError, match="no such file, nor a folder of files"):
        models_of("--prompt-cache", str(folder / "none"))
