"""The models that a server answers with, by name: loaded when they are asked for, and unloaded
when another needs their memory or nobody has asked for a while."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_pipes.engine.memory import machine_memory
from mlx_vlm_pipes.errors import PipesError
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.server.errors import ApiError

DEATH_LOOK_S = 0.2
USED_SHARE = 0.9  # of the device's memory, as one model alone takes


@dataclass(eq=False)
class Model:
    """A name that requests may give, and how its pipeline is opened.

    size: bytes that its weights will take, as far as that is known before; 0: unknown. users:
    requests that are inside; failure: why it could not be opened when the server started.
    """

    name: str
    open: Callable[[], Pipeline]
    size: Callable[[], int] = lambda: 0
    created: int = field(default_factory=lambda: int(time.time()))
    pipe: Pipeline | None = None
    failure: PipesError | None = None
    users: int = 0
    last_use: float = field(default_factory=time.monotonic)

    @contextmanager
    def held(self) -> Iterator[None]:
        """It is not unloaded meanwhile. On the event loop only."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.last_use = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """OpenAI's model object, with the length that it takes."""
        held = None if self.pipe is None else self.pipe.max_seq_len
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mlx_vlm_pipes",
            "max_model_len": held,
        }


class Models:
    """All names of a server. The first is what requests without a model's name mean.

    Args: openers, by name; sizes, of their weights; memory_bytes, what all of them may take: the
    device's memory by default.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[], Pipeline]],
        sizes: Mapping[str, Callable[[], int]] | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        known = sizes or {}
        self._models = {
            name: Model(name, open, known.get(name, lambda: 0)) for name, open in openers.items()
        }
        self._memory = memory_bytes
        self._lock = threading.Lock()
        self.is_starting = False  # the first is being opened, before anybody asked

    @property
    def first(self) -> Model:
        return next(iter(self._models.values()))

    def all(self) -> list[Model]:
        return list(self._models.values())

    def find(self, name: object) -> Model:
        """Raises: ApiError 400 for a name that is no text, 404 for one that is not served."""
        if name is None:
            return self.first
        if not isinstance(name, str):
            raise ApiError(400, "model is no text", "model")
        if name not in self._models:
            listed = ", ".join(self._models)
            message = f"no model {name[:100]!r} here; this server has {listed}"
            raise ApiError(404, message, "model", "model_not_found")
        return self._models[name]

    def require_started(self, model: Model) -> None:
        """Raises: ApiError 503 while the server starts, and where it could not."""
        if model.failure is not None:
            raise ApiError(503, str(model.failure), "model", "model_not_loaded")
        if self.is_starting and model.pipe is None:
            message = f"{model.name} is being loaded; try again"
            raise ApiError(503, message, "model", "loading", {"Retry-After": "5"})

    def load(self, model: Model) -> Pipeline:
        """The model's pipeline, opened by the first that asks; blocks meanwhile.

        Raises: the package's errors, of a model that cannot be opened; ApiError 503 where those
        that are in use leave it no room.
        """
        with self._lock:
            if model.pipe is None:
                self._make_room(model)
                model.pipe = model.open()
                model.pipe.has_bars = False  # requests come side by side: no line is one's own
                model.last_use = time.monotonic()
                self._share()
            return model.pipe

    def unload_idle(self, seconds: float) -> None:
        """Unload what nobody has asked for that long."""
        now = time.monotonic()
        with self._lock:
            idle = [m for m in self._loaded() if not m.users and now - m.last_use > seconds]
            for model in idle:
                self._unload(model)
            if idle:
                self._share()

    async def died(self) -> str:
        """Wait until the thread of a loaded model has ended without being told to; what to say."""
        while True:
            for model in self._models.values():
                if model.pipe is not None and model.pipe.engine.has_died:
                    lost = model.pipe.engine.lost
                    return f"the thread of {model.name} has died" if lost is None else str(lost)
            await asyncio.sleep(DEATH_LOOK_S)

    def close(self) -> None:
        with self._lock:
            for model in self._loaded():
                self._unload(model)

    def _loaded(self) -> list[Model]:
        return [model for model in self.all() if model.pipe is not None]

    def _make_room(self, model: Model) -> None:
        """Unload the least recently used until the weights fit. Raises: ApiError 503."""
        need = model.size()
        limit = USED_SHARE * (machine_memory() if self._memory is None else self._memory)
        while self._loaded() and need + self._weights() > limit:
            idle = [other for other in self._loaded() if not other.users]
            if not idle:
                message = f"{model.name} does not fit beside the models in use; try again"
                raise ApiError(503, message, "model", "no_room", {"Retry-After": "5"})
            self._unload(min(idle, key=lambda other: other.last_use))

    def _unload(self, model: Model) -> None:
        pipe, model.pipe = model.pipe, None
        if pipe is not None:
            pipe.close()

    def _weights(self) -> int:
        return sum(model.pipe.engine.weight_bytes for model in self._loaded() if model.pipe)

    def _share(self) -> None:
        """Budgets of caches: equal parts of what all weights leave."""
        loaded, total = self._loaded(), self._weights()
        for model in loaded:
            if model.pipe is not None:
                engine = model.pipe.engine
                engine.share(total - engine.weight_bytes, len(loaded))
