"""How a decoder is cut among ranks: whole heads, whole quantisation groups, rows of the head; how
the vision rows of rank 0, which alone has the tower, reach the others.

Queries, keys, values, gate and up are cut by outputs, the two projections behind them by inputs:
what a rank computes between them is its own, and one sum behind each makes it everybody's.
Source: Shoeybi et al. 2019, Megatron-LM, section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx

from mlx_vlm_pipes.errors import ConfigError, MediaError
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.ranks import Ranks, shares

LARGE_VOCABULARY = 32768  # from here on, each rank has its rows of the head
ALIGNED = 32  # columns of the MLP that go together where nobody notices who gets some more
Spans = Sequence[tuple[int, int]]
Shapes = Mapping[str, tuple[int, ...]]
_ROW_TYPES = (mx.float32, mx.float16, mx.bfloat16)  # of vision rows, by the number that is told


@dataclass(frozen=True)
class DecoderShares:
    """What each rank has, as (begin, end): KV heads with their queries, columns of the MLP's inner
    width, rows of the output head; `vocab` is empty where all have the whole head."""

    kv_heads: tuple[tuple[int, int], ...]
    inner: tuple[tuple[int, int], ...]
    vocab: tuple[tuple[int, int], ...]


def decoder_shares(config: DecoderConfig, shapes: Shapes, size: int) -> DecoderShares:
    """How a decoder is cut for `size` ranks.

    shapes: its tensors', by name below the decoder; scales tell how wide packed groups are.
    Raises: ConfigError where there is not a part for everybody.
    """
    heads, inner = config.num_kv_heads, config.intermediate_size
    width = config.num_heads // heads * config.head_dim  # inputs of o_proj for each KV head
    group = _group(shapes, ".self_attn.o_proj.scales", width * heads)
    unit = math.lcm(width, group) // width
    _require_parts(heads // unit, size, f"{heads} KV heads", group)
    kv_heads = [(begin * unit, end * unit) for begin, end in shares(heads // unit, size)]
    group = _group(shapes, ".mlp.down_proj.scales", inner)
    _require_parts(inner // group, size, f"an MLP {inner} wide", group)
    aligned = math.lcm(group, ALIGNED)
    unit = aligned if inner % aligned == 0 and inner // aligned >= 16 * size else group
    columns = [(begin * unit, end * unit) for begin, end in shares(inner // unit, size)]
    is_cut = config.vocab_size >= LARGE_VOCABULARY
    vocab = shares(config.vocab_size, size) if is_cut else []
    return DecoderShares(tuple(kv_heads), tuple(columns), tuple(vocab))


def _group(shapes: Shapes, suffix: str, columns: int) -> int:
    """Columns of a packed matrix that cannot be cut, in all layers; 1 for floats."""
    widths = [columns // shape[1] for name, shape in shapes.items() if name.endswith(suffix)]
    return math.lcm(*widths)


def _require_parts(parts: int, size: int, what: str, group: int) -> None:
    if parts < size:
        packed = f" packed in groups of {group}" if group > 1 else ""
        raise ConfigError(
            f"{what}{packed} cannot be cut for {size} ranks; use at most {max(1, parts)}"
        )


def local_config(config: DecoderConfig, parts: DecoderShares, ranks: Ranks) -> DecoderConfig:
    """The decoder of one rank."""
    kv_heads, inner = _width(parts.kv_heads[ranks.rank]), _width(parts.inner[ranks.rank])
    return replace(
        config,
        num_heads=config.num_heads // config.num_kv_heads * kv_heads,
        num_kv_heads=kv_heads,
        intermediate_size=inner,
        ranks=ranks,
        vocab_shares=parts.vocab,
    )


def _width(span: tuple[int, int]) -> int:
    return span[1] - span[0]


@dataclass(frozen=True)
class Traffic:
    """What a decode step of one row costs between ranks: how often they wait for each other, and
    the bytes that each sends to the next one in MLX's ring."""

    sums: int
    gathers: int
    sent_bytes: int


