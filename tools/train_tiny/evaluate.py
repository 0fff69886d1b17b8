"""Measure how many unseen cases a model answers exactly, through mlx_vlm_pipes.

    python tools/train_tiny/evaluate.py --model FOLDER [--cases 500] [--seed 1]

Prints one JSON object: the share of exact answers, counts by kind, the first wrong answers.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.train_tiny.scoring import Score
from tools.train_tiny.tasks import messages_of, unseen_case

MAX_TOKENS = 32


def evaluate(model: Path, cases: int, seed: int) -> dict:
    """The report of a Score over that many unseen cases."""
    from mlx_vlm_pipes import load

    pipe = load(str(model))
    model_type = json.loads((model / "config.json").read_text())["model_type"]
    score = Score()
    for index in range(cases):
        case = unseen_case(model_type, seed, index)
        media = {"videos": [case.clip], "fps": case.fps} if case.clip else {"images": case.images}
        result = pipe.generate(messages_of(case), max_tokens=MAX_TOKENS, **media)
        score.add(index, case, result.text)
    return score.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    started = time.time()
    report = evaluate(args.model, args.cases, args.seed)
    facts = {"model": str(args.model), "cases": args.cases, "seed": args.seed}
    print(json.dumps({**facts, **report, "seconds": round(time.time() - started, 1)}, indent=2))


if __name__ == "__main__":
    main()
