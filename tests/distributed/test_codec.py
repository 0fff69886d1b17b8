"""What ranks say to each other comes back as it was, and nothing else is taken."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes.distributed.codec import Malformed, class_name, pack, unpack


@dataclass(frozen=True)
class Picture:
    place: tuple[int, int]
    pixels: np.ndarray


KNOWN = {class_name(Picture): Picture}


def test_values_come_back() -> None:
    arrays = [np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2], np.zeros((0, 4), np.float32)]
    value = {
        "numbers": [1, -0.1, 2**63, True, None, np.int64(7)],
        7: ("text ü", frozenset({3, 1}), [], ()),
        "arrays": arrays,
        "tags": {"array": 0, "tuple": [1]},  # a dict that looks like a tag is none
    }
    made = unpack(pack(value))
    assert [a.tolist() for a in made.pop("arrays")] == [a.tolist() for a in arrays]
    value.pop("arrays")
    assert made == value


def test_blank_arrays_have_a_shape_and_no_numbers() -> None:
    picture = Picture((3, 9), np.ones((64, 64, 3), np.float32))
    message = pack([picture], blank=["pixels"])
    assert len(message) < 300
    (made,) = unpack(message, KNOWN)
    assert made.place == (3, 9)
    assert (made.pixels.shape, made.pixels.dtype) == (picture.pixels.shape, np.float32)
    assert made.pixels.nbytes == picture.pixels.nbytes  # plans count it as the picture itself
    assert not made.pixels.any()


def test_only_known_classes_are_made() -> None:
    message = pack(Picture((0, 1), np.zeros(1)))
    with pytest.raises(Malformed, match="class"):
        unpack(message)


@pytest.mark.parametrize("value", [object(), len, b"bytes", np.array(["text"]), np.array([None])])
def test_other_things_are_not_sent(value: Any) -> None:
    with pytest.raises(TypeError):
        pack(value)


def whole(text: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<I", len(text)) + text + rest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        struct.pack("<I", 2**32 - 1) + b"{}",
        whole(b"[]"),
        whole(b'{"value":{"array":0},"arrays":[]}'),
        whole(b'{"value":1,"arrays":[["object",[1]]]}', bytes(8)),
        whole(b'{"value":1,"arrays":[["int64",[-1]]]}'),
        whole(b'{"value":1,"arrays":[["int64",[99999999999,99999999999]]]}'),
        whole(b'{"value":1,"arrays":[["int64",[1]]]}', bytes(7)),
        whole(b'{"value":1,"arrays":[]}', b"more"),
        whole(b'{"value":{"what":[1]},"arrays":[]}'),
        whole(b'{"value":{"blank":["float32",[-3]]},"arrays":[]}'),
        whole(b'{"value":' + b"[" * 100_000 + b"]" * 100_000 + b',"arrays":[]}'),
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        unpack(data)
