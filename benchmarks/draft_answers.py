"""Answers with drafts beside plain ones: how many differ, and how near the two tokens were there.

    python benchmarks/draft_answers.py [--model M] [--prompts 1000] [--tokens 24] [--batch 4]

Each prompt is answered plainly, with `speculative="lookup"`, and once more with the plain answer
itself as drafts, of which each fifth token is wrong: so nearly all tokens come from steps over
several. The prompts are drawn with a seed; half of them ask for something to be repeated or
changed. Drafts are run whatever they take. Where two answers part, the log-probabilities of the
two tokens there are told: steps over one token and over several round differently, by about 1e-4.
Without --model what tools/real_checkpoint.py fetches, which is packed in 4 bits.
With the reference BLAS it takes hours.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes import GenerationResult, Pipeline, load
from mlx_vlm_pipes.engine import lookup, requests
from mlx_vlm_pipes.engine.worth import Worth

CHECKPOINTS = Path("~/.cache/mlx_vlm_pipes/checkpoints").expanduser()
NEAR = 1e-3  # a gap of logits that rounding may turn round: its own error is a tenth of it
NAMES = ["Anna Reed", "Elias Thorne", "Marta Silva", "Jonas Weber", "Aiko Tanaka", "Omar Haddad"]
PLACES = ["Marren Point", "the old harbour", "a village in the hills", "Lisbon", "the north shore"]
THINGS = ["a lighthouse", "a stone bridge", "a small bakery", "a wooden boat", "a garden"]
WORDS = ["count", "total", "name", "value", "item", "price", "index", "result", "left", "right"]
SUBJECTS = ["foxes", "bees", "rivers", "clocks", "bread", "snow", "music", "trains", "paper"]
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
            f"In {year} {drawn.choice(NAMES)} built {drawn.choice(THINGS)} of {size} metres in "
            f"{drawn.choice(PLACES)}."
        )
        code = f"def add({word}, step):\n    {word} = {word} + {size} * step\n    return {word}\n"
        made.append(
            TASKS[i % len(TASKS)].format(
                text=text, code=code, word=word, other=other, number=number,
                subject=f"{drawn.choice(SUBJECTS)} and {drawn.choice(SUBJECTS)}",
            )
        )  # fmt: skip
    return made


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


class Known(lookup.Lookup):
    """Drafts what follows in answers that are known, but for each fifth token."""

    answers: tuple[list[int], ...] = ()

    @property
    def is_on(self) -> bool:
        return True

    def expected(self, count: int) -> float:
        return count

    def draft(self, tokens: np.ndarray, most: int) -> list[int]:
        own = tokens.tolist()
        known = next((k for k in self.answers if k[: len(own)] == own), own)
        drafted = known[len(own) : len(own) + most] or own[-1:][:most]
        return [token ^ 1 if (len(own) + i) % 5 == 0 else token for i, token in enumerate(drafted)]


class Tally:
    """What one way of drafting has given so far."""

    def __init__(self, name: str) -> None:
        self.name, self.lines = name, list[str]()
        self.answers = self.tokens = self.drafted = self.kept = 0

    def add(
        self, pipe: Pipeline, prompt: str, plain: GenerationResult, own: GenerationResult
    ) -> None:
        self.answers += 1
        self.tokens += len(own.tokens)
        self.drafted += own.usage.drafted_tokens
        self.kept += own.usage.accepted_tokens
        if own.tokens != plain.tokens:
            self.lines.append(f"{prompt[:40]!r}: {gap(pipe, prompt, plain, own)}")
            print(f"{self.name}: {self.lines[-1]}", flush=True)

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.lines)} of {self.answers} answers differ, "
            f"{sum('NO TIE' in line for line in self.lines)} of them without a tie; "
            f"{self.tokens} tokens, {self.kept} of {self.drafted} drafted ones kept"
        )


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
    Worth.gain = lambda self, size, expected: expected if expected >= 1 else 0.0
    ways = {"lookup": lookup.Lookup, "known": Known}
    tallies = {name: Tally(name) for name in ways}
    asked: dict[str, Any] = {"max_tokens": args.tokens}
    for begin in range(0, args.prompts, args.batch):
        group = prompts(args.prompts)[begin : begin + args.batch]
        plain = pipe.generate_batch(group, **asked)
        read = [pipe.encode(prompt).input_ids for prompt in group]
        Known.answers = tuple([*i, *a.tokens] for i, a in zip(read, plain, strict=True))
        for name, way in ways.items():
            requests.Lookup = way
            drafted = pipe.generate_batch(group, **asked, speculative="lookup")
            for prompt, one, own in zip(group, plain, drafted, strict=True):
                tallies[name].add(pipe, prompt, one, own)
        if begin % 100 < args.batch or begin + args.batch >= args.prompts:
            print(*tallies.values(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
