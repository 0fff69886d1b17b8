"""Key and value storage: rows, slots, growth, quantised formats, and the view of them as pages."""

from mlx_vlm_pipes.kv_cache.buckets import capacity_bucket, most_held, row_bucket
from mlx_vlm_pipes.kv_cache.cache import KVCache
from mlx_vlm_pipes.kv_cache.inputs import (
    KVCacheInputs,
    KVCacheInputsPerDevice,
    Pages,
    RowCacheInputs,
    cache_inputs,
    increment_cache_lengths,
    rows_of,
)
from mlx_vlm_pipes.kv_cache.pages import from_pages, pages_for, write_pages
from mlx_vlm_pipes.kv_cache.rows import CacheRow, Span
from mlx_vlm_pipes.kv_cache.storage import (
    CacheFormat,
    Layer,
    PlainFormat,
    QuantizedFormat,
    by_group,
    cache_format,
    decode_places,
    sides,
    write_decode,
    write_one,
)

__all__ = [
    "CacheFormat", "CacheRow", "KVCache", "KVCacheInputs", "KVCacheInputsPerDevice", "Layer",
    "Pages", "PlainFormat", "QuantizedFormat", "RowCacheInputs", "Span", "by_group", "cache_format",
    "cache_inputs", "capacity_bucket", "decode_places", "from_pages", "increment_cache_lengths",
    "most_held", "pages_for", "row_bucket", "rows_of", "sides", "write_decode",
    "write_one", "write_pages",
]  # fmt: skip
