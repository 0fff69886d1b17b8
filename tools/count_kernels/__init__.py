"""How many kernels MLX's Metal back end would launch for a function, counted without a Mac.

    python -m tools.count_kernels                          # built-in shapes: every case
    python -m tools.count_kernels --cases decode sampling  # some cases
    python -m tools.count_kernels --model DIR              # one checkpoint's decode step and tower

`count(function, *arrays)` is the same for tests. Nothing is evaluated.

What is modelled, from MLX's source (0.32, mlx/backend/metal and mlx/backend/gpu):
- fusion by `mx.compile`: MLX itself fuses the graph here as it does on a Mac, and says in the
  names of its Compiled primitives what became one kernel; equal nodes are merged as it merges them;
- norms, rope, attention and dequantise, which MLX takes apart on a CPU, are one primitive each;
  attention only with a head size and a number of queries that the Metal kernels take;
- views (reshape, transpose, slice, split, broadcast, squeeze, depends, ...) launch nothing, a
  reshape that strides forbid copies;
- copies before rope, attention (queries, keys, mask), norms, softmax, scans, reductions and matrix
  products whose inputs are not laid out as the kernels ask;
- the copy before a scatter or slice update whose target somebody else still holds; a function's
  own inputs are taken to be given away, as the engine gives its cache;
- slice update at an array's position: 2; concatenation: one copy a part; sorts, partitions and
  top-k: 1 to 1,024 / 2,048 elements, from there a block sort, two kernels a merge and a copy;
- the second pass of a reduction over more than 4,096 elements in all, of split-K products.

What is not: which buffers are given to another array (only scatters depend on it), two-pass
attention from 1,024 or 4,096 keys (by chip), M5's own kernels, kernels of indices beyond 2^31,
quantised products of many rows in several passes, graph work and gaps between kernels, and that
kernels differ in cost.
"""

from tools.count_kernels.launches import Count, count

__all__ = ["Count", "count"]
