"""A rank of mlx-lm's own sharded loading, to compare with: greedy tokens for prompts of ids.

`python -m tests.ranks.mlx_lm_rank REQUEST.json`: a `tests.ranks.rank.Job`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.ranks.launched import joined, report
from tests.ranks.rank import Job


def greedy(model: Any, ids: list[int], job: Job) -> list[int]:
    """`job.new` tokens, none of them banned."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, fed, tokens = make_prompt_cache(model), ids, []
    while len(tokens) < job.new:
        logits = model(mx.array([fed]), cache=cache)[0, -1].astype(mx.float32)
        if job.banned is not None:
            logits[job.banned] = -mx.inf
        fed = [int(mx.argmax(logits).item())]  # pyright: ignore[reportArgumentType]  # of one number
        tokens += fed
    return tokens


if __name__ == "__main__":
    from mlx_lm.utils import sharded_load

    own, asked = joined(), Job(**json.loads(Path(sys.argv[1]).read_text()))
    loaded, *_ = sharded_load(asked.folder, None, own.group)
    report({"tokens": [greedy(loaded, ids, asked) for ids in asked.prompts]})
