"""What the engine remembers between requests: prefixes of the KV cache, features of images.

Both are least-recently-used under a byte budget and hold evaluated arrays only.
"""

from __future__ import annotations

import bisect
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


@dataclass(frozen=True)
class _Prefix:
    keys: np.ndarray
    row: CacheRow
    nbytes: int


class PrefixCache:
    """Finished sequences whose keys and values may serve as a prefix of later ones.

    They lie in the order of their keys' bytes, where the one that shares most with a prompt stands
    beside the prompt's own place: a look costs the same among ten and among ten thousand.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._entries: OrderedDict[bytes, _Prefix] = OrderedDict()  # the least recently used first
        self._order: list[bytes] = []  # their names, sorted

    def __len__(self) -> int:
        return len(self._entries)

    def contents(self, token_bytes: int) -> list[tuple[np.ndarray, int]]:
        """Keys and tokens of all that is kept, the least recently used first. token_bytes: of one
        cached token."""
        return [(entry.keys, entry.row.nbytes // token_bytes) for entry in self._entries.values()]

    def match(self, keys: np.ndarray) -> tuple[int, CacheRow | None]:
        """The longest cached prefix of `keys` and the row that holds it; (0, None) if none."""
        at, best, found = bisect.bisect_left(self._order, keys.tobytes()), 0, None
        for name in self._order[max(at - 1, 0) : at + 1]:
            length = common_prefix(keys, self._entries[name].keys)
            if length > best:
                best, found = length, name
        if found is None:
            return 0, None
        self._entries.move_to_end(found)
        return best, self._entries[found].row

    def covers(self, keys: np.ndarray) -> bool:
        """Whether all of these tokens are cached already; counts as a use of the entry."""
        return self.match(keys)[0] == len(keys)

    def store(self, keys: np.ndarray, row: CacheRow) -> None:
        """Keep a staged, evaluated row; entries that are a prefix of it make way."""
        name = keys[: row.length].tobytes()
        if name in self._entries:
            self._forget(name)
        at = bisect.bisect_left(self._order, name)
        while at and name.startswith(self._order[at - 1]):
            self._forget(self._order[at - 1])
            at -= 1
        self._order.insert(at, name)
        self._entries[name] = _Prefix(np.frombuffer(name, np.int64), row, row.nbytes)
        self.nbytes += row.nbytes
        self.shrink(self.budget_bytes)

    def shrink(self, budget_bytes: int) -> None:
        """Forget the least recently used entries until the rest fits."""
        while self._entries and self.nbytes > budget_bytes:
            self._forget(next(iter(self._entries)))

    def _forget(self, name: bytes) -> None:
        self.nbytes -= self._entries.pop(name).nbytes
        del self._order[bisect.bisect_left(self._order, name)]


class ImageCache:
    """Vision rows [M, E] of images by content hash."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self._rows: OrderedDict[int, mx.array] = OrderedDict()

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
                before = self._rows.pop(image_hash, None)
                self.nbytes += own.nbytes - (0 if before is None else before.nbytes)
                self._rows[image_hash] = own
        self.shrink(self.budget_bytes)

    def shrink(self, budget_bytes: int) -> None:
        """Forget the least recently used images until the rest fits."""
        while self._rows and self.nbytes > budget_bytes:
            self.nbytes -= self._rows.popitem(last=False)[1].nbytes
