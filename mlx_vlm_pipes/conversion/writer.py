"""A model folder written so that it is either whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes.errors import ConfigError, InputError
from mlx_vlm_pipes.gguf.header import is_gguf
from mlx_vlm_pipes.json_files import read_json
from mlx_vlm_pipes.paths import is_there, unfinished_path, user_path
from mlx_vlm_pipes.weights.safetensors import INDEX_NAME, write_file

# What a processor reads; never code, never pickles, never weights.
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "generation_config.json", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE",
)  # fmt: skip
MAX_COPIED_BYTES = 512 * 2**20
CODE_KEYS = ("auto_map", "model_file")  # they name files that are not copied


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` at the end, or disappears.

    A process that is killed leaves a hidden `.NAME.incomplete-PID`, which the next one clears.
    Raises: InputError if `out` exists, or nothing can be written beside it.
    """
    out = user_path(out).absolute()
    if is_there(out, InputError) or out.is_symlink():
        raise InputError(f"{out} exists; choose another folder or remove it")
    partial = unfinished_path(out)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{partial}: cannot be made ({error.strerror})") from None
    try:
        yield partial
        if is_there(out, InputError):
            raise InputError(f"{out} appeared meanwhile; it is left as it is")
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ShardWriter:
    """Tensors into files of about `shard_bytes` each; memory holds one of them."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, mx.array] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, array: mx.array) -> None:
        """Take a tensor; writes a file when enough have come together."""
        if self._pending and self._pending_bytes + array.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = array
        self._pending_bytes += array.nbytes
        self._total_bytes += array.nbytes

    def _flush(self) -> None:
        path = self.folder / f"part-{len(self._shards) + 1:05d}.safetensors"
        write_file(path, self._pending)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0
        mx.clear_cache()

    def close(self) -> None:
        """Write what is left, name the files by their number, and write the index."""
        if self._pending:
            self._flush()
        count, weight_map = len(self._shards), {}
        for i, names in enumerate(self._shards, start=1):
            numbered = f"model-{i:05d}-of-{count:05d}.safetensors"
            target = numbered if count > 1 else "model.safetensors"
            (self.folder / f"part-{i:05d}.safetensors").rename(self.folder / target)
            weight_map.update(dict.fromkeys(names, target))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX_NAME, index)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_processor(source: Path, target: Path) -> None:
    """Copy tokenizer, template and processor files; keys that name code are dropped.

    A GGUF file has none to copy: what its header says is written as such files.
    """
    if is_gguf(source):
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            values = read_json(source / name, ConfigError)
            if values:
                write_json(target / name, values)
        return
    for name in COPIED:
        path = source / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_COPIED_BYTES:
            raise InputError(f"{path}: larger than {MAX_COPIED_BYTES} bytes")
        values = _with_code_keys(path)
        if values is None:
            shutil.copyfile(path, target / name)
        else:
            write_json(target / name, without_code_keys(values))


def _with_code_keys(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file that names code; None for any other file."""
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json"):
        return None
    try:
        values = read_json(path, ConfigError) or {}
    except ConfigError:
        return None  # copied as it is: what reads it says what is wrong
    return values if any(key in values for key in CODE_KEYS) else None


def without_code_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in CODE_KEYS}
