"""What the engine remembers between requests: prefixes of the KV cache, features of images.

Both are least-recently-used under a byte budget and hold evaluated arrays only.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.kv_cache import CacheRow

_SALT = 1 << 40  # above any token id
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SIGN = np.uint64(1 << 63)


Picture = tuple[int, int, int | None]  # its tokens' begin and end, its content hash


def prefix_keys(context: TextContext, salt: int = 0) -> np.ndarray:
    """The keys (`token_keys`) of a request's tokens."""
    pictures = [(image.start_idx, image.end_idx, image.image_hash) for image in context.images]
    return token_keys(context.tokens.all, pictures, salt)


def token_keys(tokens: np.ndarray, pictures: Iterable[Picture], salt: int = 0) -> np.ndarray:
    """One int64 for each token, equal only where the cached keys and values would be equal.

    Text counts by its token id; an image's tokens also by its content hash and their place in
    it. salt separates what must not be shared (adapters, rotary frequencies).
    """
    keys = tokens.astype(np.int64) + salt * _SALT
    for begin, end, digest in pictures:
        place = np.arange(end - begin, dtype=np.uint64)
        if digest is None:  # such an image equals no other
            digest = secrets.randbits(63)
        start = np.full(1, (digest + salt) % 2**64, dtype=np.uint64)
        mixed = (start + place * _GOLDEN) | _SIGN  # negative: never a token id
        keys[begin:end] = mixed.view(np.int64)
    return keys


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two int64 arrays."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


@dataclass
class _Prefix:
    keys: np.ndarray
    row: CacheRow


class PrefixCache:
    """Finished sequences whose keys and values may serve as a prefix of later ones."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._entries: OrderedDict[int, _Prefix] = OrderedDict()
        self._next = 0

    @property
    def nbytes(self) -> int:
        return sum(entry.row.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def contents(self, token_bytes: int) -> list[tuple[np.ndarray, int]]:
        """Keys and tokens of all that is kept, the least recently used first. token_bytes: of one
        cached token."""
        return [(entry.keys, entry.row.nbytes // token_bytes) for entry in self._entries.values()]

    def match(self, keys: np.ndarray) -> tuple[int, CacheRow | None]:
        """The longest cached prefix of `keys` and the row that holds it; (0, None) if none."""
        best, found = 0, None
        for number, entry in self._entries.items():
            length = common_prefix(keys, entry.keys)
            if length > best:
                best, found = length, number
        if found is None:
            return 0, None
        self._entries.move_to_end(found)
        return best, self._entries[found].row

    def covers(self, keys: np.ndarray) -> bool:
        """Whether all of these tokens are cached already; counts as a use of the entry."""
        return self.match(keys)[0] == len(keys)

    def store(self, keys: np.ndarray, row: CacheRow) -> None:
        """Keep a staged, evaluated row; entries that are a prefix of it make way."""
        keys = keys[: row.length].copy()
        for number, entry in list(self._entries.items()):
            if common_prefix(keys, entry.keys) == len(entry.keys):
                del self._entries[number]
        self._entries[self._next] = _Prefix(keys, row)
        self._next += 1
        self.shrink(self.budget_bytes)

    def shrink(self, budget_bytes: int) -> None:
        """Forget the least recently used entries until the rest fits."""
        while self._entries and self.nbytes > budget_bytes:
            self._entries.popitem(last=False)


class ImageCache:
    """Vision rows [M, E] of images by content hash."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._rows: OrderedDict[int, mx.array] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    def contents(self) -> list[tuple[int, int]]:
        """Hashes and rows of all that is kept, the least recently used first."""
        return [(image_hash, rows.shape[0]) for image_hash, rows in self._rows.items()]

    def get(self, image_hash: int | None) -> mx.array | None:
        if image_hash is None or image_hash not in self._rows:
            return None
        self._rows.move_to_end(image_hash)
        return self._rows[image_hash]

    def put(self, hashes: Sequence[int | None], rows: Sequence[mx.array]) -> None:
        for image_hash, own in zip(hashes, rows, strict=True):
            if image_hash is not None:
                self._rows[image_hash] = own
        self.shrink(self.budget_bytes)

    def shrink(self, budget_bytes: int) -> None:
        """Forget the least recently used images until the rest fits."""
        while self._rows and self.nbytes > budget_bytes:
            self._rows.popitem(last=False)
