"""Raw safetensors files, as wrong as a test wants them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

WriteRaw = Callable[..., Path]


@pytest.fixture
def write_raw(tmp_path: Path) -> WriteRaw:
    """write_raw(header, data, name="x.safetensors", length=None) -> path."""

    def write(
        header: dict | bytes,
        data: bytes = b"",
        name: str = "x.safetensors",
        length: int | None = None,
    ) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        size = len(raw) if length is None else length
        path.write_bytes(struct.pack("<Q", size) + raw + data)
        return path

    return write
