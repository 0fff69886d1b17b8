"""The engine as front ends see it: submit from any thread, iterate the answer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.distributed.team import Team
from mlx_vlm_pipes.engine.draft_model import Drafter
from mlx_vlm_pipes.engine.following import digests, follow, last_work, lead, new_scheduler
from mlx_vlm_pipes.engine.lockstep import require_alone
from mlx_vlm_pipes.engine.memory import set_limits
from mlx_vlm_pipes.engine.plan import Plan, default_limits, make_plan
from mlx_vlm_pipes.engine.requests import Handle, PromptLogits, PromptRow
from mlx_vlm_pipes.engine.saved_prefixes import PrefixFiles, SavedPrefix
from mlx_vlm_pipes.engine.state import EngineConfig, EngineStats
from mlx_vlm_pipes.engine.text import StreamDecoder
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.errors import InputError, RankLost
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.progress import Watch

OutcomeT = TypeVar("OutcomeT", PromptLogits, PromptRow)


class Engine:
    """A model on its owning thread, and the scheduler that feeds it.

    config: the limits; None for those that the model's own settings ask for. drafter: a smaller
    model that drafts for it. team: the ranks that run the model, each with an engine like this; on
    all but the first one `follow` comes next.
    """

    def __init__(
        self,
        worker: OwnerThread,
        model: PipelineModelWithKVCache,
        config: EngineConfig | None,
        drafter: Drafter | None = None,
        team: Team | None = None,
    ) -> None:
        self.drafter = drafter
        config = default_limits(model, self._drafter_bytes) if config is None else config
        worker.call(lambda: set_limits(model.device))
        self.worker, self.model, self.team = worker, model, team
        self.config, self.scheduler = new_scheduler(model, config, drafter, team)
        scheduler = self.scheduler
        self.prefix_files = PrefixFiles(worker, scheduler.state)
        if team is None or team.ranks.is_first:
            worker.idle_work = scheduler.step if team is None else lead(team, scheduler)
        worker.last_work = last_work(scheduler, team)
        if team is not None:
            model.only_thread = worker.call(threading.get_ident)  # a step of one's own would hang
            team.watchdog.tell(scheduler.lose)
            team.watchdog.tell(worker.abandon)
        self._finalizer = weakref.finalize(self, worker.stop)

    def follow(self) -> None:
        """Do as rank 0 does, until it closes. Raises: RankLost."""
        team, scheduler = self.team, self.scheduler
        if team is not None:
            self.worker.call(lambda: follow(team, scheduler))

    def digests(self) -> list[str]:
        """What names the state of each rank's scheduler (`Scheduler.digest`), in between two steps;
        for tests. Raises: RankLost."""
        return self.worker.call(lambda: digests(self.team, self.scheduler))

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return replace(self.scheduler.stats)

    def submit(
        self, context: TextContext, decoder: StreamDecoder, watch: Watch | None = None
    ) -> Handle:
        """Queue a request; safe from any thread. watch: is told how far its prompt has come.

        Raises: InputError for bad sampling values and for requests of logits processors,
        OutOfBudget for what can never fit.
        """
        self._require_other_thread()

        def queue() -> Handle:
            handle = self.scheduler.submit(context, decoder)
            handle.owner, handle.watch = self, watch
            return handle

        return self.worker.call(queue)

    def prompt_logits(self, context: TextContext, watch: Watch | None = None) -> np.ndarray:
        """float32 [T, V]: logits at every prompt position, slice by slice beside what runs.

        watch: is told how far it has come.
        Raises: InputError for token ids beyond the vocabulary, OutOfBudget for a prompt that can
        never fit.
        """

        return self._run_prompt(self.scheduler.submit_logits, context, watch).whole()

    def save_prefix(
        self, path: Path, context: TextContext, watch: Watch | None = None
    ) -> SavedPrefix:
        """Write what is cached of a prompt to a file; one that is not cached is run for it.

        watch: is told how far it has come. Raises: as `PrefixFiles.save`, and InputError with
        several ranks.
        """
        require_alone(self.team, "saved prefixes")
        submit = self.scheduler.submit_row
        return self.prefix_files.save(
            path, context, lambda: self._run_prompt(submit, context, watch).whole()
        )

    def load_prefix(self, path: Path) -> SavedPrefix:
        """Put a file of `save_prefix` into the caches.

        Raises: as `PrefixFiles.load`, and InputError with several ranks.
        """
        require_alone(self.team, "saved prefixes")
        return self.prefix_files.load(path)

    def _run_prompt(
        self,
        submit: Callable[[TextContext], tuple[Handle, OutcomeT]],
        context: TextContext,
        watch: Watch | None,
    ) -> OutcomeT:
        """Queue a request for something of its prompt alone, and wait for it."""

        self._require_other_thread()

        def queue() -> tuple[Handle, OutcomeT]:
            handle, outcome = submit(context)
            handle.watch = watch
            return handle, outcome

        handle, outcome = self.worker.call(queue)
        try:
            handle.next_chunk()  # there are none: it waits for the end
        finally:
            handle.close()
        return outcome

    def _require_other_thread(self) -> None:
        """Raises: InputError on the owning thread, which would wait for itself."""
        if self.worker.is_current:
            raise InputError("a logits processor asks the model that waits for it; ask another one")

    def plan(self, context: TextContext) -> Plan:
        """What a request would need on this engine; nothing is computed."""
        resident = self.worker.call(mx.get_active_memory)
        state = self.scheduler.state
        return make_plan(state, context, resident, self.memory_bytes)

    @property
    def has_died(self) -> bool:
        """Whether the owning thread has ended by itself: every request fails then."""
        return self.worker.has_died

    @property
    def lost(self) -> RankLost | None:
        """Which of the other ranks has gone, if one has."""
        return None if self.team is None else self.team.watchdog.lost

    @property
    def running(self) -> int:
        """Requests whose prompts are being read or whose answers are being made."""
        return len(self.scheduler.prefilling) + len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self.scheduler.waiting)

    @property
    def memory_bytes(self) -> int:
        """The memory that the device has, or recommends to use."""
        return self.scheduler.state.memory_bytes

    @property
    def weight_bytes(self) -> int:
        """What weights take in memory: the model's, and those of the one that drafts for it."""
        return self.model.weight_bytes + self._drafter_bytes

    @property
    def _drafter_bytes(self) -> int:
        return 0 if self.drafter is None else self.drafter.model.weight_bytes

    def peak_memory_bytes(self) -> int:
        """The most memory that MLX held at once in this process."""
        return self.worker.call(mx.get_peak_memory)

    def active_memory_bytes(self) -> int:
        """The memory that MLX's arrays take now, in this process."""
        return self.worker.call(mx.get_active_memory)

    def share(self, others_bytes: int, parts: int) -> None:
        """Take other budgets: beside other models of so many bytes, in one of `parts` of the rest.

        What is cached beyond them is forgotten; what runs goes on, and new requests wait for it.
        Raises: InputError with several ranks, where another model is beside them.
        """
        if self.team is not None:
            if parts > 1 or others_bytes:
                require_alone(self.team, "several models")
            return  # the limits are those of the smallest rank

        def limit() -> None:
            others = others_bytes + self._drafter_bytes
            self.config = default_limits(self.model, others, parts)
            self.scheduler.limit(self.config)

        self.worker.call(limit)

    def forget(self) -> None:
        """Empty the prefix and image caches."""

        self.worker.call(self.scheduler.forget)

    def close(self) -> None:
        """Stop the owning thread; running requests fail with EngineClosed."""
        self._finalizer()
