"""The command; see the package's docstring."""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"  # read by MLX when it is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tools.fuzz as package
from tools.make_fixtures.build import quiet_and_deterministic

from .knobs import FAMILIES
from .minimise import minimise
from .verdict import FAILURES, draw_setting, judge


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fuzz", description=package.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--count", type=int, default=10, help="cases of each family")
    parser.add_argument("--minimise", action="store_true", help="the smallest setting that fails")
    parser.add_argument("--leave", nargs="+", default=[], metavar="KNOB", help="do not turn these")
    parser.add_argument("--case", type=json.loads, metavar="JSON", help="run this setting alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the model folders there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if no case failed, else 1."""
    args = parse(argv)
    quiet_and_deterministic()
    if args.case is not None:
        return int(_run_one("case", args.case, args) in FAILURES)
    failures = 0
    for family in args.family:
        counts: Counter[str] = Counter()
        started = time.time()
        for seed in range(args.seed, args.seed + args.count):
            setting = draw_setting(family, seed)
            for knob in args.leave:
                setting["knobs"].pop(knob, None)
            counts[_run_one(seed, setting, args)] += 1
        failures += sum(counts[kind] for kind in FAILURES)
        summary = ", ".join(f"{kind} {number}" for kind, number in counts.most_common())
        print(f"# {family}: {args.count} cases, {summary}; {time.time() - started:.0f} s")
    return int(failures > 0)


def _run_one(seed: int | str, setting: dict, args: argparse.Namespace) -> str:
    keep = args.keep and args.keep / f"{setting['family']}-{seed}"
    verdict = judge(setting, keep)
    knobs = json.dumps(setting["knobs"])
    print(f"{setting['family']} {seed} {knobs} {verdict.kind}: {verdict.detail}", flush=True)
    if verdict.failed and args.minimise:
        left = minimise(setting, lambda smaller: judge(smaller).kind == verdict.kind)
        print(f"    {judge(left).detail}: {json.dumps(left, ensure_ascii=False)}", flush=True)
    return verdict.kind


if __name__ == "__main__":
    sys.exit(main())
