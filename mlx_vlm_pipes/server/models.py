"""The models that a server answers with, by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_pipes.errors import PipesError
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.server.errors import ApiError


@dataclass(eq=False)
class Model:
    """A name that requests may give, and how its pipeline is opened."""

    name: str
    open: Callable[[], Pipeline]
    created: int = field(default_factory=lambda: int(time.time()))
    pipe: Pipeline | None = None
    failure: PipesError | None = None

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
    """All names of a server. The first is what requests without a model's name mean."""

    def __init__(self, openers: Mapping[str, Callable[[], Pipeline]]) -> None:
        self._models = {name: Model(name, open) for name, open in openers.items()}
        self._lock = threading.Lock()

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

    def load(self, model: Model) -> Pipeline:
        """The model's pipeline, opened by the first that asks; blocks meanwhile.

        Raises: the package's errors, of a model that cannot be opened.
        """
        with self._lock:
            if model.pipe is None:
                model.pipe = model.open()
                model.pipe.has_bars = False  # requests come side by side: no line is one's own
            return model.pipe

    def ready(self, name: object) -> tuple[Model, Pipeline]:
        """The model and its pipeline. Raises: ApiError 404, or 503 while it is being loaded."""
        model = self.find(name)
        if model.failure is not None:
            raise ApiError(503, str(model.failure), "model", "model_not_loaded")
        if model.pipe is None:
            message = f"{model.name} is being loaded; try again"
            raise ApiError(503, message, "model", "loading", {"Retry-After": "5"})
        return model, model.pipe

    def close(self) -> None:
        with self._lock:
            for model in self.all():
                if model.pipe is not None:
                    model.pipe.close()
                    model.pipe = None
