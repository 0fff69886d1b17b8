"""The graph of a function: its primitives with shapes, and what `mx.compile` fuses of it."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

MARK = 7_340_033  # first number of the constants that name a stand-in
STAND_INS = (
    "RMSNorm",
    "LayerNorm",
    "RoPE",
    "ScaledDotProductAttention",
    "Dequantize",
    "Contiguous",
)
# Names that a primitive takes by one of its arguments. Export gives the class and the argument; a
# drawn graph gives the name, which for these classes says less.
BITWISE = ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift")
CLASSES = {
    "And": "Reduce", "Or": "Reduce", "Sum": "Reduce", "Prod": "Reduce", "Min": "Reduce",
    "Max": "Reduce", "CumSum": "Scan", "CumProd": "Scan", "CumMin": "Scan", "CumMax": "Scan",
}  # fmt: skip
PREFILL_HEADS, DECODE_HEADS = (64, 72, 80, 96, 128), (64, 96, 128)
DECODE_QUERIES = 8  # up to so many queries take the vector kernel
VECTOR_LIMIT = 32  # queries times query heads a key head that it takes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One primitive. inputs, outputs: names of arrays; arguments as MLX's export gives them."""

    name: str
    arguments: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """Primitives in order of execution.

    shapes: by array; given: arrays that the caller gives away; constants: those that the function
    holds; results: what it returns; fused: for every Compiled primitive, the names inside it;
    repeated: how many more of a primitive MLX runs, as export merges equal ones everywhere.
    """

    nodes: list[Node]
    shapes: dict[str, Shape]
    given: list[str]
    constants: set[str]
    results: list[str]
    fused: list[list[str]]
    repeated: Counter[str]


def read_graph(function: Callable[..., Any], arrays: Sequence[mx.array], *, fused: bool) -> Graph:
    """The graph of a function over arrays, compiled where it is.

    fused: attention is one kernel whatever the size of its heads.
    """
    with _stand_ins(fused=fused):
        lazy = function(*arrays)
        lazy = lazy if isinstance(lazy, (list, tuple)) else (lazy,)
        text = io.StringIO()
        mx.export_to_dot(text, *lazy)
        records: list[dict[str, Any]] = []
        mx.export_function(records.append, function, *arrays)
    labels: list[str] = re.findall(r'label ="(\w+)', text.getvalue())
    graph = _from_records(records)
    known = {node.name for node in graph.nodes} | {"Broadcast", "AsType"}
    compiled = [_parts(label, known) for label in labels if label.startswith("Compiled")]
    found: Counter[str] = Counter(CLASSES.get(label, label) for label in labels)
    found.update(part for parts in compiled for part in parts)
    return replace(graph, fused=compiled, repeated=_repeated(graph, found))


def _repeated(graph: Graph, found: Counter[str]) -> Counter[str]:
    """What was drawn beyond the exported nodes. Broadcasts do not count: fusion splits them.

    Raises: RuntimeError where the export has a primitive that MLX's own graph has not.
    """
    ours = Counter("Depends" if n.name in STAND_INS else n.name for n in graph.nodes)
    del ours["Broadcast"]
    lost = ours - found
    if lost:
        raise RuntimeError(f"in the exported graph, but not in MLX's own: {dict(lost)}")
    return Counter({name: found[name] - ours[name] for name in ours})


def _from_records(records: list[dict[str, Any]]) -> Graph:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["type"], []).append(record)
    constants = dict(by_kind["constants"][0]["constants"])
    given = by_kind["inputs"][0]["inputs"]
    shapes = {name: tuple(array.shape) for name, array in constants.items()}
    shapes |= {name: tuple(shape) for name, shape, _ in given}
    nodes = []
    for record in by_kind.get("primitive", []):
        shapes |= {name: tuple(shape) for name, shape, _ in record["outputs"]}
        inputs = [name for name, *_ in record["inputs"]]
        marks = [m for m in (_mark(constants.get(name)) for name in inputs) if m]
        name, arguments = _name(record["name"], tuple(record["arguments"]))
        if marks:
            (kind, *extra), inputs = marks[0], inputs[:-1]
            name, arguments = STAND_INS[kind], tuple(extra)
            inputs = inputs[name == "Dequantize" :]  # without the array that lent its shape
        outputs = tuple(name for name, *_ in record["outputs"])
        nodes.append(Node(name, arguments, tuple(inputs), outputs))
    results = [name for name, *_ in by_kind["outputs"][0]["outputs"]]
    return Graph(
        nodes, shapes, [name for name, *_ in given], set(constants), results, [], Counter()
    )


