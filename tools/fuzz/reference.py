"""What transformers makes of a checkpoint and a request."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from tools.make_fixtures.case import Json, Prompt
from tools.make_fixtures.families import Encoded, Qwen25VL
from tools.make_fixtures.families.family import Arrays, Family, Pictures
from tools.make_fixtures.reference_run import forward, greedy_config, relative_gap

from .checkpoint import Checkpoint
from .knobs import TEXT
from .requests import Media, messages_of


@dataclass(frozen=True)
class Reference:
    """ids; arrays of the processors; logits [T, V]; greedy tokens and how clearly each won."""

    ids: list[int]
    text: str
    arrays: Arrays
    logits: np.ndarray
    greedy: list[int]
    gaps: list[float]


def encode(checkpoint: Checkpoint, request: Json, media: Media) -> Encoded:
    """The prompt by AutoTokenizer and the processors of transformers."""
    family = checkpoint.family
    messages = messages_of(request, as_strings=family.case.family in TEXT)
    prompt = Prompt("drawn", messages=messages, fps=request["fps"])
    text = family.render(prompt)
    expanded, arrays = family.expand(text, prompt, Pictures(media.pictures, media.clips))
    return Encoded(text, family.tokenize(expanded, is_raw=request["raw"]), arrays, None)


def answer(
    checkpoint: Checkpoint, model: transformers.PreTrainedModel, encoded: Encoded, max_new: int
) -> Reference:
    """Every run has a copy of the model: some rotary embeddings remember the last prompt."""
    family = checkpoint.family
    if isinstance(family, Qwen25VL) and "video_grid_thw" in encoded.arrays:
        logits, greedy, gaps = _by_time(family, model, encoded, max_new)
    else:
        inputs = family.inputs(encoded.ids, encoded.arrays)
        logits = forward(copy.deepcopy(model), inputs)
        greedy, gaps = _generate(family, model, inputs, max_new)
    stops = {*family.files.stop_ids}
    if family.options.generation is None and not family.options.eos_list:
        stops = {family.files[family.files.style.eos]}
    ends = [i + 1 for i, token in enumerate(greedy) if token in stops]
    stop = ends[0] if ends else len(greedy)
    return Reference(encoded.ids, encoded.text, encoded.arrays, logits, greedy[:stop], gaps[:stop])


def _generate(
    family: Family,
    model: transformers.PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    max_new: int,
) -> tuple[list[int], list[float]]:
    model = copy.deepcopy(model)
    model.generation_config = GenerationConfig()  # nothing of it may come in unasked
    out = model.generate(**inputs, generation_config=greedy_config(family, max_new))
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, [relative_gap(step.float().numpy()) for step in out.logits]


def _by_time(
    family: Qwen25VL, model: transformers.PreTrainedModel, encoded: Encoded, max_new: int
) -> tuple[np.ndarray, list[int], list[float]]:
    """After a clip we count time as the original code does (README); so without a cache."""
    ids, steps = list(encoded.ids), []
    positions = family.positions(ids, encoded.arrays, counts_time=True)
    for _ in range(max_new):
        inputs = family.inputs(ids, encoded.arrays)
        inputs["position_ids"] = torch.from_numpy(positions)[:, None]
        steps.append(forward(copy.deepcopy(model), inputs))
        ids.append(int(steps[-1][-1].argmax()))
        positions = np.concatenate([positions, np.full((3, 1), positions.max() + 1)], axis=1)
    return steps[0], ids[len(encoded.ids) :], [relative_gap(s[-1:]) for s in steps]
