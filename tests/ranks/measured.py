"""A rank that answers in ids, and reports what it holds and has read.

`python -m tests.ranks.measured REQUEST.json`, started by tests.ranks.launched: {"folder", "prompts"
(lists of ids), "new" (tokens), "options" (of loading.LoadOptions)}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx

from tests.ranks.against_transformers import Rank
from tests.ranks.launched import joined, report

if __name__ == "__main__":
    own, asked = joined(), json.loads(Path(sys.argv[1]).read_text())
    mx.reset_peak_memory()
    rank = Rank(Path(asked["folder"]), own, **asked["options"])
    facts = {
        "active": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
        "weight_bytes": rank.model.weight_bytes,
        "read_bytes": rank.model.session.read_bytes,
    }
    answers = [rank.greedy(ids, asked["new"]) for ids in asked["prompts"]]
    report(facts | {"tokens": answers})
