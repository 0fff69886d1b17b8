"""Measure how many unseen cases a model answers exactly, through mlx_vlm_pipes.

    python tools/train_tiny/evaluate.py --model FOLDER [--cases 500] [--seed 1]
        [--dtype bfloat16] [--kv-bits 8] [--media-last]

Prints one JSON object: the share of exact answers, counts by kind, the first wrong answers.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.train_tiny.scoring import Score
from tools.train_tiny.tasks import Case, messages_of, unseen_case

if TYPE_CHECKING:
    from mlx_vlm_pipes.pipeline import BatchRequest

MAX_TOKENS = 32
TOGETHER = 16  # cases that are asked in one batch


def evaluate(
    model: Path,
    cases: int,
    seed: int,
    *,
    media_last: bool = False,
    dtype: str = "auto",
    kv_bits: int | None = None,
) -> dict:
    """The report of a Score over that many unseen cases.

    media_last: the question stands before its picture. dtype, kv_bits: as for `load`.
    """
    from mlx_vlm_pipes import load

    model_type = json.loads((model / "config.json").read_text())["model_type"]
    model_type = {"pixtral": "llava"}.get(model_type, model_type)  # convert writes mlx-vlm's name
    score = Score()
    with load(str(model), dtype=dtype, kv_bits=kv_bits) as pipe:
        for begin in range(0, cases, TOGETHER):
            indices = range(begin, min(cases, begin + TOGETHER))
            drawn = [unseen_case(model_type, seed, i, media_last=media_last) for i in indices]
            results = pipe.generate_batch([request(c) for c in drawn], max_tokens=MAX_TOKENS)
            for index, case, result in zip(indices, drawn, results, strict=True):
                score.add(index, case, result.text)
    return score.report()


def request(case: Case) -> "BatchRequest":
    """A case as a request of `generate_batch`."""
    media = {"videos": [case.clip], "fps": case.fps} if case.clip else {"images": case.images}
    return {"messages": messages_of(case), **media}  # pyright: ignore[reportReturnType]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="what to compute in")
    parser.add_argument("--kv-bits", type=int, help="of a quantised KV cache")
    parser.add_argument("--media-last", action="store_true", help="the question before the picture")
    args = parser.parse_args()
    started = time.time()
    settings = {"media_last": args.media_last, "dtype": args.dtype, "kv_bits": args.kv_bits}
    report = evaluate(args.model, args.cases, args.seed, **settings)
    facts = {"model": str(args.model), "cases": args.cases, "seed": args.seed, **settings}
    print(json.dumps({**facts, **report, "seconds": round(time.time() - started, 1)}, indent=2))


if __name__ == "__main__":
    main()
