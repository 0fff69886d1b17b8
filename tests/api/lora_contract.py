"""What docs/api.md promises of LoRA in every room: chosen by `model_name`, read from the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.quantization import LoRAConfig
from tests.api.driving import (
    Room,
    build,
    decode,
    merged_folder,
    new_cache,
    prefill,
    relative,
    row_logits,
    write_adapter,
)
from tests.device import bar

MERGED_BAR = bar(5e-5)  # of the largest logit: W x + scale * B (A x) against (W + scale * B A) x
SLOTS = 4  # max_num_loras


@dataclass(frozen=True)
class Adapted:
    """A model with adapters a and b; logits and five greedy tokens of the merged checkpoints."""

    model: Any
    merged: dict[str, tuple[np.ndarray, list[int]]]


def adapted_model(room: Room, root: Path) -> Adapted:
    adapters = {
        "a": write_adapter(room, root / "first", 2, ["q_proj", "v_proj"]),
        "b": write_adapter(room, root / "second", 3, ["k_proj", "o_proj"]),
    }
    merged = {"": (room.logits(room.prompts[0]), room.greedy(room.prompts[0]))}
    for name, adapter in adapters.items():
        plain = build(room.model, merged_folder(room, adapter, root / f"merged-{name}"))
        inputs, outputs = prefill(plain, [room.context(room.prompts[0])])
        merged[name] = (np.array(outputs.logits), decode(plain, inputs, outputs)[0])
    paths = [f"{name}={adapter.folder}" for name, adapter in adapters.items()]
    lora = LoRAConfig(enable_lora=True, lora_paths=paths, max_num_loras=SLOTS)
    return Adapted(build(room.model, room.folder, lora=lora), merged)


class LoRAContract:
    """Adapters `a` (slot 1) and `b` (slot 2) beside the base model of one room."""

    room: ClassVar[Room]

    def rows(self, names: list[str]) -> list[Any]:
        return [self.room.context(self.room.prompts[0], model_name=name) for name in names]

    def test_two_adapters_and_the_base_in_one_batch(self, adapted: Adapted) -> None:
        names = ["a", "", "b", ""]
        inputs, outputs = prefill(adapted.model, self.rows(names))
        for name, got in zip(names, row_logits(outputs), strict=True):
            assert relative(got, adapted.merged[name][0]) < MERGED_BAR, name
        assert relative(adapted.merged["a"][0], adapted.merged[""][0]) > 0.1
        answers = decode(adapted.model, inputs, outputs)
        assert answers == [adapted.merged[name][1] for name in names]

    @pytest.mark.parametrize("name", ["a", "b", ""])
    def test_each_alone_in_two_chunks(self, adapted: Adapted, name: str) -> None:
        model, (context,) = adapted.model, self.rows([name])
        kv, parts = new_cache(model), []
        context.tokens.chunk(self.room.cut)
        parts.append(np.array(prefill(model, [context], kv)[1].logits))
        context.tokens.advance_chunk()
        inputs, outputs = prefill(model, [context], kv)
        parts.append(np.array(outputs.logits))
        assert relative(np.concatenate(parts), adapted.merged[name][0]) < MERGED_BAR
        assert decode(model, inputs, outputs) == [adapted.merged[name][1]]

    def test_the_inputs_name_the_groups(self, adapted: Adapted) -> None:
        model = adapted.model
        inputs = model.prepare_initial_token_inputs(
            [self.rows(["a", "a", "", "b", ""])], new_cache(model, 5)
        )
        same(inputs.lora_ids, mx.int32, [1, 0, 2])
        same(inputs.lora_ranks, mx.uint32, [2, 0, 3])
        following = model.prepare_next_token_inputs(mx.array([1] * 5), inputs)
        same(following.lora_ids, mx.int32, [1, 0, 2])
        base = model.prepare_initial_token_inputs([self.rows([""])], new_cache(model))
        same(base.lora_ids, mx.int32, [])
        same(base.lora_ranks, mx.uint32, [])

    def test_execute_reads_the_inputs_and_nothing_else(self, adapted: Adapted) -> None:
        model = adapted.model
        for slot, name in ((2, "b"), (0, "")):
            inputs = model.prepare_initial_token_inputs([self.rows(["a"])], new_cache(model))
            inputs.update(lora_ids=mx.array([slot], mx.int32))
            got = model.execute(inputs).logits
            assert relative(got, adapted.merged[name][0]) < MERGED_BAR

    def test_an_unknown_name_lists_the_loaded_ones(self, adapted: Adapted) -> None:
        model = adapted.model
        with pytest.raises(InputError, match=r"'nobody'.*a, b") as caught:
            model.prepare_initial_token_inputs([self.rows(["a", "nobody"])], new_cache(model, 2))
        assert isinstance(caught.value, RuntimeError)
        assert "\n" not in str(caught.value)

    def test_without_adapters_there_are_no_groups(self) -> None:
        model = build(self.room.model, self.room.folder)
        inputs = model.prepare_initial_token_inputs([self.rows([""])], new_cache(model))
        assert inputs.lora_ids is None
        assert inputs.lora_ranks is None
        with pytest.raises(InputError, match=r"'a'.*none"):
            model.prepare_initial_token_inputs([self.rows(["a"])], new_cache(model))


def same(array: Any, dtype: mx.Dtype, values: list[int]) -> None:
    assert array is not None
    assert (array.dtype, np.array(array).tolist()) == (dtype, values)
