"""Key and value storage: rows, slots, growth, quantised formats, and the view of them as pages."""

from mlx_vlm_pipes.kv_cache.cache import (
    CacheRow,
    KVCache,
    Span,
    capacity_bucket,
    row_bucket,
)
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
from mlx_vlm_pipes.kv_cache.storage import (
    CacheFormat,
    Layer,
    PlainFormat,
    QuantizedFormat,
    cache_format,
    write_decode,
)

__all__ = [
    "CacheFormat", "CacheRow", "KVCache", "KVCacheInputs", "KVCacheInputsPerDevice", "Layer",
    "Pages", "PlainFormat", "QuantizedFormat", "RowCacheInputs", "Span", "cache_format",
    "cache_inputs", "capacity_bucket", "from_pages", "increment_cache_lengths", "pages_for",
    "row_bucket", "rows_of", "write_decode", "write_pages",
]  # fmt: skip
