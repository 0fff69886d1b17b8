"""The vision tower of Qwen3-VL: whole pictures at any size, and features for the first layers.

All pictures lie one behind the other on one axis of P patches, in blocks of merge x merge that
become one row for the decoder. Behind some of the blocks a merger of their own makes rows that
the decoder adds to its hidden states (DeepStack); they travel beside the picture's rows.
Source: transformers modeling_qwen3_vl.py, Qwen3VLVisionModel.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_pipes.architectures.qwen3_vl.model_config import VisionConfig
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.rope import inverse_frequencies
from mlx_vlm_pipes.nn.vision import PatchEmbed, SegmentAttention, SegmentBlock, frame_segments

NORM_EPS = 1e-6  # written into the reference's code, in no config.json


class MLP(nn.Module):
    """Feed-forward: [P, E] -> [P, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.act_fn = activation(config.hidden_act)
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(self.act_fn(self.linear_fc1(x)))


def _block(config: VisionConfig) -> SegmentBlock:
    """One layer, not yet loaded."""
    size = config.hidden_size
    norms = (nn.LayerNorm(size, NORM_EPS) for _ in range(2))
    return SegmentBlock(SegmentAttention(size, config.num_attention_heads), MLP(config), *norms)


class PatchMerger(nn.Module):
    """merge x merge patches to one row for the decoder: [P, E] -> [P/u, out_hidden_size].

    norm_merged: the norm is over the merged row, not over each patch.
    """

    def __init__(self, config: VisionConfig, *, norm_merged: bool) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_unit
        self.normed = self.width if norm_merged else config.hidden_size
        self.norm = nn.LayerNorm(self.normed, NORM_EPS)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.norm(x.reshape(-1, self.normed)).reshape(-1, self.width)  # [P/u, u * E]
        return self.linear_fc2(nn.gelu(self.linear_fc1(x)))


class VisionModel(nn.Module):
    """Patches of all pictures of a step to rows for the decoder."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.dtype, self.out_dtype = config.dtype.to_mx(), config.llm_dtype.to_mx()
        self.taps, self.used = config.deepstack_visual_indexes, config.tapped_blocks
        # each axis takes half of the rotary pairs
        self._inv_freq = mx.array(inverse_frequencies(config.head_dim // 2, config.rope_theta))
        self.patch_embed = PatchEmbed(config.patch_elements, config.hidden_size, bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [_block(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config, norm_merged=False)
        self.deepstack_merger_list = [PatchMerger(config, norm_merged=True) for _ in self.taps]

    def __call__(
        self,
        pixel_values: mx.array,
        vision_position_ids: mx.array,
        interpolation_indices: mx.array,
        interpolation_weights: mx.array,
        cu_seqlens: mx.array,
    ) -> mx.array:
        """The decoder's rows of all pictures, in the order of the pictures.

        Args: pixel_values float [P, C*tp*p*p]; vision_position_ids int [P, 2], row and column;
        interpolation_indices int [P, 4] and interpolation_weights float32 [P, 4]: the places of the
        learned table that a patch lies between; cu_seqlens: boundaries of frames in patches, made
        on the host and read there. Returns: [P/u, (1 + K) * out_hidden_size] in the decoder's
        dtype: the row itself, then what each of the decoder's first K layers adds.
        """
        segments = frame_segments(vision_position_ids, cu_seqlens, self._inv_freq)
        h = self.patch_embed(pixel_values.astype(self.dtype))
        h = h + self._places(interpolation_indices, interpolation_weights).astype(h.dtype)
        rows: list[mx.array] = []
        for i, block in enumerate(self.blocks):
            h = block(h, segments)
            if i in self.used:
                rows.append(self.deepstack_merger_list[self.taps.index(i)](h))
        return mx.concatenate([self.merger(h), *rows], axis=1).astype(self.out_dtype)

    def _places(self, indices: mx.array, weights: mx.array) -> mx.array:
        """float32 [P, E]: the learned places [P, 4], mixed; one after the other, to hold few."""
        mixed = self.pos_embed(indices[:, 0]) * weights[:, :1]
        for i in range(1, indices.shape[1]):
            mixed = mixed + self.pos_embed(indices[:, i]) * weights[:, i : i + 1]
        return mixed
