"""Which adapter each token of a step takes: groups of adjacent rows (docs/api.md#lora).

A group is a maximal run of rows with one slot: 1, 2, ... in the order of `LoRAConfig.lora_paths`,
or 0, the base model's. Base rows behind the last adapter's row are in no group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.interfaces import Phase, RaggedInputs, StepMode
from mlx_vlm_pipes.steps import one_device


def group_fields(
    slots: Sequence[int], lengths: Sequence[int], ranks: Sequence[int], max_num_loras: int
) -> dict[str, mx.array]:
    """The eight LoRA inputs by name, of rows with these slots and active lengths.

    ranks: of each slot from 1 on. max_num_loras: what `lora_ids_kv` tells values from keys by.
    """
    ids, bounds = [], [0]
    rows = zip(slots, lengths, strict=True)
    for slot, run in itertools.groupby(rows, key=lambda row: row[0]):
        ids.append(slot)
        bounds.append(bounds[-1] + sum(length for _, length in run))
    if ids and ids[-1] == 0:
        ids.pop()
        bounds.pop()
    own = np.array(ids, np.int32)
    return {
        "lora_ids": mx.array(own),
        "lora_ranks": mx.array(np.array([(0, *ranks)[slot] for slot in ids], np.uint32)),
        "num_active_loras": mx.array([len(ids)], dtype=mx.int64),
        "lora_ids_kv": mx.array(np.concatenate([own, own + np.int32(max_num_loras)])),
        **_where(mx.array(np.array(bounds, np.uint32)), sum(lengths)),
    }


def next_group_fields(prev: RaggedInputs[Any]) -> dict[str, mx.array]:
    """What changes of them in the decode step after `prev`: rows are one token long. Lazy.

    A row keeps the adapter of its last token.
    """
    bounds = prev.lora_grouped_offsets
    if bounds is None or prev.phase is Phase.DECODE:
        return {}
    ends = one_device(prev.input_row_offsets)[1:]
    rows_before = mx.sum(ends <= bounds[:, None], axis=1)
    return _where(rows_before.astype(mx.uint32), ends.shape[0])


def _where(bounds: mx.array, tokens: int) -> dict[str, mx.array]:
    """The fields that depend on the groups' token offsets, uint32 [G + 1]."""
    end = bounds[-1:]
    return {
        "lora_grouped_offsets": bounds,
        "lora_end_idx": end.astype(mx.int64),
        "batch_seq_len": mx.array([tokens], dtype=mx.int64),
        "lora_grouped_offsets_kv": mx.concatenate([bounds, bounds[1:] + end]),
    }


def token_slots(mode: StepMode, tokens: int, adapters: Sequence[str]) -> mx.array | None:
    """Each token's slot, int32 [tokens], from the groups alone; None where no adapter is loaded.

    Tokens behind the last group, and all of them without groups, are the base model's. The ids
    are read on the host, the offsets are not.
    Raises: InputError for a slot without an adapter, and for offsets that do not go with the ids.
    """
    ids, bounds = mode.lora_ids, mode.lora_grouped_offsets
    if ids is None:
        return mx.zeros((tokens,), mx.int32) if adapters else None
    named = np.array(ids)
    wrong = named[(named < 0) | (named > len(adapters))]
    if wrong.size:
        loaded = ", ".join(adapters) or "none"
        raise InputError(f"lora_ids name slot {wrong[0]}; slots from 1 are: {loaded}")
    if not adapters:
        return None
    if bounds is None or bounds.shape != (len(named) + 1,):
        found = "none" if bounds is None else list(bounds.shape)
        raise InputError(
            f"lora_grouped_offsets {found} for {len(named)} lora_ids; expected one more"
        )
    places = mx.arange(tokens, dtype=mx.uint32)[:, None]
    group = mx.sum(bounds[1:] <= places, axis=1)
    return mx.concatenate([ids.astype(mx.int32), mx.zeros((1,), mx.int32)])[group]


def host_slots(mode: StepMode, tokens: int) -> np.ndarray:
    """token_slots on the host, int [tokens]: reads the offsets too."""
    slots = np.zeros(tokens, np.int64)
    if mode.lora_ids is not None and mode.lora_grouped_offsets is not None:
        bounds: list[int] = np.array(mode.lora_grouped_offsets).tolist()
        ids: list[int] = np.array(mode.lora_ids).tolist()
        for slot, (begin, end) in zip(ids, itertools.pairwise(bounds), strict=True):
            slots[begin:end] = slot
    return slots
