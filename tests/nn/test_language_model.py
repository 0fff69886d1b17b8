"""Which tokens get logits: the last layer leaves the others out, and the numbers stay."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import ReturnLogits
from mlx_vlm_pipes.kv_cache import increment_cache_lengths
from tests.architectures.driving import load, new_cache, relative
from tests.device import bar
from tests.fixtures_helper import FIXTURES, longest_prompts


def context(ids: np.ndarray) -> TextContext:
    return TextContext(tokens=TokenBuffer(ids.astype(np.int64)), max_length=10_000)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "phi3-longrope"])
def test_last_logits_equal_transformers(name: str, chunks: int) -> None:
    folder = FIXTURES / name
    pairs = longest_prompts(folder)
    for mode, count in ((ReturnLogits.LAST_TOKEN, 1), (ReturnLogits.VARIABLE, 3)):
        model = load(folder, mode)
        contexts = [context(ids) for ids, _ in pairs]
        kv = new_cache(model, len(contexts))
        for row, one in zip(kv.inputs[0].rows, contexts, strict=True):
            row.planned_length = len(one.tokens)
            if chunks == 2:
                one.tokens.chunk(len(one.tokens) // 2)
        if chunks == 2:
            mx.eval(model.execute(model.prepare_initial_token_inputs([contexts], kv)).logits)
            increment_cache_lengths(kv, [one.tokens.active_length for one in contexts])
            for one in contexts:
                one.tokens.advance_chunk()
        out = model.execute(model.prepare_initial_token_inputs([contexts], kv, count))
        found = np.array(out.logits).reshape(len(contexts), count, -1)
        for row_logits, (_, expected) in zip(found, pairs, strict=True):
            assert relative(row_logits, expected[-count:]) < bar(2e-5), mode


def test_more_logits_than_tokens_are_refused() -> None:
    folder = FIXTURES / "llama-tied"
    model = load(folder, ReturnLogits.VARIABLE)
    ids = longest_prompts(folder)[0][0][:2]
    kv = new_cache(model)
    with pytest.raises(InputError, match="return_n_logits 3 for a row of 2"):
        mx.eval(model.execute(model.prepare_initial_token_inputs([[context(ids)]], kv, 3)).logits)
    assert kv.inputs[0].rows[0].nbytes == 0
