"""An examination from beginning to end: config, tensors, processor, memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.doctor.memory import estimate_memory
from mlx_vlm_pipes.doctor.processor import examine_processor
from mlx_vlm_pipes.doctor.ranks import examine_ranks
from mlx_vlm_pipes.doctor.report import Checkup
from mlx_vlm_pipes.doctor.tensors import Tensors, examine_tensors, read_headers
from mlx_vlm_pipes.errors import CheckpointNotFound, ConfigError
from mlx_vlm_pipes.gguf.header import is_gguf
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.json_files import read_json, require_json
from mlx_vlm_pipes.registry import find_room

CODE_SUFFIXES = (
    ".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack",
    ".gguf", ".npy", ".joblib",
)  # fmt: skip
CODE_KEYS = ("auto_map", "model_file", "custom_pipelines")


def examine(folder: str | Path, ranks: int | None = None) -> Checkup:
    """Read headers and JSON files of a model folder, or a GGUF file; a few megabytes at any size.

    ranks: how many it would run on, to say what each would hold. Raises: CheckpointNotFound if
    there is no such thing, or it is closed to us; everything else is a finding.
    """
    folder = Path(folder)
    if not folder.is_dir() and not is_gguf(folder):
        raise CheckpointNotFound(f"no model folder at {folder}")
    if not os.access(folder, os.R_OK | (os.X_OK if folder.is_dir() else 0)):
        raise CheckpointNotFound(f"{folder}: no permission to read it")
    checkup = Checkup(str(folder))
    if folder.is_dir():
        checkup.ignored = ignored_code(folder)
        _look_for_pointers(folder, checkup)
    headers = read_headers(folder, checkup)
    values: dict[str, Any] = {}
    with checkup.collecting("config"):
        values = require_json(folder / "config.json")
    if not values:
        if not checkup.errors:
            checkup.error("config", "config.json is empty")
        return checkup
    room = config = None
    with checkup.collecting("config"):
        config = HuggingFaceConfig(values)
    if config is None:
        return checkup
    with checkup.collecting("architecture"):
        room = find_room(config)
        kind = values.get("model_type")
        checkup.architecture = f"{room.name} (model_type {kind})" if kind else room.name
    if room is None:
        return checkup
    tensors: Tensors | None = None
    with checkup.collecting("weights"):
        tensors = examine_tensors(room, folder, config, headers, checkup)
    examine_processor(room, folder, values, tensors, checkup)
    if tensors is not None:
        with checkup.collecting("memory"):
            estimate_memory(room, tensors, checkup)
    if tensors is not None and ranks is not None and not checkup.errors:
        with checkup.collecting("ranks"):
            examine_ranks(room, tensors, ranks, checkup)
    return checkup


def ignored_code(folder: Path) -> list[str]:
    """Files that hold code or pickles, and keys that name code: present, never run or read."""
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in CODE_SUFFIXES)
    for path in sorted(folder.glob("*config.json")):
        with suppress(ConfigError):  # what reads the file reports it
            values = read_json(path, ConfigError) or {}
            found += [f"{key} in {path.name}" for key in CODE_KEYS if key in values]
    return found


def _look_for_pointers(folder: Path, checkup: Checkup) -> None:
    """Files of a git clone without git-lfs are small texts that only name the content."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json", ".model") or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                start = file.read(40)
        except OSError:
            continue
        if start.startswith(b"version https://git-lfs"):
            checkup.error("files", f"{path.name} is a git-lfs pointer; run `git lfs pull`")
