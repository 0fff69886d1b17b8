"""LoRA beside the base weights: several adapters loaded, one chosen for each row of a batch.

y = W x + b + scale * B A x, for the rows of that adapter only; DoRA also scales each output.
Slot 0 is the base model: zeros, so that its rows get exactly the base's numbers.
Source: mlx_lm/tuner/lora.py and dora.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_vlm_pipes.weights.lora import LoRAAdapter, LoRAPair, dora_factor, merge_into
from mlx_vlm_pipes.weights.packed import floats

# Linears of the same input, whose adapters are applied together: their name as one, and the parts.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
FEW_TOKENS = 8  # runs shorter than this are not worth products of their own


class TokenSlots:
    """Which adapter each token of a step takes, and the indices that `gather_mm` asks for.

    slots uint32 [T], 0 for the base model; made once a step, as are the indices. known: the same
    on the host, if it is there; runs of tokens are then plain matrix products.
    """

    def __init__(self, slots: mx.array, known: np.ndarray | None = None) -> None:
        self.slots = slots.astype(mx.uint32)
        self.tokens = mx.arange(slots.shape[0], dtype=mx.uint32)
        self.runs = None if known is None else _runs(known)
        self._indices: dict[tuple[int, ...], tuple[mx.array, mx.array]] = {}

    def __getitem__(self, places: mx.array) -> TokenSlots:
        return TokenSlots(self.slots[places])

    def indices(self, segments: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """uint32 [T, n] each: for every token and piece of the output, which piece of the token's
        input it is made of, and which of the tables' pieces."""
        if segments not in self._indices:
            own, count = mx.array(np.array(segments, np.uint32)), max(segments) + 1
            pieces = mx.array(np.arange(len(segments), dtype=np.uint32))
            self._indices[segments] = (
                self.tokens[:, None] * count + own,
                self.slots[:, None] * len(segments) + pieces,
            )
        return self._indices[segments]


def _runs(slots: np.ndarray) -> list[tuple[int, int, int]] | None:
    """(slot, begin, end) of adjacent tokens; None where they are short."""
    ends = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    runs = [(int(slots[begin]), begin, end) for begin, end in itertools.pairwise(ends)]
    return runs if len(slots) >= FEW_TOKENS * len(runs) else None


