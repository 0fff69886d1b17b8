"""Runs a model on its prompts and collects what an equal implementation must give.

Per prompt: `logits` [T, V] of the whole prompt without a cache (see `_rounded`), `greedy` tokens
by `generate` with its cache, and the arrays that went in. Where two readings of "right" are in use
there is a second set (`logits_alt`, `greedy_alt`, and `pixel_values_alt` or `position_ids_alt`),
and the prompt's entry says in `alt` what it stands for:

* Transparent pictures: the processors of transformers 5 put them on white; loading by path drops
  the alpha channel.
* Positions after a video: transformers 5 moves the following text by the larger of height and
  width; the original Qwen code by the largest position on any axis. They agree for short clips.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from .case import Json, Prompt
from .families import Encoded, Family, Qwen25VL
from .families.family import Arrays

MIN_RELATIVE_GAP = 5e-5  # between the two best logits, relative to the largest
LOGIT_BITS = 17  # kept of the largest logit
MIN_DISTINCT = 0.35  # share of distinct tokens in a greedy continuation
MAX_REPEATS = 4
MIN_PIXEL_EFFECT = 0.02  # of mirrored pixels on the last logits, relative to the largest
ALT_PIXELS = (
    "transparency dropped (what loading by path does in transformers); the main reference puts "
    "transparent pictures on white (what its processors do)"
)
ALT_POSITIONS = (
    "positions after a video continue from the largest position on any axis (time included); the "
    "main reference counts height and width only"
)


class Rejected(Exception):
    """Random weights that make a poor test."""


@dataclass(frozen=True)
class Run:
    """A prompt's logits [T, V] and its greedy continuation."""

    logits: np.ndarray
    greedy: list[int]


def check_media_matter(model: PreTrainedModel, family: Family, encoded: list[Encoded]) -> None:
    """Raises Rejected where mirrored pixels hardly move the logits."""
    for one in encoded:
        for key in ("pixel_values", "pixel_values_videos"):
            if key not in one.arrays:
                continue
            mirrored = {**one.arrays, key: one.arrays[key][..., ::-1].copy()}
            a, b = (forward(model, family.inputs(one.ids, x))[-1] for x in (one.arrays, mirrored))
            if np.abs(a - b).max() < MIN_PIXEL_EFFECT * np.abs(a).max():
                raise Rejected("the pictures hardly change the answer")


def run_prompt(
    model: PreTrainedModel, family: Family, prompt: Prompt, encoded: Encoded, max_new: int
) -> tuple[Arrays, Json]:
    """The arrays of one prompt, under their names in reference.npz, and its entry in the JSON."""
    main = _generate(model, family, encoded.ids, encoded.arrays, max_new)
    fact = {
        "name": prompt.name,
        "raw": prompt.text is not None,
        "prompt": encoded.text,
        "messages": prompt.messages,
        "n_tokens": len(encoded.ids),
        "fps": prompt.fps,
        "max_abs_logit": float(np.abs(main.logits).max()),
        "min_relative_gap": relative_gap(main.logits),
        "greedy_text": family.hf_tokenizer.decode(main.greedy, skip_special_tokens=True),
    }
    arrays: Arrays = {"input_ids": np.array(encoded.ids, dtype=np.int32), **_stored(main)}
    arrays.update(encoded.arrays)
    alt = None
    if encoded.opaque is not None:
        alt = _generate(model, family, encoded.ids, encoded.opaque, max_new)
        arrays["pixel_values_alt"] = encoded.opaque["pixel_values"]
        fact["alt"] = ALT_PIXELS
    if isinstance(family, Qwen25VL) and encoded.arrays:
        ours, by_time = _positions(model, family, encoded, main.logits)
        arrays["position_ids"] = ours.astype(np.int32)
        fact["position_conventions_agree"] = bool((ours == by_time).all())
        if not fact["position_conventions_agree"]:
            alt = _generate_by_time(model, family, encoded, max_new)
            arrays["position_ids_alt"] = by_time.astype(np.int32)
            fact["alt"] = ALT_POSITIONS
    if alt is not None:
        arrays.update({f"{key}_alt": value for key, value in _stored(alt).items()})
    return {f"{prompt.name}/{key}": value for key, value in arrays.items()}, fact


def forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Logits [T, V] without a cache."""
    _forget_positions(model)
    return model(**inputs, use_cache=False).logits[0].float().numpy()


def relative_gap(logits: np.ndarray) -> float:
    best = np.partition(logits, -2, axis=-1)[..., -2:]
    return float((best[..., 1] - best[..., 0]).min() / np.abs(logits).max())


def _forget_positions(model: PreTrainedModel) -> None:
    """Qwen2.5-VL keeps the rope deltas of its last prompt on the model."""
    inner = getattr(model, "model", None)
    if hasattr(inner, "rope_deltas"):
        inner.rope_deltas = None


def _stored(run: Run) -> Arrays:
    return {"logits": _rounded(run.logits), "greedy": np.array(run.greedy, dtype=np.int32)}


def _rounded(logits: np.ndarray) -> np.ndarray:
    """Logits to 4e-6 of the largest: float32 noise goes, and with it a quarter of the bytes."""
    step = 2.0 ** (np.floor(np.log2(np.abs(logits).max())) - LOGIT_BITS)
    return (np.round(logits / step) * step).astype(np.float32)


def greedy_config(family: Family, max_new: int) -> GenerationConfig:
    """Exactly max_new greedy tokens, with the logits that each was chosen from."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new,
        eos_token_id=None,
        pad_token_id=family.token_ids()["pad_token_id"],
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _generate(
    model: PreTrainedModel, family: Family, ids: list[int], arrays: Arrays, max_new: int
) -> Run:
    inputs = family.inputs(ids, arrays)
    logits = forward(model, inputs)
    _forget_positions(model)
    out = model.generate(**inputs, generation_config=greedy_config(family, max_new))
    tokens = out.sequences[0, len(ids) :].tolist()
    steps = torch.cat(out.logits).float().numpy()
    _check(family, tokens, logits, steps)
    if np.abs(steps[0] - logits[-1]).max() > 1e-4 * np.abs(logits).max():
        raise RuntimeError("generation does not start from the same logits")
    return Run(logits, tokens)


def _generate_by_time(
    model: PreTrainedModel, family: Qwen25VL, encoded: Encoded, max_new: int
) -> Run:
    """Greedy tokens without a cache, at positions that count time."""
    ids, steps = list(encoded.ids), []
    positions = family.positions(ids, encoded.arrays, counts_time=True)
    for _ in range(max_new):
        inputs = family.inputs(ids, encoded.arrays)
        inputs["position_ids"] = torch.from_numpy(positions)[:, None]
        steps.append(forward(model, inputs))
        ids.append(int(steps[-1][-1].argmax()))
        positions = np.concatenate([positions, np.full((3, 1), positions.max() + 1)], axis=1)
    tokens = ids[len(encoded.ids) :]
    _check(family, tokens, steps[0], np.stack([s[-1] for s in steps]))
    return Run(steps[0], tokens)


def _positions(
    model: PreTrainedModel, family: Qwen25VL, encoded: Encoded, logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both conventions, the first of which must be the model's own."""
    ours, by_time = (
        family.positions(encoded.ids, encoded.arrays, counts_time=flag) for flag in (False, True)
    )
    inputs = family.inputs(encoded.ids, encoded.arrays)
    inputs["position_ids"] = torch.from_numpy(ours)[:, None]
    if np.abs(forward(model, inputs) - logits).max() > 1e-4 * np.abs(logits).max():
        raise RuntimeError("positions computed here differ from the model's")
    return ours, by_time


def _check(family: Family, tokens: list[int], logits: np.ndarray, steps: np.ndarray) -> None:
    special = set(family.files.ids.values())
    if any(t in special or t >= family.files.size for t in tokens):
        raise Rejected("special token in the continuation")
    window = MAX_REPEATS + 1
    runs = (tokens[i : i + window] for i in range(len(tokens) - MAX_REPEATS))
    if len(set(tokens)) < MIN_DISTINCT * len(tokens) or any(len(set(r)) == 1 for r in runs):
        raise Rejected("the continuation repeats itself")
    if min(relative_gap(logits), relative_gap(steps)) < MIN_RELATIVE_GAP:
        raise Rejected("two logits nearly tie")
