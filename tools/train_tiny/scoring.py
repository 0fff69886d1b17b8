"""Exact answers, counted in all and by kind of question. No torch, no MLX."""

from collections import Counter
from dataclasses import dataclass, field

from .tasks import Case


@dataclass
class Score:
    """Answers that are right word for word, surrounding spaces aside."""

    asked: Counter = field(default_factory=Counter)
    right: Counter = field(default_factory=Counter)
    wrong: list[dict] = field(default_factory=list)

    def add(self, index: int, case: Case, answer: str) -> None:
        """Count one answer to the last question of a case."""
        question, expected = case.turns[-1]
        kind = kind_of(case)
        self.asked[kind] += 1
        self.right[kind] += answer.strip() == expected
        if answer.strip() != expected:
            self.wrong.append(
                {"case": index, "question": question, "expected": expected, "answer": answer}
            )

    def report(self) -> dict:
        """Share of exact answers in all and by kind, and the first ten that were wrong."""
        kinds = {kind: f"{self.right[kind]}/{n}" for kind, n in sorted(self.asked.items())}
        share = self.right.total() / max(1, self.asked.total())
        return {"exact": round(share, 4), "kinds": kinds, "wrong": self.wrong[:10]}


def kind_of(case: Case) -> str:
    """clip, pair, or by the question about one picture; a second turn says so."""
    if case.clip:
        return "clip"
    if len(case.images) > 1:
        return "pair"
    question = case.turns[-1][0]
    kind = "count" if "How many" in question else "colour" if "color" in question else "describe"
    return kind if len(case.turns) == 1 else f"{kind}, second turn"
