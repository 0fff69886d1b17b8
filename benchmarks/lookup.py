"""What `speculative="lookup"` saves: plain and speculative decoding interleaved, medians, ratio.

    python benchmarks/lookup.py [--model M] [--rounds 3] [--tokens 160] [--batch 1]

Needs a text model that can copy; without --model SmolLM2-135M-Instruct in the folder where
tests/test_real_checkpoint.py keeps it. Says too whether the tokens were the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from mlx_vlm_pipes import GenerationResult, Pipeline, load

CHECKPOINTS = Path("~/.cache/mlx_vlm_pipes/checkpoints").expanduser()
TEXT = (
    "The lighthouse at Marren Point was built in 1871 by Elias Thorne, who carried the granite "
    "across the bay in two small boats. It stands 43 metres high and its lamp can be seen from 28 "
    "kilometres away. In the winter of 1902 a storm broke the lower windows, and the keeper, Anna "
    "Reed, kept the lamp burning for six nights with oil that she carried up 211 steps. Today the "
    "tower is a museum, open from April to October, and its old lens is shown on the ground floor."
)
CODE = """def total_price(items, tax_rate):
    total = 0
    for item in items:
        total = total + item.price * item.quantity
    total = total + total * tax_rate
    return total


def average_price(items):
    total = 0
    for item in items:
        total = total + item.price
    return total / len(items)
"""
PROMPTS = {
    "copy": f"Repeat this text word for word:\n\n{TEXT}",
    "edit code": f"Rename `total` to `amount` in this code and write all of it:\n\n{CODE}",
    "summarise": f"Summarise this text in three sentences:\n\n{TEXT}",
    "free story": "Write a story about a fox who learns to swim.",
    "free facts": "What should one know before keeping bees? Explain.",
}


def measured(
    pipe: Pipeline, prompt: str, args: argparse.Namespace, **options: Any
) -> tuple[float, list[GenerationResult]]:
    """Seconds for each token of the answers, and these. Prompts are cached from the second on."""
    requests = [f"{prompt}{' ' * i}" for i in range(args.batch)]
    begun = time.process_time() if args.cpu else time.perf_counter()
    results = pipe.generate_batch(requests, max_tokens=args.tokens, **options)
    spent = (time.process_time() if args.cpu else time.perf_counter()) - begun
    return spent / sum(len(r.tokens) for r in results), results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(next(CHECKPOINTS.glob("SmolLM2*"), "")))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--cpu", action="store_true", help="the process's own seconds: busy machine"
    )
    parser.add_argument("--only", help="one of: " + ", ".join(PROMPTS))
    args = parser.parse_args()
    pipe = load(args.model)
    for name, prompt in PROMPTS.items():
        if args.only not in (None, name):
            continue
        for speculative in (None, "lookup"):  # compiles
            measured(pipe, prompt, args, speculative=speculative)
        plain, lookup = [], []
        expected: list[GenerationResult] = []
        got: list[GenerationResult] = []
        for _ in range(args.rounds):
            seconds, expected = measured(pipe, prompt, args)
            plain.append(seconds)
            seconds, got = measured(pipe, prompt, args, speculative="lookup")
            lookup.append(seconds)
        ratio = statistics.median(b / a for a, b in zip(plain, lookup, strict=True))
        drafted, kept = (
            sum(getattr(r.usage, f"{name}_tokens") for r in got) for name in ("drafted", "accepted")
        )
        same = [r.tokens for r in expected] == [r.tokens for r in got]
        print(
            f"{name:11} {statistics.median(plain) * 1e3:6.1f} ms, lookup "
            f"{statistics.median(lookup) * 1e3:6.1f} ms, ratio {ratio:.2f}; {kept} of {drafted} "
            f"drafted tokens kept of {sum(len(r.tokens) for r in got)}; "
            f"{'same tokens' if same else 'OTHER TOKENS'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
