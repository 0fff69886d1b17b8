"""Operations on 16-bit numbers that round once, at their end, on every device.

MLX's kernels for GPUs add up in float32. Its CPU kernels add up packed products in the type of
the input (8 to 16 times the rounding error of one rounding) and round attention's scores, so on a
CPU both are computed in float32, which is also faster: 2 to 40 times, measured on x86. Unpacking
rounds after the product with the scale and again after the sum with the bias, on all devices.
"""

from __future__ import annotations

import mlx.core as mx


def attend(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """mx.fast.scaled_dot_product_attention; on a CPU in float32. Returns: as q, in its dtype."""
    if _is_exact(q):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    wide = (x.astype(mx.float32) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(*wide, scale=scale, mask=mask).astype(q.dtype)


def is_fused(
    q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str, device: mx.Device | None = None
) -> bool:
    """Whether MLX has one kernel for this attention, so that its scores are never in memory.

    device: MLX's default where none is given. MLX is asked to take no other way, and raises where
    it would have to; that computes nothing.
    """
    try:
        mx.fast.scaled_dot_product_attention(
            q, k, v, scale=1.0, mask=mask, force_fused=True, stream=device
        )
    except ValueError:
        return False
    return True


def packed_product(  # mx.quantized_matmul's
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    transpose: bool = True,
) -> mx.array:
    """mx.quantized_matmul; on a CPU in float32. Returns: the product, in the dtype of x."""
    wide = x
    if not _is_exact(x):
        wide, scales = x.astype(mx.float32), _widened(scales)
        biases = None if biases is None else _widened(biases)
    out = mx.quantized_matmul(
        wide, weight, scales=scales, biases=biases,
        transpose=transpose, group_size=group_size, bits=bits, mode=mode,
    )  # fmt: skip
    return out.astype(x.dtype)


def unpack(  # mx.dequantize's
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Packed numbers as floats [rows, columns], rounded once.

    dtype: what they become; None: that of the scales, bfloat16 where these are no floats.
    """
    if dtype is None:
        dtype = scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16
    wide = mx.dequantize(
        weight, _widened(scales), None if biases is None else _widened(biases),
        group_size, bits, mode, dtype=mx.float32,
    )  # fmt: skip
    return wide.astype(dtype)


def _is_exact(x: mx.array) -> bool:
    """Whether MLX's own kernels for x add up in float32 on the device that computes now."""
    return x.dtype == mx.float32 or mx.default_device().type != mx.DeviceType.cpu


def _widened(part: mx.array) -> mx.array:
    """Scales or biases in float32; those that are bit patterns as they are."""
    return part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part
