"""What a form costs: time a token with a schema, over the same model without one.

    python tools/real_checkpoint.py && python benchmarks/structured.py [--rounds 7] [--schemas 200]

Both sides interleaved, medians, ratio. Then drawn schemas at temperature
1: how many answers are valid by jsonschema, and how many were cut off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from random import Random
from typing import Any, Literal

from mlx_vlm_pipes import load
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.result import GenerationResult, collect_all

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.real_checkpoint import checkpoint_path  # the path above leads there

ASKED = "Describe a person as JSON: name, age, city, and three hobbies."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "city": {"type": "string"},
        "hobbies": {"type": "array", "items": {"type": "string"}, "minItems": 3, "maxItems": 3},
    },
    "required": ["name", "age", "city", "hobbies"],
    "additionalProperties": False,
}


def seconds_a_token(pipe: Pipeline, seed: int, **form: Any) -> float:
    result = pipe.generate(ASKED, temperature=1.0, seed=seed, max_tokens=64, **form)
    return result.timings.generation_s / max(1, len(result.tokens) - 1)


def compare(pipe: Pipeline, rounds: int) -> None:
    seconds_a_token(pipe, 0, schema=SCHEMA)  # what is known of the tokens is made once
    free, bound = [], []
    for seed in range(rounds):
        free.append(seconds_a_token(pipe, seed, ignore_eos=True))
        bound.append(seconds_a_token(pipe, seed, schema=SCHEMA))
    ours, theirs = statistics.median(bound), statistics.median(free)
    ratio = ours / theirs
    print(f"ms a token with a schema {1e3 * ours:.2f}, without {1e3 * theirs:.2f}: {ratio:.3f}")


def draw(random: Random, depth: int = 0) -> dict[str, Any]:
    """A JSON schema of what people write: objects, lists, bounds, choices, patterns."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern", "const"]
    kind = random.choice(kinds + ["object", "array", "anyOf"] * (3 if depth < 3 else 0))
    if kind == "object":
        names = random.sample(
            ["id", "name", "tags", "size", "note", "kind", "ok"], random.randint(1, 4)
        )
        properties = {name: draw(random, depth + 1) for name in names}
        required = [name for name in names if random.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required,
                "additionalProperties": False}  # fmt: skip
    if kind == "array":
        low = random.randint(0, 2)
        return {"type": "array", "items": draw(random, depth + 1), "minItems": low,
                "maxItems": low + random.randint(0, 2)}  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [draw(random, depth + 1) for _ in range(random.randint(2, 3))]}
    if kind == "string":
        low = random.randint(0, 5)
        return {"type": "string", "minLength": low, "maxLength": low + random.randint(0, 12)}
    if kind == "integer":
        low = random.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "exclusiveMaximum": random.choice([1, 10, 1000])}
    if kind == "enum":
        return {"enum": random.sample(["red", "ünö", 1, 2.5, None, True, "a b"], 3)}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": random.choice(["^[a-z]{2,6}$", r"^\d{4}-\d{2}$", "^(yes|no)$"]),
        }
    return {"const": random.choice(["x", 7, False])} if kind == "const" else {"type": kind}


def judge(pipe: Pipeline, count: int, max_tokens: int) -> None:
    """Answer drawn schemas, as many at once as the engine takes, until `count` were taken; one that
    is refused is no answer."""
    schemas: list[dict[str, Any]] = []
    handles: list[Handle] = []
    random, refused = Random(1), 0
    while len(handles) < count:
        schema, seed = draw(random), random.randrange(1 << 30)
        options = {"schema": schema, "temperature": 1.0, "seed": seed, "max_tokens": max_tokens}
        try:
            handles.append(pipe.submit("Answer in JSON.", **options))
            schemas.append(schema)
        except InputError:
            refused += 1
    answers = collect_all(handles, has_bar=True)
    verdicts = [verdict(*pair) for pair in zip(answers, schemas, strict=True)]
    said = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("valid", "cut off", "wrong"))
    tokens = sum(len(answer.tokens) for answer in answers)
    print(f"{count} schemas: {said}; {refused} refused; {tokens} tokens in all")
    for found, answer, schema in zip(verdicts, answers, schemas, strict=True):
        if found != "valid":
            print(f"  {found}: {json.dumps(schema)[:300]} -> ... {answer.text[-80:]!r}")


def verdict(
    result: GenerationResult, schema: dict[str, Any]
) -> Literal["valid", "cut off", "wrong"]:
    import jsonschema

    if result.finish_reason == "length":
        return "cut off"
    try:
        jsonschema.validate(json.loads(result.text), schema)
    except (ValueError, jsonschema.ValidationError):
        return "wrong"
    return "valid"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument(
        "--max-tokens", type=int, default=200, help="of an answer to a drawn schema"
    )
    parser.add_argument("--model", default=str(checkpoint_path()))
    args = parser.parse_args()
    with load(args.model, dtype="float32") as pipe:
        if args.rounds:
            compare(pipe, args.rounds)
        if args.schemas:
            judge(pipe, args.schemas, args.max_tokens)


if __name__ == "__main__":
    main()
