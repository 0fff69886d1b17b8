"""A rank of which one is not as the others: `python -m tests.distributed.differing HOW FOLDER`.

It runs `generate`, with rank 1 (of two) changed before.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import mlx_vlm_pipes
from mlx_vlm_pipes import generate
from mlx_vlm_pipes.command import put
from mlx_vlm_pipes.launcher import is_follower
from tests.fixtures_helper import FIXTURES

SECRET = "MLX_VLM_PIPES_SECRET"


def changed(how: str, folder: Path) -> list[str]:
    """What rank 1 is told otherwise."""
    model = FIXTURES / "llama-tied"
    if how == "kv_bits":
        return ["--model", str(model), "--kv-bits", "8"]
    if how == "version":
        mlx_vlm_pipes.__version__ = "0.0.1"
    elif how == "secret":
        os.environ[SECRET] = "another"
    elif how == "no secret":
        del os.environ[SECRET]
    elif how == "missing":
        model = folder / "nothing"
    elif how in ("config", "weights"):
        model = Path(shutil.copytree(model, folder / "model"))
        if how == "config":
            path = model / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
        else:
            path = model / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    return ["--model", str(model)]


def main(how: str, folder: str) -> int:
    if "secret" in how:
        os.environ[SECRET] = "of the test"
    options = ["--model", str(FIXTURES / "llama-tied")]
    if is_follower():
        options = changed(how, Path(folder))

    import mlx_vlm_pipes.distributed.team as team
    import mlx_vlm_pipes.loading as loading

    team.MEET_S = 2.0
    if how == "loading":
        load_model = loading._load_own

        def slowly(*arguments: object) -> object:
            put("loading\n")
            time.sleep(60)
            return load_model(*arguments)

        loading._load_own = slowly
    return generate.main([*options, "--prompt", "a", "--raw", "--max-tokens", "3"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
