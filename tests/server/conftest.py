"""What the server's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    """The bundled model. A file that asks another one has a `pipe` of its own."""
    with load() as pipe:
        yield pipe
