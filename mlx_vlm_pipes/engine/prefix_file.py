"""Files of saved prefixes: keys and values of a prompt, and the vision rows of its pictures.

A safetensors file whose metadata name what it is and whose it is:

    format, version       "mlx_vlm_pipes.prefix", "1"
    model_type            of config.json, for people
    dtype, cache          what the model computes in; how keys and values are stored
    model, adapter        digests (identity.py); adapter_name, for people
    rope_table            nn.rope.Rope.table of the prompt
    prompt                sha256 of tokens and pictures: the same for the same prompt
    content               sha256 of all the rest, every tensor's bytes included

and whose tensors are `tokens` int64 [N], `images` int64 [I, 3] (begin, end, content hash),
`cache.<layer>.<i>` [2, 1, KV heads, N, X], the arrays of kv_cache.storage, and `features.<i>`
[M, E] of the i-th picture, one that occurs twice counted once. Everything in it is untrusted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.encoding import COMPUTE_TYPES
from mlx_vlm_pipes.errors import PrefixError, WeightsError, clip
from mlx_vlm_pipes.paths import is_there, whole_file
from mlx_vlm_pipes.weights.safetensors import (
    Header,
    HostArray,
    read_safetensors_header,
    write_host_arrays,
)

FORMAT, VERSION = "mlx_vlm_pipes.prefix", 1
TOKENS, IMAGES, CACHE, FEATURES = "tokens", "images", "cache.", "features."
Shapes = Mapping[str, tuple[DType, tuple[int, ...]]]


@dataclass(frozen=True)
class PrefixOwner:
    """Whose a prefix is. dtype and cache in words, model and adapter as digests."""

    model_type: str
    dtype: str
    cache: str
    model: str
    adapter: str
    adapter_name: str
    rope_table: int


@dataclass(frozen=True)
class PrefixHeader:
    """What a file says of itself, before its tensors are read."""

    path: Path
    owner: PrefixOwner
    header: Header
    stamp: tuple[int, ...]  # of the file that the header was read from

    @property
    def num_tokens(self) -> int:
        return self._rows(TOKENS)

    @property
    def num_images(self) -> int:
        return self._rows(IMAGES)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(info.nbytes for info in self.header.tensors.values())

    def features(self) -> list[tuple[DType, int]]:
        """Dtype and number of the vision rows of each picture."""
        found, tensors = [], self.header.tensors
        while (info := tensors.get(f"{FEATURES}{len(found)}")) is not None:
            if not info.shape or info.dtype.name not in COMPUTE_TYPES:
                raise damaged(self.path, "its vision rows are no floats")
            found.append((info.dtype, info.shape[0]))
        return found

    def _rows(self, name: str) -> int:
        info = self.header.tensors.get(name)
        if info is None or not info.shape:
            raise damaged(self.path, f"it has no {name}")
        return info.shape[0]

    def require_shapes(self, expected: Shapes) -> None:
        """Raises: PrefixError unless the tensors are exactly these."""
        found = {info.name: (info.dtype, info.shape) for info in self.header.tensors.values()}
        wrong = [name for name in expected if found.get(name) != expected[name]]
        wrong += [name for name in found if name not in expected]
        if wrong:
            raise damaged(self.path, f"tensor '{clip(wrong[0])}' is not as the model has it")

    def read(self) -> dict[str, HostArray]:
        """All tensors.

        Raises: PrefixError unless they are what was written; for a file that was replaced since.
        """
        arrays = {}
        try:
            with self.path.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise PrefixError(f"{self.path}: replaced while it was read; load it again")
                _skip_header(file)
                for info in self.header.tensors.values():  # in the order of their data
                    raw = file.read(info.nbytes)
                    if len(raw) != info.nbytes:
                        raise damaged(self.path, "it is cut short")
                    arrays[info.name] = HostArray.read(info, raw)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        metadata = dict(self.header.metadata)
        if metadata.pop("content", None) != _content_digest(metadata, arrays):
            raise damaged(self.path, "its content is not what was written")
        return arrays


def damaged(path: Path, why: str) -> PrefixError:
    return PrefixError(f"{path}: a damaged prefix file ({why}); remove it and save it again")


def _unreadable(path: Path, error: OSError) -> PrefixError:
    return PrefixError(f"{path}: cannot be read ({error.strerror or error})")


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _skip_header(file: BinaryIO) -> None:
    length = int.from_bytes(file.read(8), "little")
    file.seek(8 + length)


def read_prefix_header(path: Path) -> PrefixHeader:
    """Raises: PrefixError for what is not there, is no prefix file, is damaged or too new."""
    if not is_there(path, PrefixError):
        raise PrefixError(f"{clip(path, 200)}: no such file; save_prefix writes one")
    if not path.is_file():
        raise PrefixError(f"{clip(path, 200)}: not a file; expected one of save_prefix")
    try:
        stamp = _stamp(path.stat())
        header = read_safetensors_header(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    except WeightsError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise PrefixError(f"{path}: not a whole prefix file ({reason})") from None
    said = header.metadata
    if said.get("format") != FORMAT:
        raise PrefixError(f"{path}: no saved prefix; expected a file of save_prefix")
    version = _count(path, said, "version")
    if version > VERSION:
        raise PrefixError(
            f"{path}: written as version {version}, this package reads {VERSION}; update "
            "mlx_vlm_pipes or save the prefix again"
        )
    texts = {name: said.get(name, "") for name in PrefixOwner.__annotations__}
    table = _count(path, said, "rope_table")
    return PrefixHeader(path, PrefixOwner(**{**texts, "rope_table": table}), header, stamp)


def _count(path: Path, metadata: Mapping[str, str], name: str) -> int:
    """A small number of the metadata. Raises: PrefixError for what is none."""
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise damaged(path, f"its {name} is '{clip(text)}'")
    return int(text)


def write_prefix(path: Path, owner: PrefixOwner, arrays: Mapping[str, HostArray]) -> int:
    """Write a prefix; the file appears whole or not at all. Returns the bytes of its tensors.

    Another prefix, or an empty file, is replaced.
    Raises: PrefixError for a file of another kind in its place, InputError if it cannot be written.
    """
    require_replaceable(path)
    metadata = {name: str(value) for name, value in asdict(owner).items()}
    metadata |= {"format": FORMAT, "version": str(VERSION), "prompt": prompt_digest(arrays)}
    metadata["content"] = _content_digest(metadata, arrays)
    with whole_file(path) as partial:
        write_host_arrays(partial, arrays, metadata)
    return sum(array.data.nbytes for array in arrays.values())


def is_vacant(path: Path) -> bool:
    """Whether there is no such file yet, or an empty one. Raises: PrefixError as `is_there`."""
    return not is_there(path, PrefixError) or (path.is_file() and path.stat().st_size == 0)


def require_replaceable(path: Path) -> None:
    """Raises: PrefixError where something lies that save_prefix did not write, or no folder is."""
    if not path.parent.is_dir():
        raise PrefixError(f"{clip(path, 200)}: there is no such folder; make it first")
    if is_vacant(path):
        return
    try:
        known = path.is_file() and read_safetensors_header(path).metadata.get("format") == FORMAT
    except WeightsError:
        known = False
    if not known:
        raise PrefixError(
            f"{clip(path, 200)} is there and no whole prefix file; choose another name or remove it"
        )


def prompt_digest(arrays: Mapping[str, HostArray]) -> str:
    """sha256 of a prompt's tokens and of its pictures' places and hashes."""
    state = hashlib.sha256(arrays[TOKENS].data.tobytes())
    state.update(arrays[IMAGES].data.tobytes())
    return state.hexdigest()


def _content_digest(metadata: Mapping[str, str], arrays: Mapping[str, HostArray]) -> str:
    """sha256 of the metadata, and of names, dtypes, shapes and bytes of all tensors."""
    state = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        state.update(f"{name} {array.dtype.name} {list(array.data.shape)}\n".encode())
        state.update(np.ascontiguousarray(array.data).data)
    return state.hexdigest()


def int64(values: Sequence[Any] | np.ndarray, *shape: int) -> HostArray:
    return HostArray(DType.int64, np.array(values, np.int64).reshape(shape))