def traffic(config: DecoderConfig, parts: DecoderShares, itemsize: int) -> Traffic:
    """Two sums a layer and one of the token; a gather where the head is cut.

    itemsize: bytes of a number of the hidden states. Of a sum each rank sends 2 (n - 1) / n, of a
    gather its own part n - 1 times.
    """
    size = len(parts.kv_heads)
    summed = 2 * config.num_layers * config.hidden_size * itemsize
    sent = 2 * (size - 1) * summed // size
    if parts.vocab:
        sent += (size - 1) * max(map(_width, parts.vocab)) * itemsize
    return Traffic(2 * config.num_layers + 1, int(bool(parts.vocab)), sent)


@dataclass(frozen=True)
class Cut:
    """What a rank has of a tensor: elements of an axis that is `whole` elements long unpacked."""

    axis: int
    whole: int
    spans: Spans

    def within(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """The spans on the axis of a tensor of this shape, whose words or groups are fewer."""
        length = shape[self.axis]
        return [
            (begin * length // self.whole, end * length // self.whole) for begin, end in self.spans
        ]

    def local(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what the rank has."""
        own = sum(map(_width, self.within(shape)))
        return tuple(own if axis == self.axis else size for axis, size in enumerate(shape))


class Cuts:
    """Which part of each tensor of a decoder a rank has."""

    def __init__(self, config: DecoderConfig, parts: DecoderShares, rank: int) -> None:
        self._config, self._parts, self._rank = config, parts, rank

    def of(self, name: str) -> Cut | None:
        """The part of a tensor, by its name below the decoder; None where all have all of it."""
        module, _, kind = name.rpartition(".")
        leaf = re.sub(r"^layers\.\d+\.", "", module)
        config = self._config
        dim, queries = config.head_dim, config.num_heads // config.num_kv_heads
        kv_begin, kv_end = (head * dim for head in self._parts.kv_heads[self._rank])
        q_span = (kv_begin * queries, kv_end * queries)
        q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
        begin, end = self._parts.inner[self._rank]
        inner = config.intermediate_size
        if leaf == "lm_head" and self._parts.vocab:
            return Cut(0, config.vocab_size, [self._parts.vocab[self._rank]])
        if leaf in ("self_attn.o_proj", "mlp.down_proj"):
            own = (q_rows, [q_span]) if leaf.endswith("o_proj") else (inner, [(begin, end)])
            return None if kind == "bias" else Cut(1, *own)
        kv_span = (kv_begin, kv_end)
        rows: dict[str, tuple[int, Spans]] = {
            "self_attn.q_proj": (q_rows, [q_span]),
            "self_attn.k_proj": (kv_rows, [kv_span]),
            "self_attn.v_proj": (kv_rows, [kv_span]),
            "self_attn.qkv_proj": (
                q_rows + 2 * kv_rows,
                [q_span, _moved(kv_span, q_rows), _moved(kv_span, q_rows + kv_rows)],
            ),
            "mlp.gate_proj": (inner, [(begin, end)]),
            "mlp.up_proj": (inner, [(begin, end)]),
            "mlp.gate_up_proj": (2 * inner, [(begin, end), _moved((begin, end), inner)]),
        }
        return Cut(0, *rows[leaf]) if leaf in rows else None


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by


def shared_rows(ranks: Ranks, encode: Callable[[], mx.array] | None) -> mx.array:
    """What `encode` gives on rank 0, [M, E] floats, on every rank; evaluated. The others have None.

    Raises: on rank 0 what `encode` does, and then MediaError on the others: none of them waits.
    """
    failure, rows, told = None, mx.zeros((0, 0)), [0, 0, 0, 0]  # worked; rows, width, type
    if encode is not None:
        try:
            rows = encode()
            mx.eval(rows)
            told = [1, *rows.shape, _ROW_TYPES.index(rows.dtype)]
        except Exception as error:
            failure = error
    said = ranks.from_first(mx.array(told, dtype=mx.int32)).tolist()
    worked, count, width, kind = cast("list[int]", said)
    if failure is not None:
        raise failure
    if not worked:
        raise MediaError("rank 0 could not encode the pictures; its own message says why")
    if encode is None:
        rows = mx.zeros((count, width), _ROW_TYPES[kind])
    shared = ranks.from_first(rows)
    mx.eval(shared)
    return shared
