"""The vision tower of Qwen2.5-VL: windowed attention over packed pictures and clips.

All pictures lie one behind the other on one axis of P patches, in blocks of merge x merge that
become one row for the decoder. Most layers attend within windows, a few within whole frames.
Source: transformers modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_pipes.architectures.qwen2_5vl.model_config import VisionConfig
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.rope import inverse_frequencies
from mlx_vlm_pipes.nn.vision import (
    PatchEmbed,
    PatchMerger,
    SegmentAttention,
    SegmentBlock,
    Segments,
    turn_of,
)


def window_order(
    window_index: np.ndarray, cu_window_seqlens: np.ndarray, unit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The windows put in order of their length, so that equal ones lie side by side.

    Args: window_index int [P/unit]; cu_window_seqlens [windows + 1] in patches.
    Returns: int [P/unit], merged patches in the new order; int [windows], lengths in patches.
    """
    lengths = np.diff(cu_window_seqlens.astype(np.int64))
    of_unit = np.repeat(lengths, lengths // unit)  # length of the window that a unit is in
    return window_index[np.argsort(of_unit, kind="stable")], np.sort(lengths)


class MLP(nn.Module):
    """Gated feed-forward: [P, E] -> [P, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.act_fn = activation(config.hidden_act)
        self.gate_proj = nn.Linear(size, inner)
        self.up_proj = nn.Linear(size, inner)
        self.down_proj = nn.Linear(inner, size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _block(config: VisionConfig) -> SegmentBlock:
    """One layer, not yet loaded."""
    size = config.hidden_size
    norms = (nn.RMSNorm(size, config.rms_norm_eps) for _ in range(2))
    return SegmentBlock(SegmentAttention(size, config.num_attention_heads), MLP(config), *norms)


class VisionModel(nn.Module):
    """Patches of all pictures of a step to rows for the decoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.unit = config.merge_unit
        self.dtype, self.out_dtype = config.dtype.to_mx(), config.llm_dtype.to_mx()
        self.full_blocks = frozenset(config.fullatt_block_indexes)
        # each axis takes half of the rotary pairs
        self._inv_freq = mx.array(inverse_frequencies(config.head_dim // 2, config.rope_theta))
        self.patch_embed = PatchEmbed(config.patch_elements, config.hidden_size, bias=False)
        self.blocks = [_block(config) for _ in range(config.depth)]
        norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.merger = PatchMerger(norm, config.hidden_size, self.unit, config.out_hidden_size)

    def __call__(
        self,
        pixel_values: mx.array,
        vision_position_ids: mx.array,
        window_index: mx.array,
        cu_seqlens: mx.array,
        cu_window_seqlens: mx.array,
        max_seqlen: mx.array,
        max_window_seqlen: mx.array,
        max_grid_size: mx.array,
    ) -> mx.array:
        """The decoder's rows of all pictures, in the order of the pictures.

        Args: pixel_values float [P, C*tp*p*p]; vision_position_ids int [P, 2], row and column;
        window_index int [P/u]; cu_seqlens, cu_window_seqlens: boundaries of frames and windows in
        patches; max_seqlen, max_window_seqlen [1]; max_grid_size scalar. All but the pixels were
        made on the host and are read there. Returns: [P/u, out_hidden_size], the decoder's dtype.
        """
        del max_seqlen, max_window_seqlen  # longest segments, for kernels that pad: ours do not
        order, windows = window_order(
            np.array(window_index), np.array(cu_window_seqlens), self.unit
        )
        frames = np.diff(np.array(cu_seqlens).astype(np.int64)).tolist()
        angles = self._angles(vision_position_ids, max_grid_size)  # [P, D/2]
        to_windows = mx.array(order.astype(np.int32))
        to_frames = mx.array(np.argsort(order).astype(np.int32))
        in_windows = self._permute(angles, to_windows)
        windowed = Segments(windows.tolist(), turn_of(in_windows))
        lone = len(frames) == 1  # one frame sees itself in any order: no need to go back to its own
        full = Segments(frames, windowed.turn if lone else turn_of(angles))
        h = self._permute(self.patch_embed(pixel_values.astype(self.dtype)), to_windows)
        for i, block in enumerate(self.blocks):
            if i not in self.full_blocks:
                h = block(h, windowed)
            elif lone:
                h = block(h, full)
            else:
                h = self._permute(block(self._permute(h, to_frames), full), to_windows)
        return self.merger(h)[to_frames].astype(self.out_dtype)

    def _angles(self, positions: mx.array, max_grid_size: mx.array) -> mx.array:
        """float32 [P, D/2]: row angles, then column angles.

        Raises: InputError for positions outside max_grid_size, which would be read from nowhere.
        """
        side, largest = int(np.array(max_grid_size)), int(np.array(positions).max(initial=-1))
        if largest >= side:
            raise InputError(
                f"max_grid_size {side}, but a patch lies at {largest}; expected more than that"
            )
        places = mx.arange(side, dtype=mx.float32)
        table = places[:, None] * self._inv_freq  # [max grid size, D/4]
        return table[positions].reshape(positions.shape[0], -1)

    def _permute(self, x: mx.array, order: mx.array) -> mx.array:
        """Rows of x [P, ...] rearranged in whole units of merge x merge patches."""
        return x.reshape(-1, self.unit, *x.shape[1:])[order].reshape(x.shape)
