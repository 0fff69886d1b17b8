"""The documented log-probabilities, against those of transformers' logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import ReturnLogits
from tests.architectures.driving import load, new_cache
from tests.fixtures_helper import FIXTURES, reference

FOLDER = FIXTURES / "llama-tied"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_sampled_and_prompt_tokens_are_scored() -> None:
    model, (facts, arrays) = load(FOLDER), reference(FOLDER)
    names = [fact["name"] for fact in facts["prompts"]][:3]
    prompts = [arrays[f"{name}/input_ids"].astype(np.int64) for name in names]
    contexts = [TextContext(max_length=10_000, tokens=TokenBuffer(ids)) for ids in prompts]
    inputs = model.prepare_initial_token_inputs([contexts], new_cache(model, 3))
    outputs = model.execute(inputs)
    chosen, top, echo = [5, 6, 7], [2, 0, 3], [True, True, False]
    scores = model.compute_log_probabilities(
        model.session, inputs, outputs, mx.array(chosen), top, echo
    )
    assert scores[1] is None
    for i, first in ((0, 0), (2, -1)):
        wanted = log_softmax(arrays[f"{names[i]}/logits"])[first:]
        tokens = [*prompts[i][1:], chosen[i]][first:]
        own = scores[i].token_log_probabilities
        assert own == pytest.approx(wanted[np.arange(len(tokens)), tokens], abs=1e-4)
        for place, row, token in zip(scores[i].top_log_probabilities, wanted, tokens, strict=True):
            assert set(place) == {*np.argsort(-row)[: top[i]].tolist(), int(token)}


def test_echo_needs_all_logits() -> None:
    model = load(FOLDER, ReturnLogits.LAST_TOKEN)
    context = TextContext(max_length=99, tokens=TokenBuffer(np.array([1, 2, 3])))
    inputs = model.prepare_initial_token_inputs([[context]], new_cache(model))
    with pytest.raises(InputError, match="all 3 tokens of row 0, there are 1"):
        model.compute_log_probabilities(
            model.session, inputs, model.execute(inputs), mx.array([1]), [1], [True]
        )
