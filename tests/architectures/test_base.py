"""What the contract promises of every room: phases, empty batches, no rows without a picture."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.errors import ImageTokenMismatch, InputError
from mlx_vlm_pipes.interfaces import Phase, ReturnLogits
from mlx_vlm_pipes.kv_cache import increment_cache_lengths
from tests.architectures.driving import load, new_cache, relative
from tests.device import bar
from tests.engine.driving import FAMILIES
from tests.fixtures_helper import FIXTURES, reference

LLAMA = FIXTURES / "llama-tied"


@pytest.mark.parametrize("mode", ReturnLogits)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_batch_is_legal(name: str, mode: ReturnLogits) -> None:
    model = load(FIXTURES / name, mode)
    inputs = model.prepare_initial_token_inputs([[]], new_cache(model, 0))
    assert inputs.phase is Phase.PREFILL
    for _ in range(2):
        out = model.execute(inputs)
        vocab = model.language.decoder.config.vocab_size
        assert (out.logits.shape, out.logits.dtype) == ((0, vocab), mx.float32)
        assert out.next_token_logits.shape == (0, vocab)
        assert out.logit_offsets is None or out.logit_offsets.tolist() == [0]
        inputs = model.prepare_next_token_inputs(mx.zeros((0,), mx.uint32), inputs)


def text(ids: list[int]) -> TextContext:
    return TextContext(max_length=10_000, tokens=TokenBuffer(np.array(ids)))


def test_the_phase_says_what_a_step_does() -> None:
    """Slices of 1 and of 2 tokens: only a lone last token decodes; numbers as transformers'."""
    model, arrays = load(LLAMA), reference(LLAMA)[1]
    name = reference(LLAMA)[0]["prompts"][0]["name"]
    ids, expected = arrays[f"{name}/input_ids"].tolist(), arrays[f"{name}/logits"]
    for size in (1, 2):
        request, kv, found, phases = text(ids), new_cache(model), [], []
        inputs = None
        while request.tokens.active_length:
            request.tokens.chunk(min(size, request.tokens.active_length))
            inputs = model.prepare_initial_token_inputs([[request]], kv, 1)
            assert inputs.return_n_logits.dtype == mx.int64
            phases.append(inputs.phase)
            found.append(np.array(model.execute(inputs).logits))
            increment_cache_lengths(kv, [request.tokens.active_length])
            request.tokens.advance_chunk()
        last = Phase.DECODE if len(ids) % size == 1 or size == 1 else Phase.PREFILL
        assert phases == [*[Phase.PREFILL] * (len(phases) - 1), last]
        assert relative(np.concatenate(found), expected) < bar(1e-5)
        following = model.prepare_next_token_inputs(mx.array([1]), inputs)
        assert following.phase is Phase.DECODE
    both = model.prepare_initial_token_inputs([[text([1]), text([1, 2])]], new_cache(model, 2))
    assert both.phase is Phase.PREFILL


@pytest.mark.parametrize(
    ("name", "message"), [("llama-tied", "for a text model"), ("idefics3", "3 vision rows for 0")]
)
def test_vision_rows_without_a_picture_are_refused(name: str, message: str) -> None:
    model = load(FIXTURES / name)
    rows = mx.zeros((3, model.language.decoder.config.hidden_size))
    with pytest.raises((InputError, ImageTokenMismatch), match=message):
        model.execute(
            model.prepare_initial_token_inputs(
                [[text([1, 2])]], new_cache(model), image_embeddings=rows
            )
        )
