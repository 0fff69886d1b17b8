"""What drafts save: plain and speculative decoding interleaved, medians, ratio.

    python benchmarks/lookup.py [--model M] [--draft D] [--rounds 3] [--tokens 160] [--batch 1]

Needs a text model that can copy; without --model what tools/real_checkpoint.py fetches. That is
packed in 4 bits, and a CPU takes nearly as long for each token of a step over packed weights;
floats, which docs/performance.md speaks of, are written by
    python -m mlx_vlm_pipes.convert --model GGUF --out FLOATS --dequantize --dtype float32
With --draft that model drafts, else prompt and answer are
looked up. The last prompt asks for JSON with long keys, whose forced tokens are drafts. Says too
whether the tokens were the same. How much a step over several tokens costs here decides much:
LD_PRELOAD=libopenblas.so.0 is another device than MLX's own wheel.
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
    "json": f"Tell me about the lighthouse of this text, as JSON:\n\n{TEXT}",
}
KEYS = ("name_of_the_building", "year_of_construction", "name_of_the_first_builder",
        "height_in_metres", "distance_of_visibility_in_kilometres")  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        key: {"type": "string", "maxLength": 24} if "name" in key else {"type": "integer"}
        for key in KEYS
    },
    "required": list(KEYS),
    "additionalProperties": False,
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
    parser.add_argument("--draft", help="a smaller model that drafts, instead of looking up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--cpu", action="store_true", help="the process's own seconds: busy machine"
    )
    parser.add_argument("--only", help="one of: " + ", ".join(PROMPTS))
    args = parser.parse_args()
    pipe = load(args.model, draft=args.draft)
    kind = "lookup" if args.draft is None else "draft"
    for name, prompt in PROMPTS.items():
        if args.only not in (None, name):
            continue
        form: dict[str, Any] = {"schema": SCHEMA} if name == "json" else {}
        for speculative in ("none", kind):  # compiles
            measured(pipe, prompt, args, speculative=speculative, **form)
        plain, drafting = [], []
        expected: list[GenerationResult] = []
        got: list[GenerationResult] = []
        for _ in range(args.rounds):
            seconds, expected = measured(pipe, prompt, args, speculative="none", **form)
            plain.append(seconds)
            seconds, got = measured(pipe, prompt, args, speculative=kind, **form)
            drafting.append(seconds)
        ratio = statistics.median(b / a for a, b in zip(plain, drafting, strict=True))
        drafted, kept = (
            sum(getattr(r.usage, f"{name}_tokens") for r in got) for name in ("drafted", "accepted")
        )
        same = [r.tokens for r in expected] == [r.tokens for r in got]
        print(
            f"{name:11} {statistics.median(plain) * 1e3:6.1f} ms, {kind} "
            f"{statistics.median(drafting) * 1e3:6.1f} ms, ratio {ratio:.2f}; {kept} of {drafted} "
            f"drafted tokens kept of {sum(len(r.tokens) for r in got)}; "
            f"{'same tokens' if same else 'OTHER TOKENS'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
