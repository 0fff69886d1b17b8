"""A server in a process of its own, which tells what it holds whenever a line comes.

    python -m tests.torture.load_server

The first line that it prints is its port. For each line of its input it prints a JSON object of
`Held`; a line "forget" empties the caches before, and has glibc give back what it keeps of freed
memory. It ends with its input.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass

import mlx.core as mx

from mlx_vlm_pipes import load
from mlx_vlm_pipes.command import put
from mlx_vlm_pipes.server.app import Server
from mlx_vlm_pipes.server.models import Models
from mlx_vlm_pipes.server.settings import ServerSettings
from mlx_vlm_pipes.server.wire import web_server
from tests.server.driving import until

# budgets that a few seconds fill: what grows after that is no cache
PREFIX_BYTES, IMAGE_BYTES = 8_000_000, 200_000


@dataclass(frozen=True)
class Held:
    """Bytes, and numbers of what lives. requests: inside the gate, running and waiting; resident:
    of the process; active, pool: MLX's; traces: of the decode step; objects: of Python's."""

    requests: tuple[int, int, int]
    steps: int
    resident: int
    active: int
    pool: int
    prefixes: int
    traces: int
    tasks: int
    threads: int
    objects: int


class _Told:
    """The server, and what it is asked for."""

    def __init__(self) -> None:
        self.pipe = load(dtype="float32", progress=False)  # MLX multiplies these fastest on a CPU
        models = Models({"shapes": lambda: self.pipe})
        models.load(models.first)
        state = self.pipe.engine.scheduler.state
        state.prefixes.budget_bytes, state.images.budget_bytes = PREFIX_BYTES, IMAGE_BYTES
        self.server = Server(models, ServerSettings(max_waiting=32))
        self.server.gate.rows = self.pipe.engine.config.max_batch_size
        self.web = web_server(self.server.app, 30.0, port=0, lifespan="off")
        self.loop: asyncio.AbstractEventLoop | None = None

    async def serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.web.serve()

    def answer(self) -> None:
        """Print what is asked for, until the input ends."""
        until(lambda: self.web.started)
        put(f"{self.web.servers[0].sockets[0].getsockname()[1]}\n")
        for line in sys.stdin:
            if line.strip() == "forget":
                self.pipe.engine.forget()
                _trim()
            put(json.dumps(asdict(self.held())) + "\n")
        self.web.should_exit = True

    def held(self) -> Held:
        gc.collect()
        engine, ps = self.pipe.engine, ["ps", "-o", "rss=", "-p", str(os.getpid())]
        assert self.loop is not None
        return Held(
            (self.server.gate.inside, engine.running, engine.waiting),
            engine.stats.decode_steps,
            int(subprocess.run(ps, capture_output=True, check=True).stdout) * 1024,
            engine.active_memory_bytes(),
            engine.worker.call(mx.get_cache_memory),
            len(engine.scheduler.state.prefixes),
            engine.stats.traces,
            len(asyncio.all_tasks(self.loop)),
            threading.active_count(),
            len(gc.get_objects()),
        )


def _trim() -> None:
    """Where the C library is not glibc, nothing is kept that would hide what leaks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> None:
    told = _Told()
    threading.Thread(target=told.answer, daemon=True).start()
    asyncio.run(told.serve())


if __name__ == "__main__":
    main()