def _mark(array: mx.array | None) -> list[int] | None:
    """What a stand-in wrote beside its inputs, or None for any other array."""
    if array is None or array.dtype != mx.int32 or array.ndim != 1 or array.shape[0] != 3:
        return None
    first, kind, extra = np.array(array).tolist()
    return [kind, extra] if first == MARK else None


def _name(name: str, arguments: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """A primitive's name as its Compiled neighbours are called."""
    if name == "BitwiseBinary":
        return BITWISE[arguments[0]], ()
    if name == "Sqrt" and arguments and arguments[0]:
        return "Rsqrt", ()
    if name == "Log":
        return ("Log2", "Log10", "Log")[arguments[0]], ()
    if name == "Equal" and arguments and arguments[0]:
        return "NaNEqual", ()
    return name, arguments


def _parts(label: str, known: set[str]) -> list[str]:
    """The primitives in a Compiled name, longest names first. Raises: RuntimeError for others."""
    rest, found = label.removeprefix("Compiled"), []
    while rest:
        fitting = [name for name in known if rest.startswith(name)]
        if not fitting:
            raise RuntimeError(f"unknown primitive at {rest!r} in {label}")
        found.append(max(fitting, key=len))
        rest = rest.removeprefix(found[-1])
    return found


def _stand_in(kind: str, like: mx.array, inputs: list[mx.array], extra: int = 0) -> mx.array:
    """A node of `like`'s shape that the walk knows as a primitive of this kind."""
    mark = mx.array([MARK, STAND_INS.index(kind), extra], mx.int32)
    return mx.depends([like], [*inputs, mark])[0]


def _norm(kind: str) -> Callable[..., mx.array]:
    def norm(x: mx.array, *weights: Any, **_: Any) -> mx.array:
        return _stand_in(kind, x, [w for w in weights if isinstance(w, mx.array)])

    return norm


def _rope(x: mx.array, dims: int, **options: Any) -> mx.array:
    arrays = [v for v in options.values() if isinstance(v, mx.array)]
    return _stand_in("RoPE", x, arrays, dims)


def _is_fused(q: mx.array, k: mx.array, v: mx.array) -> bool:
    dim, queries = q.shape[-1], q.shape[2]
    if dim != v.shape[-1]:
        return False
    if queries > DECODE_QUERIES:
        return dim in PREFILL_HEADS
    return dim in DECODE_HEADS and queries * q.shape[1] // k.shape[1] <= VECTOR_LIMIT


@contextmanager
def _stand_ins(*, fused: bool) -> Iterator[None]:
    """MLX's fast functions as one node each, and the forms that a GPU takes, while this lasts."""
    attention, dequantize = mx.fast.scaled_dot_product_attention, mx.dequantize
    made_contiguous, default_device = mx.contiguous, mx.default_device

    def attend(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        if not fused and not _is_fused(q, k, v):
            return attention(q, k, v, **options)
        mask = options.get("mask")
        if not isinstance(mask, mx.array):
            return _stand_in("ScaledDotProductAttention", q, [k, v])
        whole = mx.broadcast_to(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
        return _stand_in("ScaledDotProductAttention", q, [k, v, whole])

    def unpack(w: mx.array, scales: mx.array, *rest: Any, **options: Any) -> mx.array:
        whole = dequantize(w, scales, *rest, **options)
        like = mx.broadcast_to(mx.array(0, whole.dtype), whole.shape)
        biases = [a for a in (*rest, options.get("biases")) if isinstance(a, mx.array)]
        return _stand_in("Dequantize", like, [w, scales, *biases])

    def contiguous(x: mx.array, **_: Any) -> mx.array:
        return _stand_in("Contiguous", x, [])

    fast: Any = mx.fast
    kept = {name: getattr(fast, name) for name in ("rms_norm", "layer_norm", "rope")}
    fast.rms_norm, fast.layer_norm, fast.rope = _norm("RMSNorm"), _norm("LayerNorm"), _rope
    fast.scaled_dot_product_attention, mx.dequantize = attend, unpack
    mx.contiguous, mx.default_device = contiguous, lambda: mx.Device(mx.gpu)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(fast, name, function)
        fast.scaled_dot_product_attention, mx.dequantize = attention, dequantize
        mx.contiguous, mx.default_device = made_contiguous, default_device
