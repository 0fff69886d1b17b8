"""Ranks that step a model by hand, and what they say. Their own code calls `joined`, `report`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes.ranks import Ranks
from tests.distributed.started import Started


def launch(
    size: int, module: str, arguments: Sequence[str], folder: Path, timeout_s: float = 300
) -> list[Any]:
    """Run `python -m module arguments` as `size` ranks over MLX's ring; what each has reported.

    folder: for what they write. Raises: AssertionError with the end of that, if one fails.
    """
    env = {"MLX_ENABLE_TF32": "0", "RANK_REPORTS": str(folder)}
    with Started(size, ["-m", module, *arguments], folder, env) as ranks:
        ends = ranks.ends(timeout_s)
        said = "\n".join((ranks.out(rank) + ranks.err(rank))[-3000:] for rank in range(size))
    assert not any(ends), f"ranks ended with {ends}:\n{said}"
    return [json.loads(_report_of(rank, folder).read_text()) for rank in range(size)]


def joined() -> Ranks:
    """This rank among those that `launch` has started."""
    group = mx.distributed.init(strict=True, backend="ring")
    return Ranks(group.rank(), group.size(), group)


def report(facts: Any) -> None:
    """What the test is to know of this rank."""
    path = _report_of(int(os.environ["MLX_RANK"]), Path(os.environ["RANK_REPORTS"]))
    path.write_text(json.dumps(facts))


def _report_of(rank: int, folder: Path) -> Path:
    return folder / f"rank{rank}.json"
