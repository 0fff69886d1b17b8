"""Files of a model folder, changed in one place: JSON texts and safetensors headers."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from typing import Any

BAD: list[Any] = [
    -1, 0, 10**9, 10**30, 2**31, -1.5, 1e308, float("nan"), float("inf"), "x", "", "\ud800",
    "A" * 10_000, None, True, [], {}, [1], ["a"], {"a": 1}, [[[]]], [0] * 10_000,
]  # fmt: skip
Path_ = tuple[Any, ...]


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every key and the first members of every list below a JSON value; vocabularies in part."""
    if isinstance(value, dict):
        for key, item in list(value.items())[:60]:
            yield (*path, key)
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value[:2]):
            yield (*path, i)
            yield from places(item, (*path, i))


def spoiled(text: str, rng: random.Random, count: int) -> Iterator[str]:
    """JSON texts that differ from a good one in one value each."""
    spots = list(places(json.loads(text)))
    for _ in range(count):
        value = json.loads(text)
        *outer, last = rng.choice(spots)
        target = value
        for key in outer:
            target = target[key]
        target[last] = rng.choice(BAD)
        yield json.dumps(value)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: str | bytes, body: bytes) -> bytes:
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + body
