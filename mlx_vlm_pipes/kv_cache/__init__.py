"""Key and value storage: rows, slots, growth, quantised formats."""

from mlx_vlm_pipes.kv_cache.cache import (
    CacheRow,
    KVCache,
    KVCacheInputs,
    KVCacheInputsPerDevice,
    RowCacheInputs,
    cache_inputs,
    capacity_bucket,
    increment_cache_lengths,
    row_bucket,
)
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
    "PlainFormat", "QuantizedFormat", "RowCacheInputs", "cache_format", "cache_inputs",
    "capacity_bucket", "increment_cache_lengths", "row_bucket", "write_decode",
]  # fmt: skip
