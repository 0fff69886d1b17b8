"""Write small random-weight checkpoints together with their reference outputs.

    python -m tools.make_fixtures OUT [--only NAME ...]
    python -m tools.make_fixtures --list

Needs torch and transformers 5. Each checkpoint is a complete model folder; beside the model lie
`reference.json` (prompts, media, facts about the run), `reference.npz` (`<prompt>/input_ids`,
`logits` at all positions, `greedy` tokens, `pixel_values`, grids, positions) and `media/`. What the
arrays mean stands in `reference_run.py`. The same versions write the same bytes again.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from .case import Case
from .text_cases import text_cases
from .vision_cases import vision_cases


def parse(argv: list[str] | None, known: dict[str, Case]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make_fixtures", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder that receives the checkpoints")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=sorted(known))
    parser.add_argument("--list", action="store_true", help="name the checkpoints and stop")
    args = parser.parse_args(argv)
    if args.out is None and not args.list:
        parser.error("OUT is missing")
    return args


def main(argv: list[str] | None = None) -> int:
    known = {case.name: case for case in (*text_cases(), *vision_cases())}
    args = parse(argv, known)
    selected = [case for name, case in known.items() if not args.only or name in args.only]
    if args.list:
        for case in selected:
            print(f"{case.name:18s} {case.about}")
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by transformers when it is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .build import build, quiet_and_deterministic

    quiet_and_deterministic()
    started = time.time()
    for case in selected:
        build(case, args.out)
    print(f"{len(selected)} checkpoints in {time.time() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