class LoRATable(nn.Module):
    """The adapters of one linear layer, or of several of the same input side by side, padded to
    one rank and stacked by slot.

    Args: parts, for each linear one pair for every slot from 1 on, None where that adapter leaves
    the layer alone; weights, the bases' [out, in] (for DoRA), dtype the type to compute in.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[LoRAPair | None]],
        weights: Sequence[mx.array],
        dtype: mx.Dtype,
    ) -> None:
        super().__init__()
        self.sizes = [weight.shape[0] for weight in weights]
        inputs = weights[0].shape[1]
        pairs = [pair for own in parts for pair in own if pair is not None]
        self.rank = max(pair.rank for pair in pairs)
        is_adapted = [any(pair is not None for pair in own) for own in parts]
        ranked = list(itertools.accumulate(is_adapted, initial=0))
        # Of which piece of A x each part is made; of any, by zeros, where no adapter takes part.
        self.segments = [n if yes else 0 for n, yes in zip(ranked, is_adapted, strict=False)]
        self.has_gain = any(pair.magnitude is not None for pair in pairs)
        downs = [mx.zeros((inputs, self.rank * sum(is_adapted)))]
        ups = [mx.zeros((self.rank, sum(self.sizes)))]
        gains = [mx.ones((sum(self.sizes),))]
        for slot in range(len(parts[0])):
            own = [pairs[slot] for pairs in parts]
            halves = [
                _halves(p, inputs, n, self.rank) for p, n in zip(own, self.sizes, strict=True)
            ]
            kept = [down for (down, _), yes in zip(halves, is_adapted, strict=True) if yes]
            downs.append(mx.concatenate(kept, axis=1))
            ups.append(mx.concatenate([up for _, up in halves], axis=1))
            gains.append(mx.concatenate([_gain(w, p) for w, p in zip(weights, own, strict=True)]))
        self.down = mx.stack(downs).astype(dtype)  # [slots, in, adapted parts * r]
        self.up = mx.stack(ups).astype(dtype)  # [slots, r, out]
        if self.has_gain:
            self.gain = mx.stack(gains).astype(dtype)  # [slots, out]

    def delta(self, x: mx.array, slots: TokenSlots, part: int | None = None) -> mx.array | None:
        """scale * B A x of each token's adapter: x [T, in] -> [T, out], of one part or of all.

        None where all tokens are the base model's.
        """
        parts = list(range(len(self.sizes))) if part is None else [part]
        if slots.runs is None:
            return self._gathered(x, slots, parts)
        if all(slot == 0 for slot, _, _ in slots.runs):
            return None
        rows = [self._of_run(x[begin:end], slot, parts) for slot, begin, end in slots.runs]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    def __call__(
        self,
        x: mx.array,
        y: mx.array,
        slots: TokenSlots,
        bias: mx.array | None,
        part: int | None = None,
    ) -> mx.array:
        """x [T, in], y = W x + b [T, out] -> the adapted y [T, out], of one part or of all."""
        delta = self.delta(x, slots, part)
        if delta is None:
            return y
        if not self.has_gain:
            return y + delta
        gain = self.gain if part is None else self.gain[:, self._columns(part)]
        if bias is None:
            return (y + delta) * gain[slots.slots]
        return (y - bias + delta) * gain[slots.slots] + bias

    def _columns(self, part: int) -> slice:
        begin = sum(self.sizes[:part])
        return slice(begin, begin + self.sizes[part])

    def _down(self, part: int) -> slice:
        begin = self.segments[part] * self.rank
        return slice(begin, begin + self.rank)

    def _of_run(self, x: mx.array, slot: int, parts: Sequence[int]) -> mx.array:
        """Of tokens that share an adapter: plain products."""
        if slot == 0:
            width = sum(self.sizes[part] for part in parts)
            return mx.zeros((x.shape[0], width), self.up.dtype)
        down, up = self.down[slot], self.up[slot]
        outs = [(x @ down[:, self._down(p)]) @ up[:, self._columns(p)] for p in parts]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=-1)

    def _gathered(self, x: mx.array, slots: TokenSlots, parts: Sequence[int]) -> mx.array:
        """Two kernels for all parts: the output in pieces of one length, each made of the piece of
        A x that is its part's."""
        tokens, own, whole = slots.tokens, slots.slots, len(parts) > 1
        down = self.down if whole else self.down[:, :, self._down(parts[0])]
        up = self.up if whole else self.up[:, :, self._columns(parts[0])]
        mid = mx.gather_mm(x[:, None], down, lhs_indices=tokens, rhs_indices=own)  # [T, 1, m * r]
        if not whole:
            return mx.gather_mm(mid, up, lhs_indices=tokens, rhs_indices=own)[:, 0]
        size = math.gcd(*self.sizes)
        segments = [s for p in parts for s in [self.segments[p]] * (self.sizes[p] // size)]
        left, right = slots.indices(tuple(segments))
        mid = mid.reshape(x.shape[0], -1, 1, self.rank)
        pieces = up.reshape(up.shape[0], self.rank, -1, size).transpose(0, 2, 1, 3)
        out = mx.gather_mm(mid, pieces, lhs_indices=left, rhs_indices=right)  # [T, n, 1, size]
        return out.reshape(x.shape[0], -1)


def _halves(pair: LoRAPair | None, inputs: int, out: int, rank: int) -> tuple[mx.array, mx.array]:
    """A [in, r] and scale * B [r, out] of a pair, zeros where there is none."""
    if pair is None:
        return mx.zeros((inputs, rank)), mx.zeros((rank, out))
    pad = rank - pair.rank
    down = mx.pad(pair.a.astype(mx.float32), [(0, pad), (0, 0)]).T
    return down, mx.pad(pair.b.astype(mx.float32) * pair.scale, [(0, 0), (0, pad)]).T


def _gain(weight: mx.array, pair: LoRAPair | None) -> mx.array:
    factor = None if pair is None else dora_factor(weight, pair)
    return mx.ones((weight.shape[0],)) if factor is None else factor


def attach_loras(
    decoder: nn.Module, loras: Sequence[LoRAAdapter], prefix: str, dtype: mx.Dtype
) -> None:
    """Give every adapted linear of `decoder` its table, before projections are fused.

    prefix: what canonical paths begin with (`language_model.`).
    """
    modules = dict(decoder.named_modules())
    groups: dict[tuple[str, str], list[str]] = {}
    for path in dict.fromkeys(path for lora in loras for path in lora.layers):
        parent, _, name = path.removeprefix(prefix).rpartition(".")
        fused = next((key for key, names in JOINED.items() if name in names), name)
        groups.setdefault((parent, fused), []).append(name)
    for (parent, fused), adapted in groups.items():
        names = JOINED[fused] if fused not in adapted and fused in JOINED else (fused,)
        parts = [[lora.layers.get(f"{prefix}{parent}.{name}") for lora in loras] for name in names]
        weights = [base_weight(modules[f"{parent}.{name}"]) for name in names]
        if names == (fused,) and fused in JOINED:  # one linear in the checkpoint already
            parts, weights = _apart(parts[0], weights[0], modules[parent].sizes(JOINED[fused]))
        tables = modules[parent].setdefault("adapters", {})
        tables[fused] = LoRATable(parts, weights, dtype)


def _apart(
    pairs: Sequence[LoRAPair | None], weight: mx.array, sizes: Sequence[int]
) -> tuple[list[list[LoRAPair | None]], list[mx.array]]:
    """The pairs and the weight of a linear cut into parts of these numbers of outputs."""
    ends = list(itertools.accumulate(sizes, initial=0))
    cuts = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
    return [[_rows(pair, cut) for pair in pairs] for cut in cuts], [weight[cut] for cut in cuts]


def _rows(pair: LoRAPair | None, cut: slice) -> LoRAPair | None:
    if pair is None:
        return None
    magnitude = None if pair.magnitude is None else pair.magnitude[cut]
    return replace(pair, b=pair.b[cut], magnitude=magnitude)


def merge_lora(module: nn.Module, lora: LoRAAdapter, prefix: str) -> None:
    """Put an adapter into the weights of the linears of `module`; packed ones become plain.

    prefix: what canonical paths begin with. A merged weight is not packed again: it has the
    numbers of the adapter beside the packed base.
    """
    modules = dict(module.named_modules())
    merged = []
    for path, pair in lora.layers.items():
        own = path.removeprefix(prefix)
        linear = modules[own]
        weight = merge_into(base_weight(linear), pair)
        if isinstance(linear, nn.QuantizedLinear):
            plain = nn.Linear(pair.a.shape[1], pair.b.shape[0], bias="bias" in linear)
            if "bias" in linear:
                plain.bias = linear["bias"]
            linear = plain
        linear.weight = weight
        merged.append((own, linear))
    module.update_modules(cast("dict[str, Any]", tree_unflatten(merged)))


def base_weight(module: nn.Module) -> mx.array:
    """A linear's weight [out, in] as floats, dequantised where it is packed."""
    if isinstance(module, nn.QuantizedLinear):
        return floats(module)
    return module["weight"]
