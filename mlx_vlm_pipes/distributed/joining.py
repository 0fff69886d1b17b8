"""The ranks that the launcher has started, and where rank 0 is."""

from __future__ import annotations

import os
import socket

import mlx.core as mx

from mlx_vlm_pipes.errors import RanksDiffer, one_line
from mlx_vlm_pipes.launcher import launched_rank, launched_size, listed_hosts
from mlx_vlm_pipes.options import unfit
from mlx_vlm_pipes.ranks import ALONE, Ranks

SECRET, ADDRESS = "MLX_VLM_PIPES_SECRET", "MLX_VLM_PIPES_ADDRESS"
_COORDINATORS = ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")  # rank 0's address


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
    hosts = listed_hosts()
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
