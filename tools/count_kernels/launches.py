"""A graph to dispatches: every primitive as MLX's Metal back end runs it.

Source: mlx/backend/metal/*.cpp and mlx/backend/gpu/*.cpp, the functions named eval_gpu.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from tools.count_kernels.graph import DECODE_QUERIES, Graph, Node, Shape, read_graph
from tools.count_kernels.layout import Layout

SORT_BLOCK = 512 * 4  # elements of four bytes that one threadgroup sorts
ALL_REDUCE = 4096  # elements that are reduced to one number in one pass
WIDE_ROWS = 16  # products of fewer rows are matrix times vectors, never split
SPLIT_TILES, SPLIT_DEPTH = 32, 8  # tiles of 16 x 16 at most, of depth 16 at least, for split-K


@dataclass(frozen=True)
class Count:
    """Dispatches by primitive; "Copy" are those that inputs' strides and owners cause."""

    by_primitive: Counter[str]

    @property
    def total(self) -> int:
        return sum(self.by_primitive.values())


def count(function: Callable[..., Any], *arrays: mx.array, fused: bool = False) -> Count:
    """Dispatches of one call of a function over arrays, compiled or not; nothing is evaluated.

    Pass as arguments what changes from call to call, on which compiled functions work: what the
    function holds itself is taken for weights. fused: count attention as one kernel even where
    Metal has none for heads of that size, as a narrow model's.
    """
    graph = read_graph(function, arrays, fused=fused)
    walk = _Walk(graph)
    for node in graph.nodes:
        walk.visit(node)
    found = walk.found
    nodes = Counter(node.name for node in graph.nodes)
    for name in nodes.keys() & graph.repeated.keys():
        found[name] += round(found[name] / nodes[name] * graph.repeated[name])
    for parts in graph.fused:
        launching = [part for part in parts if part != "Broadcast"]
        found.subtract(launching)
        found["Compiled"] += 1
    return Count(+found)


class _Walk:
    """The layouts of all arrays so far, and what was launched."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.found = graph, Counter[str]()
        names = [*graph.given, *graph.constants]
        self.layouts = {name: Layout.rows(graph.shapes[name]) for name in names}
        uses = Counter(name for node in graph.nodes for name in node.inputs)
        self.uses = uses + Counter(graph.results)
        # The array whose memory a view shares: it is given away only where nothing else needs it.
        self.owner: dict[str, str] = {}
        makers = {name: node.name for node in graph.nodes for name in node.outputs}
        self.twins = {name for name, maker in makers.items() if graph.repeated[maker]}

    def visit(self, node: Node) -> None:
        inputs = [self.layouts[name] for name in node.inputs]
        shapes = [self.graph.shapes[name] for name in node.outputs]
        if node.name in VIEWS:
            outputs = VIEWS[node.name](node, inputs, shapes)
            self.owner.update(dict.fromkeys(node.outputs, self._root(node.inputs[0])))
        elif node.name in RESHAPES:
            outputs = [self._reshape(node, inputs[0], shapes[0])]
        else:
            outputs = self._launch(node, inputs, shapes)
        self.layouts.update(zip(node.outputs, outputs, strict=True))

    def _reshape(self, node: Node, x: Layout, shape: Shape) -> Layout:
        view = x.reshaped(shape)
        if view is None:
            self.found["Copy"] += 1
            return Layout.rows(shape)
        self.owner[node.outputs[0]] = self._root(node.inputs[0])
        return view

    def _launch(self, node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
        if math.prod(shapes[0]) == 0:
            return [Layout.rows(shape) for shape in shapes]
        self.found["Copy"] += COPIES.get(node.name, _no_copies)(node, inputs)
        if node.name in UPDATES:
            self.found["Copy"] += not self._is_given_away(node.inputs[0], inputs[0])
        self.found[node.name] += LAUNCHES.get(node.name, _one)(node, inputs)
        if node.name in KEEPING and inputs[0].is_contiguous and inputs[0].shape == shapes[0]:
            return [inputs[0]]
        if node.name == "ScaledDotProductAttention" and shapes[0][2] > DECODE_QUERIES:
            batch, heads, queries, dim = shapes[0]  # written as its users reshape it
            return [Layout.rows((batch, queries, heads, dim)).transposed([0, 2, 1, 3])]
        return [Layout.rows(shape) for shape in shapes]

    def _root(self, name: str) -> str:
        return self.owner.get(name, name)

    def _is_given_away(self, name: str, layout: Layout) -> bool:
        """Whether an update may write into the array: whole, nobody else's and no constant."""
        root = self._root(name)
        if root in self.twins:  # shared in the exported graph only
            return layout.is_contiguous
        family = [name, *(n for n, owner in self.owner.items() if owner == root), root]
        readers = sum(self.uses[n] for n in {*family}) - len({*family} - {name})
        return root not in self.graph.constants and layout.is_contiguous and readers <= 1


