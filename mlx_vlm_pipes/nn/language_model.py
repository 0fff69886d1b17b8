"""The text side of every pipeline model: ragged prefill, the compiled decode step, the outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.dtypes import DeviceRef
from mlx_vlm_pipes.errors import ConfigError, InputError
from mlx_vlm_pipes.interfaces import ModelOutputs, Phase, ReturnHiddenStates, ReturnLogits, StepMode
from mlx_vlm_pipes.kv_cache import (
    KVCacheInputs,
    Layer,
    RowCacheInputs,
    Span,
    by_group,
    cache_format,
    rows_of,
)
from mlx_vlm_pipes.nn.capture import Capture
from mlx_vlm_pipes.nn.decode_step import DecodeGroup, DecodeStep
from mlx_vlm_pipes.nn.decoder import Added, DenseDecoder, PrefillRow, last_tokens
from mlx_vlm_pipes.nn.host_compiler import cpu_compiles
from mlx_vlm_pipes.nn.lora import TokenSlots
from mlx_vlm_pipes.nn.lora_groups import host_slots, token_slots
from mlx_vlm_pipes.nn.ragged import merge_image_features, placed_features

PREFILL = StepMode()
EAGER_STEPS = 16  # of a batch of several groups before it is compiled at its sizes
MOST_SIZES = 256  # that are kept compiled: a server that runs for months meets ever new ones
Step = Callable[..., Sequence[mx.array]]


def can_compile(device: DeviceRef) -> bool:
    """MLX's CPU backend compiles through g++; a GPU backend needs nothing from the host."""
    return device.is_gpu() or cpu_compiles()


def captured_layers(
    kind: ReturnHiddenStates, eagle_layers: Sequence[int] | None, count: int
) -> tuple[int, ...]:
    """The decoder layers whose outputs are returned, counted from 0, of `count` layers.

    Raises: ConfigError naming eagle_layers, where EAGLE3 has none, others have some, or a layer
    does not exist.
    """
    layers = tuple(eagle_layers or ())
    if kind is not ReturnHiddenStates.EAGLE3:
        if eagle_layers is not None:
            raise ConfigError(
                f"eagle_layers with return_hidden_states {kind.value!r}; they go with 'eagle3' only"
            )
        return ()
    wrong = [n for n in layers if type(n) is not int or not -count <= n < count]
    if wrong or not layers:
        raise ConfigError(
            f"eagle_layers {list(layers) or 'missing'} for return_hidden_states 'eagle3'; list "
            f"decoder layers from 0 to {count - 1}, or from -{count} to -1"
        )
    return tuple(layer % count for layer in layers)


