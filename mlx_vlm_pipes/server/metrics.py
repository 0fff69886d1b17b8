"""/metrics: what runs, what waits, and what it took, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_vlm_pipes.server.gate import Gate
from mlx_vlm_pipes.server.models import Models

if TYPE_CHECKING:
    from mlx_vlm_pipes.engine.engine import Engine
    from mlx_vlm_pipes.server.told import Told

_PREFIX = "mlx_vlm_pipes"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server; those of its engines are read when they are asked for."""

    def __init__(self, models: Models, gate: Gate) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models, gate))
        new = {"registry": self._registry, "namespace": _PREFIX}
        self._requests = Counter("requests", "Requests answered", ["path", "status"], **new)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", **new)
        self._generated = Counter("generation_tokens", "Tokens of answers", **new)
        self._cached = Counter("cached_tokens", "Tokens of prompts that were cached", **new)
        self._first = Histogram(
            "time_to_first_token_seconds", "Until the first token", buckets=_SECONDS, **new
        )

    def count_request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def count_answers(self, answers: Iterable[Told], per_prompt: int) -> None:
        """Answers that came to their end; per_prompt: how many share a prompt."""
        for i, answer in enumerate(answers):
            if answer.usage is None or answer.timings is None:
                continue
            self._generated.inc(answer.usage.completion_tokens)
            self._first.observe(answer.timings.time_to_first_token_s)
            if i % per_prompt == 0:
                self._prompt.inc(answer.usage.prompt_tokens)
                self._cached.inc(answer.usage.cached_tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engines(Collector):
    def __init__(self, models: Models, gate: Gate) -> None:
        self._models, self._gate = models, gate

    def collect(self) -> Iterable[Metric]:
        engines = [model.pipe.engine for model in self._models.all() if model.pipe is not None]
        gauges = {
            "requests_inside": ("Requests from their first byte to their last", self._gate.inside),
            "requests_running": ("Answers being made", sum(e.running for e in engines)),
            "requests_waiting": ("Answers that wait for a row", sum(e.waiting for e in engines)),
            "memory_active_bytes": ("Memory that arrays take", _active_memory(engines)),
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", about, value)
        steps = sum(engine.stats.decode_steps for engine in engines)
        yield CounterMetricFamily(f"{_PREFIX}_decode_steps", "Decode steps", steps)


def _active_memory(engines: Sequence[Engine]) -> int:
    return engines[0].active_memory_bytes() if engines else 0
