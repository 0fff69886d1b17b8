"""Answers with drafts beside plain ones: how many differ, and how near the two tokens were there.

    python benchmarks/draft_answers.py [--model M] [--draft D] [--prompts 1000] [--tokens 24]

The prompts are drawn with a seed: half of them ask for something to be repeated or changed, so
that much is drafted. Both sides run in batches of `--batch`. Where two answers part, the logits of
the two tokens there are told; the two ways to the same logits (a step over one token, and over
several) round differently, by about 1e-4. Without --model SmolLM2-135M-Instruct in the folder
where tests/test_real_checkpoint.py keeps it. Run it with OpenBLAS, else it takes hours.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_pipes import GenerationResult, Pipeline, load

CHECKPOINTS = Path("~/.cache/mlx_vlm_pipes/checkpoints").expanduser()
NEAR = 1e-3  # a gap of logits that rounding may turn round: its own error is a tenth of it
NAMES = "Anna Reed,Elias Thorne,Marta Silva,Jonas Weber,Aiko Tanaka,Omar Haddad".split(",")
PLACES = "Marren Point,the old harbour,a village in the hills,Lisbon,the north shore".split(",")
THINGS = "a lighthouse,a stone bridge,a small bakery,a school,a wooden boat,a garden".split(",")
WORDS = "count,total,name,value,item,price,index,result,left,right".split(",")
SUBJECTS = "foxes,bees,rivers,clocks,bread,snow,music,volcanoes,trains,paper".split(",")
TASKS = (
    "Repeat this text word for word: {text}",
    "Correct the spelling, change nothing else: {text}",
    "Write this in capital letters: {text}",
    "Rename `{word}` to `{other}` and write all of the code:\n{code}",
    "Who is spoken of here, and where? {text}",
    "Summarise in one sentence: {text}",
    "Write a short story about {subject}.",
    "What should one know about {subject}?",
    "List {number} facts about {subject}.",
    "Count from {number} to {number}0.",
)


def prompts(count: int) -> list[str]:
    """So many prompts, the same ones each time."""
    drawn = random.Random(0)
    made = []
    for i in range(count):
        word, other = drawn.sample(WORDS, 2)
        year, size, number = drawn.randint(1500, 2020), drawn.randint(3, 90), drawn.randint(2, 9)
        text = (
            f"In {year} {drawn.choice(NAMES)} built {drawn.choice(THINGS)} in "
            f"{drawn.choice(PLACES)}. It was {size} metres long and took {number} years. "
            f"{drawn.choice(NAMES)} kept it for the next {size // 2 + 1} years."
        )
        code = f"def add({word}, step):\n    {word} = {word} + {size} * step\n    return {word}\n"
        made.append(
            TASKS[i % len(TASKS)].format(
                text=text, code=code, word=word, other=other, number=number,
                subject=f"{drawn.choice(SUBJECTS)} and {drawn.choice(SUBJECTS)}",
            )
        )  # fmt: skip
    return made


def batches(asked: Sequence[str], size: int) -> Iterator[list[str]]:
    for begin in range(0, len(asked), size):
        yield list(asked[begin : begin + size])


def gap(pipe: Pipeline, prompt: str, plain: GenerationResult, other: GenerationResult) -> str:
    """Where two answers part, and how far apart their two tokens' logits are there."""
    pairs = itertools.zip_longest(plain.tokens, other.tokens)
    place = next(i for i, (a, b) in enumerate(pairs) if a != b)
    again = pipe.generate(prompt, max_tokens=place + 1, logprobs=5)
    assert again.logprobs is not None
    (best,) = again.logprobs[place].top_log_probabilities
    tokens = [plain.tokens[place], other.tokens[place]]
    if again.tokens[:place] != plain.tokens[:place] or not all(t in best for t in tokens):
        return f"token {place}: {tokens}, NO TIE"
    apart = abs(best[tokens[0]] - best[tokens[1]])
    return f"token {place}: {tokens}, {apart:.1e} apart, {'a tie' if apart < NEAR else 'NO TIE'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(next(CHECKPOINTS.glob("SmolLM2*"), "")))
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    pipe = load(args.model, dtype="float32")
    asked: dict[str, Any] = {"max_tokens": args.tokens}
    different = done = tokens = drafted = kept = 0
    for group in batches(prompts(args.prompts), args.batch):
        plain = pipe.generate_batch(group, **asked)
        pipe.engine.forget()
        others = pipe.generate_batch(group, **asked, speculative="lookup")
        for prompt, one, other in zip(group, plain, others, strict=True):
            tokens += len(other.tokens)
            drafted += other.usage.drafted_tokens
            kept += other.usage.accepted_tokens
            if one.tokens != other.tokens:
                different += 1
                print(f"{prompt[:50]!r}: {gap(pipe, prompt, one, other)}", flush=True)
        pipe.engine.forget()
        done += len(group)
        if done % 100 < args.batch or done == args.prompts:
            print(
                f"{different} of {done} answers differ; {tokens} tokens, {kept} of {drafted} "
                "drafted ones kept",
                flush=True,
            )


if __name__ == "__main__":
    main()
