"""The command; see the package's docstring."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time

os.environ["MLX_ENABLE_TF32"] = "0"  # read by MLX when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tests.torture as package
from mlx_vlm_pipes.command import put
from tests.torture.worker import Worker

SECTIONS = ("exactness", "values", "media", "http", "concurrency", "signals", "checkpoints",
            "memory", "load")  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=package.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "all"], metavar="SECTION")
    parser.add_argument("--seed", type=int, default=0, help="what all cases are drawn from")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--small", action="store_true", help="as many as the test suite tries")
    number.add_argument("--cases", type=int, metavar="N", help="so many of each section")
    number.add_argument("--case", type=int, metavar="NAME", help="this one alone")
    parser.add_argument("--say", action="store_true", help="a line also for cases that hold")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if all cases held, else 1."""
    args = parse(argv)
    names = SECTIONS if "all" in args.sections else tuple(dict.fromkeys(args.sections))
    held = [run_section(f"tests.torture.{name}", args) for name in names]
    return int(not all(held))


def run_section(module: str, args: argparse.Namespace) -> bool:
    """Whether all its cases held."""
    name, started, held = module.rpartition(".")[2], time.perf_counter(), 0
    with Worker(module, args.seed) as worker:
        section = worker.section
        count = section.small if args.small else args.cases or section.whole
        numbers = range(count) if args.case is None else [args.case]
        for i in numbers:
            verdict = worker.run(i)
            held += not verdict.failure
            alone = shlex.join([name, "--seed", str(args.seed), "--case", str(i)])
            if verdict.failure:
                put(f"FAILED {verdict.about}: {verdict.failure}; python -m tests.torture {alone}\n")
            elif args.say:
                put(f"held {i} {verdict.about}, {verdict.seconds:.2f} s\n")
    seconds = time.perf_counter() - started
    put(f"{name}: {held} of {len(numbers)} cases held, {seconds:.1f} s\n")
    return held == len(numbers)


if __name__ == "__main__":
    sys.exit(main())