# ---- views


def _same(node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
    del node
    return [inputs[i] for i in range(len(shapes))]


def _transpose(node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
    del shapes
    return [inputs[0].transposed(list(node.arguments[0]))]


def _broadcast(node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
    del node
    return [inputs[0].broadcast(shapes[0])]


def _slice(node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
    return [inputs[0].sliced(shapes[0], tuple(node.arguments[2]))]


def _split(node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
    del node
    return [inputs[0].sliced(shape, (1,) * len(shape)) for shape in shapes]


def _expand(node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
    axes, old = {a % len(shapes[0]) for a in node.arguments[0]}, list(inputs[0].strides)
    strides = [1 if i in axes else old.pop(0) for i in range(len(shapes[0]))]
    return [Layout(shapes[0], tuple(strides), inputs[0].held)]


def _squeeze(node: Node, inputs: list[Layout], shapes: list[Shape]) -> list[Layout]:
    axes = {a % len(inputs[0].shape) for a in node.arguments[0]}
    strides = tuple(s for i, s in enumerate(inputs[0].strides) if i not in axes)
    return [Layout(shapes[0], strides, inputs[0].held)]


VIEWS: dict[str, Callable[[Node, list[Layout], list[Shape]], list[Layout]]] = {
    "Broadcast": _broadcast, "BroadcastAxes": _broadcast, "Copy": _same, "Depends": _same,
    "ExpandDims": _expand, "Slice": _slice, "Split": _split, "Squeeze": _squeeze,
    "StopGradient": _same, "Transpose": _transpose,
}  # fmt: skip
RESHAPES = frozenset({"Flatten", "Reshape", "Unflatten", "View"})
UPDATES = frozenset({"DynamicSliceUpdate", "Scatter", "ScatterAxis", "SliceUpdate"})
# One input, one output: a transposed input that is whole gives a transposed output.
KEEPING = frozenset(
    {"Abs", "AsType", "Cos", "Exp", "LayerNorm", "Negative", "RMSNorm", "Sigmoid", "Sin", "Sqrt",
     "Rsqrt", "Square", "Tanh", "Log", "Log2", "Log10", "Erf", "LogicalNot"}
)  # fmt: skip


# ---- kernels of a primitive


def _one(node: Node, inputs: list[Layout]) -> int:
    del node, inputs
    return 1


def _concatenate(node: Node, inputs: list[Layout]) -> int:
    del node
    return sum(part.size > 0 for part in inputs)


def _update_at(node: Node, inputs: list[Layout]) -> int:
    """The offset is computed by a kernel of its own."""
    del node, inputs
    return 2


def _contiguous(node: Node, inputs: list[Layout]) -> int:
    del node
    return not inputs[0].is_row_contiguous


def _sort(node: Node, inputs: list[Layout]) -> int:
    axis = node.arguments[-1]
    blocks = math.ceil(inputs[0].shape[axis] / SORT_BLOCK)
    return 1 if blocks == 1 else 2 + 2 * math.ceil(math.log2(blocks))


def _reduce(node: Node, inputs: list[Layout]) -> int:
    axes = {a % len(inputs[0].shape) for a in node.arguments[1]}
    kept = [n for i, n in enumerate(inputs[0].shape) if i not in axes and n > 1]
    return 2 if not kept and inputs[0].size > ALL_REDUCE else 1


def _product(node: Node, inputs: list[Layout]) -> int:
    del node
    x, weight = inputs[:2]
    batch = math.prod(x.shape[:-2])
    rows, depth, columns = x.shape[-2], x.shape[-1], weight.shape[-1]
    if len(weight.shape) == 2:
        rows, batch = rows * batch, 1
    if batch > 1 or rows < WIDE_ROWS or columns == 1:
        return 1
    tiles = math.ceil(rows / 16) * math.ceil(columns / 16)
    return 2 if tiles <= SPLIT_TILES and depth // 16 >= SPLIT_DEPTH else 1


LAUNCHES: dict[str, Callable[[Node, list[Layout]], int]] = {
    "AddMM": _product, "ArgPartition": _sort, "ArgSort": _sort, "Concatenate": _concatenate,
    "Contiguous": _contiguous, "DynamicSlice": _update_at, "DynamicSliceUpdate": _update_at,
    "Matmul": _product, "Pad": _update_at, "Partition": _sort, "Reduce": _reduce, "Sort": _sort,
}  # fmt: skip


# ---- copies of inputs that a kernel cannot read as they lie


def _no_copies(node: Node, inputs: list[Layout]) -> int:
    del node, inputs
    return 0


def _matrix_copies(node: Node, inputs: list[Layout]) -> int:
    del node
    return sum(1 not in _last_two(x) for x in inputs[:2])


def _last_two(x: Layout) -> Shape:
    """Strides of a matrix, those of axes of length 1 as they may be read."""
    return tuple(1 if n == 1 else step for n, step in zip(x.shape, x.strides, strict=True))[-2:]


def _packed_copies(node: Node, inputs: list[Layout]) -> int:
    del node
    return sum(not _is_row_matrix(x) for x in inputs)


def _is_row_matrix(x: Layout) -> bool:
    below, last = x.strides[-2:]
    return (last == 1 or x.shape[-1] == 1) and (below == x.shape[-1] or x.shape[-2] == 1)


def _norm_copies(node: Node, inputs: list[Layout]) -> int:
    del node
    x = inputs[0]
    dense = x.is_contiguous and (x.strides[-1] == 1 or x.shape[-1] == 1)
    if dense and len(x.shape) > 1:
        dense = x.strides[-2] in (0, x.shape[-1]) or x.shape[-2] == 1
    return not dense


def _softmax_copies(node: Node, inputs: list[Layout]) -> int:
    return _norm_copies(node, inputs[:1])


def _scan_copies(node: Node, inputs: list[Layout]) -> int:
    del node
    return not inputs[0].is_contiguous


def _quantize_copies(node: Node, inputs: list[Layout]) -> int:
    del node
    return sum(not x.is_row_contiguous for x in inputs)


def _rope_copies(node: Node, inputs: list[Layout]) -> int:
    x, (dims,) = inputs[0], node.arguments
    *_, steps, dim = x.shape
    if dims < dim:
        return 1
    shape = x.shape
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    if x.is_row_contiguous or len(shape) == 3:
        return 0
    heads = x.shape[1]
    swapped = (steps * heads * dim, dim, heads * dim)
    return not (len(x.shape) == 4 and x.strides[:3] == swapped)


def _attention_copies(node: Node, inputs: list[Layout]) -> int:
    del node
    q, k, v, *mask = inputs
    if q.shape[2] > DECODE_QUERIES:
        return sum(x.strides[-1] != 1 for x in inputs)
    return (
        (not _queries_fit(q))
        + sum(not _keys_fit(x) for x in (k, v))
        + sum(not _mask_fits(m, q) for m in mask)
    )


def _queries_fit(q: Layout) -> bool:
    if q.is_row_contiguous:
        return True
    if 1 not in q.shape[:2]:
        return False
    other = 1 if q.shape[0] == 1 else 0
    steps = (q.strides[3], q.strides[2], q.strides[other])
    return steps == (1, q.shape[3] * q.shape[other], q.shape[3])


def _keys_fit(k: Layout) -> bool:
    if k.strides[-1] != 1:
        return False
    return 1 in k.shape[:2] or k.strides[0] == k.strides[1] * k.shape[1]


def _mask_fits(mask: Layout, q: Layout) -> bool:
    if mask.is_row_contiguous or 1 in q.shape[:2]:
        return True
    return mask.strides[0] == mask.strides[1] * mask.shape[1]


COPIES: dict[str, Callable[[Node, list[Layout]], int]] = {
    "AddMM": _matrix_copies, "Dequantize": _quantize_copies, "GatherMM": _matrix_copies,
    "GatherQMM": _packed_copies, "LayerNorm": _norm_copies, "LogSumExp": _softmax_copies,
    "Matmul": _matrix_copies, "Quantize": _quantize_copies, "QuantizedMatmul": _packed_copies,
    "RMSNorm": _norm_copies, "RoPE": _rope_copies, "Scan": _scan_copies,
    "ScaledDotProductAttention": _attention_copies, "Softmax": _softmax_copies,
}  # fmt: skip
