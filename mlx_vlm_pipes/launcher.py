"""What the launcher's environment says of this process: its rank, and how many there are."""

from __future__ import annotations

import json
import os
from typing import Any

HOSTS = "MLX_HOSTFILE"
_RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # mlx.launch; Open MPI; MPICH, Intel MPI
_SIZE = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LISTS = (HOSTS, "MLX_JACCL_DEVICES", "MLX_IBV_DEVICES")  # files with an entry for each rank


def launched_rank() -> int | None:
    """This process's rank as its launcher says it; None where there is no launcher."""
    given = next((os.environ[name] for name in _RANK if name in os.environ), None)
    return int(given) if given is not None and given.isdecimal() else None


def launched_size() -> int:
    """How many processes the launcher has started; 1 where it does not say."""
    given = next((os.environ[name] for name in _SIZE if name in os.environ), None)
    if given is not None and given.isdecimal():
        return int(given)
    return max(1, *(len(listed_hosts(name)) for name in _LISTS))


def is_follower() -> bool:
    """Whether this is not the rank that people talk to."""
    return bool(launched_rank())


def listed_hosts(name: str = HOSTS) -> list[Any]:
    """A JSON file of the launcher's, one entry for each rank; empty where there is none."""
    path = os.environ.get(name)
    if not path:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (OSError, ValueError):
        return []  # MLX, which reads it too, says what is wrong
    return entries if isinstance(entries, list) else []
