"""The documented log-probabilities, against those of transformers' logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import Pipeline
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.dtypes import default_device
from mlx_vlm_pipes.engine.engine import Engine
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import ReturnLogits
from tests.architectures.driving import load, new_cache
from tests.device import bar
from tests.engine.driving import FAMILIES, Driven, fixture_requests
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
    with pytest.raises(InputError, match=r"all 3 tokens of row 0, there are 1; .*enable_echo=True"):
        model.compute_log_probabilities(
            model.session, inputs, model.execute(inputs), mx.array([1]), [1], [True]
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_over_a_model_with_enable_echo(name: str) -> None:
    """All logits of every prompt, the engine's slices and batches as with a model of load()."""
    folder, worker = FIXTURES / name, OwnerThread(default_device())
    facts, arrays = reference(folder)
    model = worker.call(lambda: load(folder, ReturnLogits.LAST_TOKEN, enable_echo=True))
    assert model.return_logits is ReturnLogits.ALL
    engine = Engine(worker, model, EngineConfig(prefill_chunk=7))
    prompts = fixture_requests(folder)
    names = [n for n, request in prompts.items() if not request["videos"]][:3]
    requests = [prompts[n] | {"prompt_logprobs": n == names[1]} for n in names]
    for request in requests:
        request["prompt" if request["raw"] else "messages"] = request.pop("prompt")
    pipe = Pipeline(model, Driven(folder).processor, engine)
    answers = pipe.generate_batch(requests, max_tokens=facts["max_new"])
    logits = pipe.logits(**prompts[names[0]])
    pipe.close()
    for one, answer in zip(names, answers, strict=True):
        assert answer.tokens == arrays[f"{one}/greedy"].tolist()
    wanted = arrays[f"{names[0]}/logits"]
    assert np.abs(logits - wanted).max() < bar(2e-5) * np.abs(wanted).max()
    ids = arrays[f"{names[1]}/input_ids"]
    scores = log_softmax(arrays[f"{names[1]}/logits"])[np.arange(len(ids) - 1), ids[1:]]
    assert answers[1].prompt_logprobs.token_log_probabilities == pytest.approx(scores, abs=5e-4)
