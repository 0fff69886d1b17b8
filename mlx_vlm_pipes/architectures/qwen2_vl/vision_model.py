"""The vision tower of Qwen2-VL: packed pictures and clips, each frame attending to itself.

All pictures lie one behind the other on one axis of P patches, in blocks of merge x merge that
become one row for the decoder. Source: transformers modeling_qwen2_vl.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.architectures.qwen2_vl.model_config import VisionConfig
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.rope import inverse_frequencies
from mlx_vlm_pipes.nn.vision import (
    PatchEmbed,
    PatchMerger,
    SegmentAttention,
    SegmentBlock,
    frame_segments,
)

NORM_EPS = 1e-6  # written into the reference's code, in no config.json


class MLP(nn.Module):
    """Feed-forward: [P, E] -> [P, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


def _block(config: VisionConfig) -> SegmentBlock:
    """One layer, not yet loaded."""
    size = config.hidden_size
    norms = (nn.LayerNorm(size, NORM_EPS) for _ in range(2))
    return SegmentBlock(SegmentAttention(size, config.num_attention_heads), MLP(config), *norms)


class VisionModel(nn.Module):
    """Patches of all pictures of a step to rows for the decoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, out = config.hidden_size, config.out_hidden_size
        self.dtype, self.out_dtype = config.dtype.to_mx(), config.llm_dtype.to_mx()
        # each axis takes half of the rotary pairs
        self._inv_freq = mx.array(inverse_frequencies(config.head_dim // 2, config.rope_theta))
        self.patch_embed = PatchEmbed(config.patch_elements, size, bias=False)
        self.blocks = [_block(config) for _ in range(config.depth)]
        self.merger = PatchMerger(nn.LayerNorm(size, NORM_EPS), size, config.merge_unit, out)

    def __call__(
        self, pixel_values: mx.array, vision_position_ids: mx.array, cu_seqlens: mx.array
    ) -> mx.array:
        """The decoder's rows of all pictures, in the order of the pictures.

        Args: pixel_values float [P, C*tp*p*p]; vision_position_ids int [P, 2], row and column;
        cu_seqlens: boundaries of frames in patches, made on the host and read there.
        Returns: [P/u, out_hidden_size], the decoder's dtype.
        """
        segments = frame_segments(vision_position_ids, cu_seqlens, self._inv_freq)
        h = self.patch_embed(pixel_values.astype(self.dtype))
        for block in self.blocks:
            h = block(h, segments)
        return self.merger(h).astype(self.out_dtype)