class LanguageModel:
    """A decoder and its compiled step. Holds weights only; the cache comes with each call.

    adapters and adapter_ranks: names and ranks of its LoRA adapters, in the order of their slots.
    captured: the layers whose outputs are the hidden states of EAGLE3, from `captured_layers`.
    traces counts how often the compiled decode step was traced: once for each shape of the cache.
    """

    def __init__(
        self,
        decoder: DenseDecoder,
        kv_params: KVCacheParams,
        return_logits: ReturnLogits,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        *,
        captured: Sequence[int] = (),
        compile: bool = True,
    ) -> None:
        self.decoder = decoder
        self.return_logits = return_logits
        self.return_hidden_states = return_hidden_states
        self._captured = captured
        self.adapters, self.adapter_ranks = decoder.adapter_names, decoder.adapter_ranks
        self.traces = 0
        self._format = cache_format(kv_params)
        self._compiled = compile and can_compile(kv_params.devices[0])
        self._step: Step = mx.compile(self._traced_step) if self._compiled else self._decode_step
        self._runs: Counter[tuple[tuple[tuple[int, int], ...], int]] = Counter()

    @property
    def break_length(self) -> int | None:
        """Rows that grow past this length must be prefilled again (LongRoPE), or None."""
        return self.decoder.rope.break_length

    def key_table(self, reach: int) -> int:
        """Rope.table: keys of two prompts can be equal only if their reaches have the same."""
        return self.decoder.rope.table(reach)

    def key_table_end(self, reach: int) -> int | None:
        """Rope.table_end: up to which position a row of a prompt of this reach has that table."""
        return self.decoder.rope.table_end(reach)

    def __call__(
        self,
        tokens: mx.array,
        input_row_offsets: mx.array,
        return_n_logits: mx.array,
        kv_cache_inputs: KVCacheInputs,
        image_embeddings: mx.array | None = None,
        image_token_indices: mx.array | None = None,
        position_ids: mx.array | None = None,
        mode: StepMode = PREFILL,
    ) -> ModelOutputs:
        """One step over the active tokens of every row.

        Args: tokens int [T]; input_row_offsets [B + 1]; return_n_logits [1]; image_embeddings
        [M, (1 + feature_layers) * E], the rows and behind them what each of the first layers adds,
        with image_token_indices [M]; position_ids [axes, T] for M-RoPE; mode, as the inputs say
        it.
        """
        kv = rows_of(kv_cache_inputs)
        kv.require_counted()
        if not kv.rows:
            return self._no_rows(tokens)
        # Some of the rows that lie in the batch go prefill's way: placing them alone would push
        # the others out.
        if mode.phase is not Phase.PREFILL and kv.cache.can_place(kv.rows):
            width = tokens.shape[0] // len(kv.rows)
            hidden, logits = self._decode(tokens, kv, position_ids, mode)
            kv.wrote([width] * len(kv.rows))
            return self._decoded_outputs(hidden, logits, width)
        h = self.decoder.embed(tokens)
        added = None
        if image_embeddings is not None:
            if image_token_indices is None:
                raise InputError("image embeddings without image_token_indices")
            h, added = self._merge(h, image_embeddings, image_token_indices)
        h = self.decoder.scale_embeddings(h)
        bounds = np.array(input_row_offsets).astype(np.int64)
        own = token_slots(mode, tokens.shape[0], self.adapters)
        slots = None if own is None else TokenSlots(own, host_slots(mode, tokens.shape[0]))
        tail = self._tail(bounds, return_n_logits)
        rows = self._prefill_rows(kv, bounds, position_ids)
        capture = Capture(self._captured) if self._captured else None
        if self._wants_all_tokens():
            h = self.decoder.prefill(h, rows, slots, None, added, capture)
            picked = h if tail is None else h[last_tokens(rows, tail)]
        else:
            picked = h = self.decoder.prefill(h, rows, slots, tail, added, capture)
        h = h if capture is None else capture.joined()
        kv.wrote(np.diff(bounds).tolist())
        return self._outputs(h, picked, bounds, tail)

    def _merge(
        self, h: mx.array, features: mx.array, indices: mx.array
    ) -> tuple[mx.array, Added | None]:
        """Embeddings [T, E] with vision rows in them, and what the first layers add at the same
        places. Raises: ImageTokenMismatch as placed_features; InputError for another width."""
        parts = 1 + self.decoder.config.feature_layers
        if features.shape[1] != parts * h.shape[1]:
            raise InputError(
                f"vision rows of {features.shape[1]} numbers; expected {parts} x {h.shape[1]}"
            )
        placed = placed_features(features, indices, h.shape[0])
        if placed is None:
            return h, None
        rows, places = placed
        own, *more = mx.split(rows, parts, axis=1) if parts > 1 else [rows]
        return merge_image_features(h, own, places), Added(places, more) if more else None

    def _wants_all_tokens(self) -> bool:
        """Whether the last layer's output is returned for all tokens of a step."""
        every = (ReturnHiddenStates.ALL, ReturnHiddenStates.ALL_NORMALIZED)
        is_captured = self.decoder.config.num_layers - 1 in self._captured
        return is_captured or self.return_hidden_states in every

    def _tail(self, bounds: np.ndarray, return_n_logits: mx.array) -> int | None:
        """How many last tokens of each row get logits, None for all of them.

        Raises: InputError for a number below 1, or if a row has fewer tokens than that.
        """
        if self.return_logits is ReturnLogits.ALL:
            return None
        if self.return_logits is ReturnLogits.LAST_TOKEN:
            return 1
        tail = int(np.array(return_n_logits).reshape(-1)[0])
        if tail < 1:
            raise InputError(f"return_n_logits is {tail}, expected 1 or more")
        shortest = int(np.diff(bounds).min())
        if shortest < tail:
            raise InputError(f"return_n_logits {tail} for a row of {shortest} active tokens")
        return tail

    def _prefill_rows(
        self, kv: RowCacheInputs, bounds: np.ndarray, position_ids: mx.array | None
    ) -> list[PrefillRow]:
        rows = []
        for cache, begin, end in zip(
            kv.rows, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True
        ):
            kv.cache.release(cache, keep=True)
            stop = cache.length + end - begin
            cache.reserve(max(stop, cache.planned_length) + 1)
            positions = None if position_ids is None else position_ids[:, begin:end]
            where = cache.length, stop, cache.planned_reach, positions
            rotations = self.decoder.rotations(lambda rope, at=where: rope.prefill(*at))
            spans = _fresh(cache.whole_spans, cache.length, stop)
            rows.append(PrefillRow(begin, end, cache, rotations, spans))
        return rows

    def _decode(
        self,
        tokens: mx.array,
        kv: RowCacheInputs,
        position_ids: mx.array | None,
        mode: StepMode,
    ) -> tuple[mx.array, mx.array]:
        """The compiled step over T tokens of each row: hidden states [B * T, E], or the captured
        ones [B * T, layers * E], and logits [B * T, V]; batch arrays updated."""
        cache, width = kv.cache, tokens.shape[0] // len(kv.rows)
        cache.place(kv.rows, extra=width)
        order = cache.slot_rows(kv.rows)
        tokens = tokens.astype(mx.uint32)  # what argmax gives; another type would be traced again
        lengths = cache.lengths()
        positions = (
            lengths if width == 1 else mx.repeat(lengths, width) + _within(len(order), width)
        )
        if position_ids is not None:
            positions = _spread(position_ids[0].astype(mx.int32), order, width)
        slots = token_slots(mode, tokens.shape[0], self.adapters)
        extra = () if slots is None else (_spread(slots, order, width),)
        step = self._step_at(cache.shapes, width)
        out = step(_spread(tokens, order, width), lengths, positions, *extra, *cache.take())
        cache.give(out[2:])
        return _gathered(out[0], order, width), _gathered(out[1], order, width)

    def _step_at(self, shapes: tuple[tuple[int, int], ...], width: int) -> Step:
        """The compiled step; where groups make shapes many, or rows run several tokens, each is
        first run for a while."""
        if not self._compiled:
            return self._step
        size = shapes, width
        self._runs[size] += 1
        if len(self._runs) > MOST_SIZES:  # what was traced goes with the function
            self._step, self._runs = mx.compile(self._traced_step), Counter((size,))
        is_usual = len(shapes) == 1 and width == 1
        return self._step if is_usual or self._runs[size] > EAGER_STEPS else self._decode_step

    def _traced_step(self, *arguments: mx.array) -> tuple[mx.array, ...]:
        self.traces += 1
        return self._decode_step(*arguments)

    def _decode_step(
        self, tokens: mx.array, lengths: mx.array, positions: mx.array, *arrays: mx.array
    ) -> tuple[mx.array, ...]:
        """Traced once for each shape; everything that changes is an argument.

        tokens, positions [B * T]: T of each row, one in a decode step; lengths [B].
        """
        decoder, width = self.decoder, tokens.shape[0] // lengths.shape[0]
        slots, arrays = (arrays[0], arrays[1:]) if self.adapters else (None, arrays)
        caches = by_group(arrays, self._format.width, decoder.config.num_layers)
        heads = decoder.head_counts
        turned = heads.queries + heads.keys
        step = DecodeStep(
            groups=self._groups(lengths, caches, width),
            heads=heads,
            rotations=decoder.rotations(lambda rope: rope.decode(positions)),
            joined=decoder.rotations(
                lambda rope: rope.decode_joined(positions, turned, heads.total)
            ),
            format=self._format,
            slots=None if slots is None else TokenSlots(slots),
            width=width,
        )
        h = decoder.scale_embeddings(decoder.embed(tokens))
        capture = Capture(self._captured) if self._captured else None
        h, written = decoder.decode(h, caches, step, capture)
        hidden = h if capture is None else capture.joined()
        flat = [a for group in written for layer in group for a in layer]
        return hidden, decoder.logits(h), *flat

    def _groups(
        self, lengths: mx.array, caches: Sequence[Sequence[Layer]], width: int
    ) -> list[DecodeGroup]:
        """lengths int32 [B], of the groups' rows one after the other."""
        groups, begin = [], 0
        windows, heads, format = self.decoder.windows, self.decoder.head_counts, self._format
        for layers in caches:
            _, count, _, capacity, _ = layers[0][0].shape
            own = lengths[begin : begin + count]
            groups.append(DecodeGroup.of(begin, own, capacity, heads, windows, format, width))
            begin += count
        return groups

    def _no_rows(self, tokens: mx.array) -> ModelOutputs:
        """An empty batch: logits [0, V]."""
        logits = mx.zeros((0, self.decoder.config.vocab_size), mx.float32)
        width = self.decoder.config.hidden_size * max(1, len(self._captured))
        hidden = mx.zeros((0, width), self.decoder.embed(tokens).dtype)
        return self._one_token_outputs(hidden, logits)

    def _one_token_outputs(self, hidden: mx.array, logits: mx.array) -> ModelOutputs:
        """Every row has one active token, so all the ways of returning logits coincide."""
        offsets = None
        if self.return_logits is not ReturnLogits.LAST_TOKEN:
            kind = mx.uint32 if self.return_logits is ReturnLogits.ALL else mx.int64
            offsets = mx.arange(logits.shape[0] + 1, dtype=kind)
        return ModelOutputs(logits, logits, offsets, self._hidden(hidden, hidden))

    def _decoded_outputs(self, hidden: mx.array, logits: mx.array, width: int) -> ModelOutputs:
        """Every row has `width` active tokens, and logits at each."""
        if width == 1:
            return self._one_token_outputs(hidden, logits)
        last = slice(width - 1, None, width)
        offsets = mx.arange(0, logits.shape[0] + 1, width, dtype=mx.int64)
        return ModelOutputs(logits, logits[last], offsets, self._hidden(hidden, hidden[last]))

    def _outputs(
        self, h: mx.array, picked: mx.array, bounds: np.ndarray, tail: int | None
    ) -> ModelOutputs:
        """From hidden states h and those of the tokens that get logits."""
        logits = self.decoder.logits(picked)
        if tail is None:
            ends = mx.array((bounds[1:] - 1).astype(np.int32))
            hidden = self._hidden(h, picked[ends])
            return ModelOutputs(logits, logits[ends], mx.array(bounds.astype(np.uint32)), hidden)
        last = slice(tail - 1, None, tail)
        hidden = self._hidden(h, picked[last])
        if self.return_logits is ReturnLogits.LAST_TOKEN:
            return ModelOutputs(logits, logits, None, hidden)
        offsets = mx.array(np.arange(len(bounds)) * tail)
        return ModelOutputs(logits, logits[last], offsets, hidden)

    def _hidden(self, h: mx.array, last: mx.array) -> mx.array | None:
        kind = self.return_hidden_states
        if kind in (ReturnHiddenStates.ALL, ReturnHiddenStates.EAGLE3):
            return h
        if kind is ReturnHiddenStates.ALL_NORMALIZED:
            return self.decoder.norm(h)
        return None if kind is ReturnHiddenStates.NONE else last


