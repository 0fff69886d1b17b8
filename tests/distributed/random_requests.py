"""A rank of the test of many requests: `python -m tests.distributed.random_requests FILE COUNT
[FOLDER]`.

Rank 0 submits requests of all kinds at random moments, gives up some of them, and asks all ranks
for the state of their schedulers in between.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes import EngineConfig, Pipeline, load
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.processing.base import VisionProcessor

WORDS = [*"abcdefgh", "red", "blue", "circle", "square", "what", "is", "in", "the", "picture"]


class Many:
    """Requests, who reads them, and what came of them."""

    def __init__(self, pipe: Pipeline, numbers: random.Random) -> None:
        self.pipe, self.numbers = pipe, numbers
        self.ends: list[str] = []
        self.readers: list[threading.Thread] = []
        pixels = np.random.default_rng(0).integers(0, 255, (4, 48, 64, 3))
        self.pictures = list(pixels.astype(np.uint8))
        self.shared = " ".join(numbers.choices(WORDS, k=50))

    def options(self) -> dict[str, Any]:
        numbers = self.numbers
        made: dict[str, Any] = {"max_tokens": numbers.randint(1, 40)}
        made |= numbers.choice([{}, {"temperature": 1.0, "seed": numbers.randint(0, 9)}])
        made |= numbers.choice([{}, {"ignore_eos": True}, {"stop": ["a", "e"]}])
        made |= numbers.choice([{}, {}, {"speculative": "lookup"}, {"regex": "[a-e ]{3,30}"}])
        made |= numbers.choice([{}, {}, {}, {"logits_processors": [self.failing]}])
        if made.get("regex"):
            made.pop("ignore_eos", None)
        return made

    def failing(self, tokens: Any, logits: Any) -> Any:
        """A request's own function, which raises now and then."""
        if len(tokens) % 7 == 0:
            raise RuntimeError("of a request's own")
        return logits

    def submit(self) -> None:
        numbers = self.numbers
        words = " ".join(numbers.choices(WORDS, k=numbers.choice([2, 9, 40, 90])))
        prompt = self.shared + " " + words if numbers.random() < 0.3 else words
        if isinstance(self.pipe.processor, VisionProcessor):
            images = numbers.sample(self.pictures, numbers.choice([0, 0, 1, 2]))
            handle = self.pipe.submit(prompt, images, **self.options())
        else:
            handle = self.pipe.submit(prompt, raw=True, **self.options())
        deadline_s = numbers.choice([None, None, 0.0, 0.05, 0.5])
        if deadline_s is not None:
            threading.Timer(deadline_s, handle.close).start()
        reader = threading.Thread(target=self.read, args=[handle])
        reader.start()
        self.readers.append(reader)

    def read(self, handle: Handle) -> None:
        reason = "cancelled"
        try:
            for chunk in handle:
                reason = chunk.finish_reason or reason
        except RuntimeError as error:
            reason = str(error)
        self.ends.append(reason)


def main(path: str, count: str, folder: str | None = None) -> None:
    limits = EngineConfig(
        max_batch_size=6, prefill_chunk=64, running_chunk=32, running_wait_ms=5, image_batch=2,
        kv_bytes=3 << 20, prefix_bytes=1 << 20, image_bytes=60_000,
    )  # fmt: skip
    with load(folder, distributed="auto", device="cpu", engine=limits) as pipe:
        many, digests = Many(pipe, random.Random(0)), []
        for i in range(int(count)):
            many.submit()
            time.sleep(many.numbers.choice([0, 0, 0.01, 0.1]))
            if i % 10 == 0:
                digests.append(pipe.engine.digests())
            if i % 50 == 49:
                pipe.engine.forget()
        for reader in many.readers:
            reader.join()
        digests.append(pipe.engine.digests())
        state = pipe.engine.scheduler.state
        report = {"digests": digests, "ends": many.ends, "kept": len(state.prefixes)}
        Path(path).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
