"""EAGLE3: the outputs of chosen decoder layers, in prefill and in the compiled decode step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.kv_cache import increment_cache_lengths
from tests.architectures.driving import load, new_cache, relative
from tests.device import bar
from tests.engine.driving import FAMILIES, Driven, fixture_requests
from tests.fixtures_helper import FIXTURES, reference

BAR = bar(2e-5)
# what transformers takes beside the tokens
INPUTS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
STEPS = 2  # last tokens of a prompt that are decoded, not prefilled


def eagle(folder: Path, mode: ReturnLogits, *layers: int) -> Any:
    return load(folder, mode, ReturnHiddenStates.EAGLE3, layers)


def first_prompt(folder: Path) -> str:
    """The name of a prompt; with a picture in it, where the room sees."""
    return next(iter(fixture_requests(folder)))


def captured(model: Any, folder: Path, name: str) -> np.ndarray:
    """[T, k * E] of a stored prompt: two chunks, then decode steps."""
    request, ids = fixture_requests(folder)[name], reference(folder)[1][f"{name}/input_ids"]
    context = Driven(folder).context(request["prompt"], request["images"])
    assert context.tokens.all.tolist() == ids.tolist()
    kv, parts = new_cache(model), []
    for size in (4, len(ids) - 4 - STEPS):
        context.tokens.chunk(size)
        inputs = model.prepare_initial_token_inputs([[context]], kv)
        parts.append(np.array(model.execute(inputs).hidden_states))
        increment_cache_lengths(kv, [size])
        context.tokens.advance_chunk()
    for token in ids[-STEPS:].tolist():
        inputs = model.prepare_next_token_inputs(mx.array([token]), inputs)
        parts.append(np.array(model.execute(inputs).hidden_states))
        increment_cache_lengths(kv, [1])
    assert [len(part) for part in parts] == [4, len(ids) - 4 - STEPS, *[1] * STEPS]
    return np.concatenate(parts)


@pytest.mark.parametrize("mode", [ReturnLogits.LAST_TOKEN, ReturnLogits.ALL])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_makes_the_stored_logits(name: str, mode: ReturnLogits) -> None:
    folder = FIXTURES / name
    model = eagle(folder, mode, -1, 0)
    width = model.language.decoder.config.hidden_size
    name = first_prompt(folder)
    states = captured(model, folder, name)
    assert states.shape[1] == 2 * width
    logits = np.array(model.language.decoder.logits(mx.array(states[:, :width])))
    assert relative(logits, reference(folder)[1][f"{name}/logits"]) < BAR
    assert relative(states[:, width:], states[:, :width]) > 0.1
    assert relative(captured(eagle(folder, mode, 0), folder, name), states[:, width:]) < BAR


def test_an_empty_batch_has_as_many_columns() -> None:
    model = eagle(FIXTURES / "llama-tied", ReturnLogits.ALL, 1, 1, 2)
    out = model.execute(model.prepare_initial_token_inputs([[]], new_cache(model, 0)))
    assert out.hidden_states.shape == (0, 3 * model.language.decoder.config.hidden_size)


@pytest.mark.parametrize(
    ("layers", "mode", "message"),
    [
        (None, "eagle3", "eagle_layers missing .* from 0 to 2, or from -3 to -1"),
        ((), "eagle3", "eagle_layers missing"),
        ((0, 3), "eagle3", r"eagle_layers \[0, 3\] .* from 0 to 2"),
        ((-4,), "eagle3", "eagle_layers"),
        ((1.0,), "eagle3", r"eagle_layers \[1.0\]"),
        ((0,), "all", "eagle_layers with return_hidden_states 'all'"),
    ],
)
def test_layers_that_there_are_not(layers: tuple[int] | None, mode: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(FIXTURES / "llama-tied", ReturnLogits.ALL, ReturnHiddenStates(mode), layers)


@pytest.mark.reference
@pytest.mark.parametrize("name", [*FAMILIES, "granite", "olmo", "phi3-longrope", "internvl-qwen3"])
def test_every_layer_equals_transformers(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = FIXTURES / name
    config = transformers.AutoConfig.from_pretrained(folder)
    is_text = not hasattr(config, "vision_config")
    kind = "AutoModelForCausalLM" if is_text else "AutoModelForImageTextToText"
    theirs = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    name, arrays = first_prompt(folder), reference(folder)[1]
    given = {n: torch.tensor(arrays[f"{name}/{n}"]) for n in INPUTS if f"{name}/{n}" in arrays}
    ids = torch.tensor(arrays[f"{name}/input_ids"][None].astype(np.int64))
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == config.image_token_id).long()
    with torch.no_grad():
        states = theirs(ids, **given, output_hidden_states=True).hidden_states
    inner = len(states) - 2  # the first is the embedding's, the last is behind the final norm
    model = eagle(folder, ReturnLogits.LAST_TOKEN, *range(inner))
    wanted = np.concatenate([state[0].numpy() for state in states[1:-1]], axis=-1)
    assert relative(captured(model, folder, name), wanted) < BAR
