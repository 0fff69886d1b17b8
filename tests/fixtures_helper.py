"""The stored checkpoints and the reference outputs that lie next to them.

`python -m tools.make_fixtures tests/fixtures` writes them with torch and transformers; reading
them takes numpy only.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
# The stored pixels were made with Pillow 13, whose resizing and alpha blending round differently
# from older releases (Python 3.10 gets none newer); transformers differs from them alike.
SAME_PILLOW = int(version("pillow").split(".")[0]) >= 13


def cases(family: str | None = None) -> list[Path]:
    """Checkpoint folders in order of name, of one family (`reference.json`'s "family") or all."""
    folders = sorted(p.parent for p in FIXTURES.glob("*/reference.json"))
    return [f for f in folders if family in (None, _facts(f)["family"])]


def reference(path: Path) -> tuple[dict[str, Any], np.lib.npyio.NpzFile]:
    """The facts (prompts, messages, media, batch) and arrays (`<prompt>/logits`, ...) of a case."""
    return _facts(path), np.load(path / "reference.npz")


def arguments(folder: Path, fact: dict[str, Any]) -> dict[str, Any]:
    """A fixture's prompt as keyword arguments of the pipeline's methods."""
    return {
        "prompt": fact["prompt"] if fact["raw"] else fact["messages"],
        "images": [str(folder / name) for name in fact["images"]],
        "videos": [[str(folder / name) for name in clip] for clip in fact["videos"]],
        "raw": fact["raw"],
        "fps": fact["fps"],
    }


def copy_case(case: str, target: Path) -> Path:
    """A checkpoint without its references, in a new folder that a test may change."""
    target.mkdir()
    for file in (FIXTURES / case).iterdir():
        if file.is_file() and not file.name.startswith("reference"):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def longest_prompts(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and transformers' logits of the two longest prompts."""
    facts, arrays = reference(path)
    names = [fact["name"] for fact in facts["prompts"]]
    pairs = [(arrays[f"{name}/input_ids"], arrays[f"{name}/logits"]) for name in names]
    return sorted(pairs, key=lambda pair: len(pair[0]))[-2:]


def _facts(path: Path) -> dict[str, Any]:
    return json.loads((path / "reference.json").read_text(encoding="utf-8"))
