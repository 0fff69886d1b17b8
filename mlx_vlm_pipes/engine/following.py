"""What the owning threads of several ranks do: rank 0 leads, the others follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from mlx_vlm_pipes.distributed.codec import pack
from mlx_vlm_pipes.distributed.team import Team
from mlx_vlm_pipes.engine.draft_model import Drafter
from mlx_vlm_pipes.engine.lockstep import (
    DIGEST,
    END,
    FORGET,
    Step,
    context_classes,
    read_step,
    shared_limits,
)
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.errors import EngineClosed, RankLost
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache


def new_scheduler(
    model: PipelineModelWithKVCache,
    config: EngineConfig,
    drafter: Drafter | None,
    team: Team | None,
) -> tuple[EngineConfig, Scheduler]:
    """A scheduler and its limits: with other ranks those of the smallest. Raises: RankLost."""
    if team is None:
        return config, Scheduler(model, config, drafter)
    limits, memory, pictures = shared_limits(team, model, config)
    scheduler = Scheduler(model, limits, team=team)
    scheduler.state.memory_bytes, scheduler.state.picture_bytes = memory, pictures
    return limits, scheduler


def lead(team: Team, scheduler: Scheduler) -> Callable[[], bool]:
    """Rank 0's steps. A rank that is lost ends them, and the process."""

    def step() -> bool:
        try:
            return scheduler.step()
        except RankLost as error:
            team.watchdog.fail(error)
            return False

    return step


def follow(team: Team, scheduler: Scheduler) -> None:
    """Rank 0's steps on another rank, until it closes. Raises: RankLost."""
    classes = context_classes()
    try:
        while True:
            said = read_step(team.hear(), classes)
            if isinstance(said, Step):
                scheduler.follow(said, classes)
            elif said == FORGET:
                scheduler.forget()
            elif said == DIGEST:
                team.gather(scheduler.digest())
            elif said == END:
                return
            else:
                raise RankLost(f"rank 0 has announced {said!r}, which this rank does not know")
    except BaseException as error:
        team.leave(error if isinstance(error, RankLost) else RuntimeError(repr(error)))
        raise


def digests(team: Team | None, scheduler: Scheduler) -> list[str]:
    """Each rank's, on rank 0's owning thread, once the others have heard of all requests."""
    if team is None:
        return [scheduler.digest()]
    scheduler.step()
    team.announce(pack(DIGEST))
    return team.gather(scheduler.digest())


def last_work(scheduler: Scheduler, team: Team | None) -> Callable[[], None]:
    """What an owning thread does at its end: nobody waits for ever, and the others may go."""

    def close() -> None:
        scheduler.fail_all(EngineClosed("the pipeline was closed"))
        if team is None:
            return
        team.close()
        if team.ranks.is_first:
            with contextlib.suppress(RankLost):
                team.announce(pack(END))

    return close