def _fresh(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    """The spans with positions among start..stop-1. Raises: InputError for one that is cut."""
    found = tuple(span for span in spans if span[0] < stop and span[1] > start)
    for begin, end in found:
        if begin < start or end > stop:
            raise InputError(
                f"tokens {begin} to {end - 1} see each other both ways, but this step has only "
                f"{start} to {stop - 1}; process them in one step"
            )
    return found


def _within(rows: int, width: int) -> mx.array:
    """Each token's place among the `width` ones of its row, int32 [rows * width]."""
    return mx.tile(mx.arange(width, dtype=mx.int32), rows)


def _spread(x: mx.array, order: Sequence[int | None], width: int) -> mx.array:
    """What each row's tokens have, [B * width], for each slot; 0 or another's for idle ones."""
    count = x.shape[0] // width
    if list(order[:count]) == list(range(count)):
        idle = (len(order) - count) * width
        return x if not idle else mx.concatenate([x, mx.zeros((idle,), x.dtype)])
    return x[_places([row or 0 for row in order], width)]


def _gathered(out: mx.array, order: Sequence[int | None], width: int) -> mx.array:
    """A step's results by slot, [slots * width, X], by row."""
    slot_of = {row: slot for slot, row in enumerate(order) if row is not None}
    count = len(slot_of)
    if all(slot_of[row] == row for row in range(count)):
        return out if len(order) == count else out[: count * width]
    return out[_places([slot_of[row] for row in range(count)], width)]


def _places(rows: Sequence[int], width: int) -> mx.array:
    """Where the tokens of these rows lie, uint32 [rows * width]."""
    first = np.array(rows, np.uint32)[:, None] * width
    return mx.array((first + np.arange(width, dtype=np.uint32)).reshape(-1))
