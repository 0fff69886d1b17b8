"""Reading the JSON files of a model folder: bounded, and an object or one line of error. No MLX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.errors import CheckpointError, ConfigError, clip
from mlx_vlm_pipes.gguf.documents import gguf_document
from mlx_vlm_pipes.gguf.header import is_gguf

MAX_JSON_BYTES = 64 * 2**20


def read_json(
    path: Path,
    error: type[CheckpointError],
    *,
    unique: bool = False,
    max_bytes: int = MAX_JSON_BYTES,
) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no such file.

    The files "in" a GGUF file are those that its header stands for. Raises: `error` naming the
    file if it is unreadable, too large, or as parse_json says; CheckpointError for a GGUF file
    that is not read.
    """
    if is_gguf(path.parent):
        return gguf_document(path)
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > max_bytes:
            raise error(f"{path}: {path.stat().st_size} bytes; expected at most {max_bytes}")
        raw = path.read_bytes()
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror})") from None
    return parse_json(raw, path, error, unique=unique)


def require_json(path: Path) -> dict[str, Any]:
    """As read_json. Raises: ConfigError if there is no such file as well."""
    values = read_json(path, ConfigError)
    if values is None:
        raise ConfigError(f"{path.parent} has no {path.name}; is it a model folder?")
    return values


def parse_json(
    raw: bytes, path: Path, error: type[CheckpointError], *, unique: bool = False
) -> dict[str, Any]:
    """Parse untrusted JSON that must be an object; unique: a name that occurs twice is refused.

    Raises: `error` naming the file. Text with half a surrogate pair is refused too: it is JSON,
    but nothing can write it.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise error(f"{path}: '{clip(twice)}' occurs twice in one JSON object")
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once if unique else None)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except error:
        raise
    except (ValueError, RecursionError, MemoryError) as reason:
        raise error(f"{path}: broken JSON ({clip(reason)}); download it again") from None
    if not isinstance(value, dict):
        raise error(f"{path}: JSON is a {type(value).__name__}, expected an object")
    return value
