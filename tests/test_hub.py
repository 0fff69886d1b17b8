"""What is downloaded from a hub, and what is said where it cannot be: a server on this machine."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_pipes.hub.bars import download_bars, interruptible
from tests.fixtures_helper import FIXTURES
from tests.hub_server import Repo, serving

ROOT, SHARDED = Path(__file__).parent.parent, FIXTURES / "llama-sharded"
FILES = {
    path.name: path.read_bytes()
    for path in sorted(SHARDED.iterdir())
    if path.is_file() and not path.name.startswith("reference")
}
OTHERS = dict.fromkeys(
    ("consolidated.safetensors", "model.fp32.safetensors", "onnx/config.json", "README.md",
     "original/params.json", "sub/model.safetensors", "pytorch_model.bin", "modeling.py"), b"{}",
)  # fmt: skip
PLAIN = {"config.json": b"{}", "model.safetensors": b"x", "model.fp16.safetensors": b"y"}
BAD_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
REPOS = {
    "a/sharded": Repo({**FILES, **OTHERS}),
    "a/plain": Repo(PLAIN),
    "a/parts": Repo({"config.json": b"{}", "model-1.safetensors": b"x", "other.safetensors": b""}),
    "a/odd": Repo({"config.json": b"{}", "weights.safetensors": b"x", "adapter.safetensors": b""}),
    "a/gated": Repo(PLAIN, gated=True, token="right"),
    "a/token": Repo(PLAIN, (401, BAD_TOKEN)),
    "a/forbidden": Repo(PLAIN, (403, {})),
    "a/closed": Repo(PLAIN, (403, {"X-Error-Message": "Access to this resource is disabled."})),
    "a/down": Repo(PLAIN, (503, {})),
    "a/busy": Repo(PLAIN, (429, {})),
    "a/pickle": Repo({"config.json": b"{}", "pytorch_model.bin": b"x"}),
    "a/ggufs": Repo({"m-Q4_0.gguf": b"x", "m-Q8_0.gguf": b"y", "mmproj-F16.gguf": b"z"}),
    "a/gguf": Repo({"m-Q4_0.gguf": b"x", "README.md": b""}),
    "a/lora": Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}),
    "a/maker": Repo({"params.json": b"{}", "consolidated.safetensors": b""}),
    "a/parts-only": Repo({"unet/model.safetensors": b""}),
    "a/empty": Repo({"README.md": b""}),
    "a/large": Repo({"config.json": b"{}", "model.safetensors": bytes(100_000)}),
}


def attempt(name: str, revision: str | None = None) -> dict[str, Any]:
    """What became of a name: the files it led to, or the error; and the warnings."""
    from mlx_vlm_pipes.errors import CheckpointNotFound
    from mlx_vlm_pipes.loading import resolve_folder

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            path = resolve_folder(name, revision)
            found = sorted(os.listdir(path)) if path.is_dir() else path.name
        except CheckpointNotFound as error:
            found = str(error)
    said = [str(w.message) for w in caught if w.category.__name__ == "PipesWarning"]
    return {"found": found, "warnings": said}


def run_all() -> None:
    """In a process of its own, since the hub's library reads its settings at import."""
    told: dict[str, Any] = {}
    with serving(REPOS) as hub:
        os.environ["HF_ENDPOINT"] = hub.url
        for name in [*REPOS, "a/nobody", "a/ggufs/m-Q8_0.gguf", "a/ggufs/m-Q2_K.gguf", "a b/c"]:
            if name == "a/large":
                continue
            told[name] = attempt(name)
            told[name]["served"] = [path.partition("/")[2] for path in hub.served]
            hub.served.clear()
        told["again"] = attempt("a/sharded") | {"served": list(hub.served)}
        told["a/plain v1"], told["a/plain v2"] = attempt("a/plain", "v1"), attempt("a/plain", "v2")
        os.environ["HF_TOKEN"] = "wrong"
        told["a/gated as somebody"] = attempt("a/gated")
        os.environ["HF_TOKEN"] = "right"
        told["a/gated as a reader"] = attempt("a/gated")
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        told["a/large"] = attempt("a/large")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        hub.repos["a/plain"] = REPOS["a/down"]
        told["a/plain while down"] = attempt("a/plain")
    told["a/sharded without network"] = attempt("a/sharded")
    told["a/new without network"] = attempt("a/new")
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    for name in ("a/sharded", "a/gguf", "a/ggufs/m-Q8_0.gguf", "a/new"):
        told[f"{name} offline"] = attempt(name)
    host = hub.url.partition("://")[2]
    print(json.dumps(told).replace(host, "HOST"))  # noqa: T201  # to the tests


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = os.environ | {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "0"}
    out.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", "from tests.test_hub import run_all; run_all()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=out, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_only_what_a_model_needs_is_downloaded(told: dict[str, Any]) -> None:
    """The index's files, else model.safetensors, else model*, else all; nothing of a subfolder."""
    assert told["a/sharded"]["found"] == sorted(FILES)
    assert sorted(told["a/sharded"]["served"]) == sorted(FILES)
    assert told["again"] == {"found": sorted(FILES), "warnings": [], "served": []}
    assert told["a/plain"]["found"] == ["config.json", "model.safetensors"]
    assert told["a/parts"]["found"] == ["config.json", "model-1.safetensors"]
    assert told["a/odd"]["found"] == ["config.json", "weights.safetensors"]
    assert told["a/plain v1"]["found"] == ["config.json", "model.safetensors"]
    assert told["a/gguf"]["found"] == "m-Q4_0.gguf"
    assert told["a/ggufs/m-Q8_0.gguf"]["served"] == ["m-Q8_0.gguf"]


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
SENTENCES = {
    "a/gated": f"a/gated is gated: accept its licence at http://HOST/a/gated and {LOG_IN}",
    "a/gated as somebody":
        "a/gated is gated: accept its licence at http://HOST/a/gated as the user of your token",
    "a/token": "HOST refuses the token (401): renew it with `hf auth login` or in HF_TOKEN;"
        " public models need none",
    "a/forbidden": "HOST refuses the token (403): renew it with `hf auth login` or in HF_TOKEN;"
        " public models need none",
    "a/closed": "http://HOST/a/closed has been closed by the hub; take another model",
    "a/down": "no folder 'a/down' here; HOST is out of order (503), and no copy is in the cache:"
        " try again later",
    "a/busy": "no folder 'a/busy' here; HOST takes no more requests now (429), and no copy is in"
    f" the cache: wait, or {LOG_IN}",
    "a/pickle": "a/pickle on the hub has PyTorch pickles only, which are never read because they"
        " can run code; look for the same model in safetensors",
    "a/ggufs": "a/ggufs on the hub holds GGUF files (m-Q4_0.gguf, m-Q8_0.gguf); name one of them,"
        " as a/ggufs/m-Q4_0.gguf",
    "a/ggufs/m-Q2_K.gguf": "a/ggufs on the hub has no file m-Q2_K.gguf; it has m-Q4_0.gguf,"
        " m-Q8_0.gguf, mmproj-F16.gguf",
    "a/lora": "a/lora on the hub is an adapter, not a model; download it, and give its folder as"
        " adapter=",
    "a/maker": "a/maker on the hub has the maker's own layout only (consolidated); take the one"
        " for transformers",
    "a/parts-only": "a/parts-only on the hub has weights in subfolders only; it is no single model"
        " for transformers or MLX",
    "a/empty": "a/empty on the hub has no weights in safetensors (1 files)",
    "a/nobody": "no folder 'a/nobody' here, and no such model at HOST, or a private one: check the"
        f" name; for a private one {LOG_IN}",
    "a b/c": "'a b/c' is neither a folder nor a hub id",
    "a/plain v2": "a/plain on the hub has no branch, tag or commit 'v2'",
    "a/new offline": "no folder 'a/new' here; HF_HUB_OFFLINE is set, and no copy is in the cache:"
    " unset it to ask the hub",
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_each_reason_has_a_sentence(case: str, told: dict[str, Any]) -> None:
    assert told[case]["found"] == SENTENCES[case]


def test_no_network_and_no_room(told: dict[str, Any]) -> None:
    said = told["a/new without network"]["found"]
    assert said.startswith(
        "no folder 'a/new' here; HOST cannot be reached, or the connection broke ("
    )
    assert said.endswith(
        "), and no copy is in the cache: check the network and run it again, files that are whole"
        " are kept"
    )
    said = told["a/large"]["found"]
    assert said.startswith("the cache /")
    assert said.endswith(
        "/hub cannot be written (File too large): make room there, or set HF_HOME to a folder on"
        " another disk"
    )


def test_a_copy_in_the_cache_is_taken(told: dict[str, Any]) -> None:
    """With a word about it, unless the user has asked for it."""
    case = told["a/plain while down"]
    assert case["found"] == ["config.json", "model.safetensors"]
    assert case["warnings"] == ["HOST is out of order (503); using the copy in the cache"]
    case = told["a/sharded without network"]
    assert case["found"] == sorted(FILES)
    assert [w.endswith("; using the copy in the cache") for w in case["warnings"]] == [True]
    assert told["a/sharded offline"] == {"found": sorted(FILES), "warnings": []}
    assert told["a/gguf offline"]["found"] == "m-Q4_0.gguf"
    assert told["a/ggufs/m-Q8_0.gguf offline"]["found"] == "m-Q8_0.gguf"
    assert told["a/gated as a reader"]["found"] == ["config.json", "model.safetensors"]


def test_ctrl_c_ends_what_has_begun() -> None:
    """The thread that downloads finds out at the next bytes, not at the end of its file."""
    ended = threading.Event()

    def endless() -> str:
        progress_bar = bars(unit="B")
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                progress_bar.update(1)
                time.sleep(0.01)
        finally:
            ended.set()

    with download_bars("a/b", is_on=False) as bars, pytest.raises(KeyboardInterrupt):
        interruptible(endless, bars)
    assert ended.wait(10)
