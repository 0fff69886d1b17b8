"""What docs/api.md promises of every architecture with pictures, beside `contract.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import TextAndVisionContext
from mlx_vlm_pipes.errors import CheckpointError, ConfigError, ImageTokenMismatch
from mlx_vlm_pipes.interfaces import Model
from tests.api.contract import Contract
from tests.api.driving import (
    BAR,
    build,
    model_of,
    new_cache,
    prefill,
    relative,
    row_logits,
    with_config,
)

DROPPED = np.iinfo(np.int32).min


class VisionContract(Contract):
    """`changes`: a change of each input field, which must change the logits.

    effective: keys of config.json that change the logits; refused: those that contradict weights
    or prompt. Keys of a part are written part__key.
    """

    vision_fields: ClassVar[Sequence[str]]  # None in a step without pictures
    changes: ClassVar[dict[str, Any]]
    effective: ClassVar[dict[str, Any]]
    refused: ClassVar[dict[str, Any]]

    @staticmethod
    def only(field: Any) -> mx.array:
        """A field's array; some rooms hold it in a list of one, for the one device."""
        return field[0] if isinstance(field, list) else field

    def logits(self, **changes: Callable[[mx.array], mx.array]) -> np.ndarray:
        """Of the first prompt, with some fields of its inputs changed."""
        model, context = model_of(self.room), self.room.context(self.room.prompts[0])
        inputs = model.prepare_initial_token_inputs([[context]], new_cache(model))
        for name, change in changes.items():
            old = getattr(inputs, name)
            new = change(self.only(old))
            setattr(inputs, name, [new] if isinstance(old, list) else new)
        return np.array(model.execute(inputs).logits)

    def test_every_field_of_the_inputs_has_its_effect(self) -> None:
        plain = self.logits()
        for name, change in self.changes.items():
            assert relative(self.logits(**{name: change}), plain) > 1e-4, name
        known = {"tokens", *self.changes, *self.documented_without_effect, *self.bounds}
        assert known >= set(self.vision_fields)

    documented_without_effect: ClassVar[Sequence[str]] = ()
    bounds: ClassVar[Sequence[str]] = ()  # refused where they are too small

    def test_fields_without_effect_are_right_all_the_same(self) -> None:
        for name in self.documented_without_effect:
            changed = self.logits(**{name: lambda array: array * 2 + 1})
            np.testing.assert_array_equal(changed, self.logits())

    def test_pictures_are_inputs_of_the_first_step_only(self) -> None:
        model, context = model_of(self.room), self.room.context(self.room.prompts[0])
        inputs, _ = prefill(model, [context])
        assert inputs.has_vision_inputs
        assert all(getattr(inputs, name) is not None for name in self.vision_fields)
        following = model.prepare_next_token_inputs(mx.array([1]), inputs)
        assert not following.has_vision_inputs
        assert all(getattr(following, name) is None for name in self.vision_fields)

    def test_vision_rows_without_a_place_and_of_another_number(self) -> None:
        """Dropped rows leave the placeholders' own embeddings; a wrong number is an error."""
        dropped = self.logits(image_token_indices=lambda a: mx.full(a.shape, DROPPED, mx.int32))
        model, context = model_of(self.room), self.room.context(self.room.prompts[0])
        context.images = []
        _, outputs = prefill(model, [context])
        if self.plain_positions:
            assert relative(dropped, np.array(outputs.logits)) < BAR
        with pytest.raises(ImageTokenMismatch, match="vision rows for"):
            self.logits(image_token_indices=lambda a: a[1:])

    plain_positions: ClassVar[bool] = True  # pictures take positions as text does

    def test_indices_point_at_the_placeholders(self) -> None:
        model, contexts = model_of(self.room), self.room.contexts()
        inputs = model.prepare_initial_token_inputs([contexts], new_cache(model, 2))
        wanted, begin = [], 0
        for context in contexts:
            assert isinstance(context, TextAndVisionContext)
            wanted += (context.image_token_indices + begin).tolist()
            begin += context.tokens.active_length
        assert np.array(self.only(inputs.image_token_indices)).tolist() == wanted

    def test_the_parts_called_by_hand_make_the_whole(self) -> None:
        model, contexts = model_of(self.room), self.room.contexts()
        inputs = model.prepare_initial_token_inputs([contexts], new_cache(model, 2))
        assert isinstance(model.vision_model, Model)
        rows = model.vision_model(*self.vision_arguments(inputs))
        assert rows.shape[0] == self.only(inputs.image_token_indices).shape[0]
        assert rows.shape[1] == (1 + self.features) * self.room.text_json["hidden_size"]
        outputs = model.language_model(*self.language_arguments(inputs, rows))
        for prompt, got in zip(self.room.prompts, row_logits(outputs), strict=True):
            assert relative(got, self.room.logits(prompt)) < BAR

    features: ClassVar[int] = 0  # rows beside each vision row, for the first layers

    def vision_arguments(self, inputs: Any) -> list[mx.array]:
        raise NotImplementedError

    def language_arguments(self, inputs: Any, rows: mx.array) -> list[Any]:
        return [
            inputs.tokens, self.only(inputs.input_row_offsets), inputs.return_n_logits,
            inputs.kv_cache_inputs, rows, self.only(inputs.image_token_indices),
        ]  # fmt: skip

    def logits_with(self, name: str, value: Any) -> np.ndarray:
        """Of the first prompt, with one key of config.json changed."""
        config = with_config(self.room, **{name: value})
        model = build(self.room.model, self.room.folder, huggingface_config=config)
        _, outputs = prefill(model, [self.room.context(self.room.prompts[0])])
        return np.array(outputs.logits)

    def test_config_json_is_read(self) -> None:
        for name, value in self.effective.items():
            got = self.logits_with(name, value)
            assert relative(got, self.room.logits(self.room.prompts[0])) > 1e-5, name

    def test_config_json_that_contradicts_the_weights_is_refused(self) -> None:
        accepted = []
        for name, value in self.refused.items():
            try:
                self.logits_with(name, value)
            except (CheckpointError, ImageTokenMismatch) as error:
                if "\n" not in str(error):
                    continue
            accepted.append(name)
        assert accepted == []

    def test_data_parallel_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match="data_parallel_degree"):
            build(self.room.model, self.room.folder, data_parallel_degree=2)
