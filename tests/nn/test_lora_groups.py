"""The documented LoRA inputs: groups of adjacent rows, and what a step takes from them."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.llama3.model import Llama3Inputs
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import Phase, StepMode
from mlx_vlm_pipes.nn.lora_groups import group_fields, next_group_fields, token_slots

DTYPES = {
    "lora_ids": mx.int32, "lora_ranks": mx.uint32, "lora_grouped_offsets": mx.uint32,
    "num_active_loras": mx.int64, "lora_end_idx": mx.int64, "batch_seq_len": mx.int64,
    "lora_ids_kv": mx.int32, "lora_grouped_offsets_kv": mx.uint32,
}  # fmt: skip
# slots, lengths -> the eight fields, in the order of DTYPES; ranks 4 and 8, max_num_loras 5
CASES = [
    (
        [1, 1, 0, 2, 0, 0], [3, 2, 4, 1, 2, 2],
        [[1, 0, 2], [4, 0, 8], [0, 5, 9, 10], [3], [10], [14],
         [1, 0, 2, 6, 5, 7], [0, 5, 9, 10, 15, 19, 20]],
    ),
    ([2, 1, 2], [1, 1, 1],
     [[2, 1, 2], [8, 4, 8], [0, 1, 2, 3], [3], [3], [3],
      [2, 1, 2, 7, 6, 7], [0, 1, 2, 3, 4, 5, 6]]),
    ([0, 0], [3, 1], [[], [], [0], [0], [0], [4], [], [0]]),
    ([], [], [[], [], [0], [0], [0], [0], [], [0]]),
]  # fmt: skip


def inputs_of(slots: list[int], lengths: list[int]) -> Llama3Inputs:
    return Llama3Inputs(
        mx.zeros((sum(lengths),), mx.int32),
        mx.array(np.cumsum([0, *lengths]).astype(np.uint32)),
        [],
        mx.array([1]),
        **group_fields(slots, lengths, [4, 8], 5),
    )


@pytest.mark.parametrize(("slots", "lengths", "wanted"), CASES)
def test_rows_make_groups(slots: list[int], lengths: list[int], wanted: list[list[int]]) -> None:
    made = inputs_of(slots, lengths)
    for (name, dtype), values in zip(DTYPES.items(), wanted, strict=True):
        array = getattr(made, name)
        assert (name, array.dtype, np.array(array).tolist()) == (name, dtype, values)
    taken = token_slots(made.mode, sum(lengths), ["a", "b"])
    assert taken.dtype == mx.int32
    assert np.array(taken).tolist() == np.repeat(slots, lengths).tolist()


@pytest.mark.parametrize(("slots", "lengths", "wanted"), CASES)
def test_the_next_step_has_rows_of_one_token(
    slots: list[int], lengths: list[int], wanted: list[list[int]]
) -> None:
    del wanted
    made, alone = inputs_of(slots, lengths), inputs_of(slots, [1] * len(slots))
    made = replace(made, **next_group_fields(made), phase=Phase.DECODE)
    for name, dtype in DTYPES.items():
        array = getattr(made, name)
        assert array.dtype == dtype
        assert np.array(array).tolist() == np.array(getattr(alone, name)).tolist(), name
    assert next_group_fields(made) == {}  # rows are one token long already


def test_a_row_keeps_the_adapter_of_its_last_token() -> None:
    made = inputs_of([0, 0], [4, 4])
    made.lora_ids = mx.array([1, 2], mx.int32)
    made.lora_grouped_offsets = mx.array([0, 5, 6], mx.uint32)
    assert np.array(token_slots(made.mode, 8, ["a", "b"])).tolist() == [1] * 5 + [2, 0, 0]
    made = replace(made, **next_group_fields(made), phase=Phase.DECODE)
    assert np.array(token_slots(made.mode, 2, ["a", "b"])).tolist() == [1, 0]


def test_groups_that_fit_nothing_are_refused() -> None:
    one, two = mx.array([1], mx.int32), mx.array([0, 3], mx.uint32)
    assert token_slots(StepMode(), 3, []) is None
    assert np.array(token_slots(StepMode(), 3, ["a"])).tolist() == [0, 0, 0]
    for ids, bounds, loaded, message in (
        (one, two, [], "name slot 1; slots from 1 are: none"),
        (one + 1, two, ["a"], "name slot 2; slots from 1 are: a"),
        (one - 2, two, ["a"], "name slot -1"),
        (one, None, ["a"], "lora_grouped_offsets none for 1 lora_ids"),
        (one, two[:1], ["a"], r"lora_grouped_offsets \[1\] for 1 lora_ids"),
    ):
        with pytest.raises(InputError, match=message):
            token_slots(StepMode(Phase.PREFILL, ids, bounds), 3, loaded)
