"""A rank that answers what the test of two ranks asks: `python -m tests.distributed.answers FILE`.

Rank 0 writes FILE, as one process does that the test is; the others write nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes import InputError, Pipeline, load

PICTURE = np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)
FORM = r"[a-d]{6}"


def answers(pipe: Pipeline) -> dict[str, Any]:
    """Tokens and texts of requests of all kinds."""
    drawn = pipe.generate("Hello", max_tokens=20, temperature=0.9, seed=3, ignore_eos=True)
    greedy = pipe.generate("a b c", max_tokens=24, ignore_eos=True)
    stop = greedy.text.strip()[3:6]
    batch = pipe.generate_batch(
        [
            {"prompt": "a b c", "max_tokens": 24, "ignore_eos": True, "stop": [stop]},
            {"prompt": "What?", "images": [PICTURE], "temperature": 1.0, "seed": 5},
            {"prompt": "Which?", "regex": FORM, "max_tokens": 12},
            {"prompt": "a b a b a b", "speculative": "lookup", "ignore_eos": True},
        ],
        max_tokens=16,
    )
    cancelled = pipe.stream("a b c d", max_tokens=400, ignore_eos=True)
    next(cancelled)
    cancelled.close()
    logits = pipe.logits("The quick brown fox", [PICTURE])
    return {
        "tokens": [drawn.tokens, greedy.tokens, *(answer.tokens for answer in batch)],
        "texts": [answer.text for answer in batch],
        "ends": [answer.finish_reason for answer in batch],
        "logits": np.abs(logits).mean(axis=1).tolist(),
    }


def quiet_bytes(pipe: Pipeline) -> float:
    """Bytes on the control channel for each step of an answer in which nothing happens."""
    team, handle = pipe.engine.team, pipe.submit("a b c", max_tokens=60, ignore_eos=True)
    assert team is not None
    for _ in range(10):
        handle.next_chunk()
    sent, steps = team.sent_bytes, pipe.engine.stats.steps
    for _ in range(30):
        handle.next_chunk()
    more = pipe.engine.stats.steps - steps
    made = (team.sent_bytes - sent) / more
    for _ in handle:
        pass
    return made


def refused(pipe: Pipeline) -> str:
    """What is said to a step of rank 0's own."""
    context = pipe.processor.new_context(pipe.encode("a b"), max_length=pipe.max_seq_len)
    try:
        pipe.model.prepare_initial_token_inputs([[context]])
    except InputError as error:
        return str(error)
    return ""


def main(path: str) -> None:
    with load(distributed="auto", device="cpu") as pipe:
        found = answers(pipe)
        found["digests"] = pipe.engine.digests()
        found["refused"] = refused(pipe)
        found["quiet bytes"] = quiet_bytes(pipe)
        pipe.engine.forget()
        found["digests"] += pipe.engine.digests()
        Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
