"""LoRA beside the base weights: several adapters loaded, one chosen for each row of a batch.

y = W x + b + scale * B A x, for the rows of that adapter only; DoRA also scales each output.
Slot 0 is the base model: zeros, so that its rows get exactly the base's numbers.
Source: mlx_lm/tuner/lora.py and dora.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.rounding import unpack
from mlx_vlm_pipes.weights.lora import LoRAAdapter, LoRAPair, dora_factor


class LoRATable(nn.Module):
    """The adapters of one linear layer, padded to one rank and stacked by slot.

    Args: pairs, one for each slot from 1 on, None where that adapter leaves the layer alone;
    weight, the base's [out, in] (for DoRA), dtype the type to compute in.
    """

    def __init__(self, pairs: Sequence[LoRAPair | None], weight: mx.array, dtype: mx.Dtype) -> None:
        super().__init__()
        out, inputs = weight.shape
        rank = max(pair.rank for pair in pairs if pair is not None)
        downs, ups, gains = [mx.zeros((inputs, rank))], [mx.zeros((rank, out))], [mx.ones((out,))]
        for pair in pairs:
            if pair is None:
                downs.append(downs[0])
                ups.append(ups[0])
                gains.append(gains[0])
                continue
            pad = rank - pair.rank
            downs.append(mx.pad(pair.a.astype(mx.float32), [(0, pad), (0, 0)]).T)
            ups.append(mx.pad(pair.b.astype(mx.float32) * pair.scale, [(0, 0), (0, pad)]).T)
            factor = dora_factor(weight, pair)
            gains.append(gains[0] if factor is None else factor)
        self.down = mx.stack(downs).astype(dtype)  # [slots, in, r]
        self.up = mx.stack(ups).astype(dtype)  # [slots, r, out]
        self.has_gain = any(pair is not None and pair.magnitude is not None for pair in pairs)
        if self.has_gain:
            self.gain = mx.stack(gains).astype(dtype)  # [slots, out]

    def delta(self, x: mx.array, slots: mx.array) -> mx.array:
        """scale * B A x of each row's adapter: x [T, in], slots int32 [T] -> [T, out]."""
        down = mx.gather_mm(x[:, None], self.down, rhs_indices=slots)  # [T, 1, r]
        return mx.gather_mm(down, self.up, rhs_indices=slots)[:, 0]

    def __call__(
        self, x: mx.array, y: mx.array, slots: mx.array, bias: mx.array | None
    ) -> mx.array:
        """x [T, in], y = W x + b [T, out], slots int32 [T] -> the adapted y [T, out]."""
        delta = self.delta(x, slots)
        if not self.has_gain:
            return y + delta
        if bias is None:
            return (y + delta) * self.gain[slots]
        return (y - bias + delta) * self.gain[slots] + bias


def attach_loras(
    decoder: nn.Module, loras: Sequence[LoRAAdapter], prefix: str, dtype: mx.Dtype
) -> None:
    """Give every adapted linear of `decoder` its table, before projections are fused.

    prefix: what canonical paths begin with (`language_model.`).
    """
    modules = dict(decoder.named_modules())
    paths = dict.fromkeys(path for lora in loras for path in lora.layers)
    for path in paths:
        own = path.removeprefix(prefix)
        pairs = [lora.layers.get(path) for lora in loras]
        parent, _, name = own.rpartition(".")
        module = modules[own]
        tables = modules[parent].setdefault("adapters", {})
        tables[name] = LoRATable(pairs, base_weight(module), dtype)


def base_weight(module: nn.Module) -> mx.array:
    """A linear's weight [out, in] as floats, dequantised where it is packed."""
    if isinstance(module, nn.QuantizedLinear):
        return unpack(
            module["weight"],
            module["scales"],
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
    return module["weight"]


def adapted(
    tables: Mapping[str, LoRATable],
    names: Sequence[str],
    x: mx.array,
    y: mx.array,
    slots: mx.array,
    bias: mx.array | None,
    sizes: Sequence[int],
) -> mx.array:
    """Add the adapters of fused projections: y [T, sum(sizes)] holds `names` side by side."""
    parts, begin = [], 0
    for name, size in zip(names, sizes, strict=True):
        part = y[:, begin : begin + size]
        if name in tables:
            own = None if bias is None else bias[begin : begin + size]
            part = tables[name](x, part, slots, own)
        parts.append(part)
        begin += size
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
