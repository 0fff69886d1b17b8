"""What the launcher's environment says: whether there are other ranks, and where rank 0 is."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes.errors import RanksDiffer, one_line
from mlx_vlm_pipes.options import unfit
from mlx_vlm_pipes.ranks import ALONE, Ranks

SECRET, ADDRESS = "MLX_VLM_PIPES_SECRET", "MLX_VLM_PIPES_ADDRESS"
_RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # mlx.launch; Open MPI; MPICH, Intel MPI
_SIZE = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LISTS = ("MLX_HOSTFILE", "MLX_JACCL_DEVICES", "MLX_IBV_DEVICES")  # files with an entry a rank
_COORDINATORS = ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")  # rank 0's address


def launched_rank() -> int | None:
    """This process's rank as its launcher says it; None where there is no launcher."""
    given = next((os.environ[name] for name in _RANK if name in os.environ), None)
    return int(given) if given is not None and given.isdecimal() else None


def launched_size() -> int:
    """How many processes the launcher has started; 1 where it does not say."""
    given = next((os.environ[name] for name in _SIZE if name in os.environ), None)
    if given is not None and given.isdecimal():
        return int(given)
    return max(1, *(len(_listed(name)) for name in _LISTS))


def join_group(distributed: str | mx.distributed.Group | None) -> Ranks:
    """The ranks that `load` is asked for: none, those of the launcher ("auto"), or a group's.

    Raises: InputError for anything else; RanksDiffer where MLX does not bring together what the
    launcher has started.
    """
    if distributed is None:
        return ALONE
    if isinstance(distributed, mx.distributed.Group):
        group = distributed
    elif distributed == "auto":
        rank, size = launched_rank(), launched_size()
        if rank is None:
            return ALONE
        try:
            group = mx.distributed.init(strict=max(rank + 1, size) > 1)
        except (RuntimeError, ValueError) as error:
            raise RanksDiffer(
                f"rank {rank} does not reach the others: {one_line(error)}; see to the hostfile"
            ) from None
    else:
        raise unfit("distributed", distributed, "None, 'auto' or a group of mx.distributed")
    if group.size() == 1:
        return ALONE
    return Ranks(group.rank(), group.size(), group)


def first_addresses() -> list[str]:
    """Where rank 0 may be reached, said by itself; the likeliest first."""
    if os.environ.get(ADDRESS):
        return [os.environ[ADDRESS]]
    found = [os.environ[name].rpartition(":")[0] or os.environ[name] for name in _COORDINATORS
             if os.environ.get(name)]  # fmt: skip
    hosts = _listed("MLX_HOSTFILE")
    if hosts and isinstance(hosts[0], list):
        found += [str(entry).rpartition(":")[0] for entry in hosts[0]]
    if not found or not all(map(is_local, found)):
        found += [socket.gethostname(), f"{socket.gethostname().split('.')[0]}.local"]
    if not hosts:
        found.append("127.0.0.1")  # ranks of one machine, by MPI
    return list(dict.fromkeys(found))


def is_local(host: str) -> bool:
    """Whether only processes of the same machine reach this address."""
    return host == "localhost" or host.startswith("127.")


def _listed(name: str) -> list[Any]:
    """A JSON file that the launcher has written; empty where there is none."""
    path = os.environ.get(name)
    if not path:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (OSError, ValueError):
        return []  # MLX, which reads it too, says what is wrong
    return entries if isinstance(entries, list) else []
