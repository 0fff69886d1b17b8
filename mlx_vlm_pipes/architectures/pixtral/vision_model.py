"""The Pixtral tower and its projector: packed images of any size.

Source: transformers modeling_pixtral.py, modeling_llava.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_pipes.architectures.pixtral.model_config import PixtralConfig
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.rope import inverse_frequencies
from mlx_vlm_pipes.nn.vision import Turn, rotate_half_split, segment_attention, turn_of

NORM_EPS = 1e-5  # of the whole tower; no configuration names it


def image_grids(shapes: Sequence[Sequence[int]], patch_size: int) -> np.ndarray:
    """Rows and columns of patches, int32 [N, 2], of images [C, H, W]."""
    return np.array([s[1:] for s in shapes], np.int32).reshape(-1, 2) // patch_size


def to_patches(pixel_values: np.ndarray, patch_size: int) -> np.ndarray:
    """An image [C, H, W] -> its patches row by row, [H / p * W / p, C * p * p]: (channel, y, x)."""
    channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixel_values[:, : rows * patch_size, : columns * patch_size]
    x = x.reshape(channels, rows, patch_size, columns, patch_size).transpose(1, 3, 0, 2, 4)
    return x.reshape(rows * columns, -1)


def position_ids(grids: np.ndarray, side: int) -> np.ndarray:
    """row * stride + column of every patch of all images, int32 [P].

    The stride is `side`, or the image's columns where it is wider.
    """
    ids = [
        np.arange(rows)[:, None] * max(side, columns) + np.arange(columns)
        for rows, columns in grids
    ]
    return np.concatenate([np.zeros(0, np.int32), *(i.reshape(-1) for i in ids)]).astype(np.int32)


def split_positions(ids: np.ndarray, grids: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `position_ids`: row and column of every patch."""
    strides = np.repeat(np.maximum(grids[:, 1], side), grids.prod(axis=1))
    return ids // strides, ids % strides


class PatchRotary:
    """2-D rotary angles: even frequencies turn with the row, odd ones with the column."""

    def __init__(self, head_dim: int, theta: float) -> None:
        base = inverse_frequencies(head_dim, theta)
        self._rows, self._columns = base[0::2], base[1::2]

    def __call__(self, rows: np.ndarray, columns: np.ndarray) -> Turn:
        """How patches at rows [P] and columns [P] turn."""
        angles = np.concatenate(
            [
                rows[:, None].astype(np.float32) * self._rows,
                columns[:, None].astype(np.float32) * self._columns,
            ],
            axis=-1,
        )
        return turn_of(mx.array(angles))


class PixtralAttention(nn.Module):
    """Bidirectional self-attention inside each image: [P, E] -> [P, E], added to the residual."""

    def __init__(self, config: PixtralConfig) -> None:
        super().__init__()
        hidden, dim = config.vision_hidden_size, config.vision_head_dim
        self.num_heads, self.scale = config.vision_num_attention_heads, dim**-0.5
        inner = self.num_heads * dim
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def __call__(self, x: mx.array, turn: Turn, lengths: Sequence[int]) -> mx.array:
        q, k, v = (
            projection(x).reshape(x.shape[0], self.num_heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [P, H, D]
        q, k = rotate_half_split(q, turn), rotate_half_split(k, turn)
        out = segment_attention(q, k, v, lengths, self.scale)  # [P, H, D]
        return self.o_proj(out.reshape(x.shape[0], -1))


class PixtralMLP(nn.Module):
    """Gated feed-forward: [P, E] -> [P, E]."""

    def __init__(self, config: PixtralConfig) -> None:
        super().__init__()
        hidden, inner = config.vision_hidden_size, config.vision_intermediate_size
        self.act_fn = activation(config.vision_hidden_act)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PixtralLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual: [P, E] -> [P, E]."""

    def __init__(self, config: PixtralConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.vision_hidden_size, NORM_EPS)
        self.attention = PixtralAttention(config)
        self.ffn_norm = nn.RMSNorm(config.vision_hidden_size, NORM_EPS)
        self.feed_forward = PixtralMLP(config)

    def __call__(self, h: mx.array, turn: Turn, lengths: Sequence[int]) -> mx.array:
        h = h + self.attention(self.attention_norm(h), turn, lengths)
        return h + self.feed_forward(self.ffn_norm(h))


class PixtralTransformer(nn.Module):
    """The layers: [P, E] -> the hidden states before, between and after them, each [P, E]."""

    def __init__(self, config: PixtralConfig) -> None:
        super().__init__()
        self.layers = [PixtralLayer(config) for _ in range(config.vision_num_hidden_layers)]

    def __call__(self, h: mx.array, turn: Turn, lengths: Sequence[int]) -> list[mx.array]:
        states = [h]
        for layer in self.layers:
            states.append(layer(states[-1], turn, lengths))
        return states


class PixtralTower(nn.Module):
    """Patches [P, C * p * p] of all images -> the tower's hidden states, each [P, E]."""

    def __init__(self, config: PixtralConfig) -> None:
        super().__init__()
        self.rotary = PatchRotary(config.vision_head_dim, config.vision_rope_theta)
        hidden = config.vision_hidden_size
        inner = config.num_channels * config.patch_size**2
        self.patch_conv = nn.Linear(inner, hidden, bias=False)  # a convolution, as a matrix
        self.ln_pre = nn.RMSNorm(hidden, NORM_EPS)
        self.transformer = PixtralTransformer(config)

    def __call__(
        self, patches: mx.array, rows: np.ndarray, columns: np.ndarray, lengths: Sequence[int]
    ) -> list[mx.array]:
        h = self.ln_pre(self.patch_conv(patches.astype(self.patch_conv.weight.dtype)))
        return self.transformer(h, self.rotary(rows, columns), lengths)


class Projector(nn.Module):
    """[P, k * E] -> [P, text E]."""

    def __init__(self, config: PixtralConfig) -> None:
        super().__init__()
        inner = config.vision_hidden_size * len(config.vision_feature_layers)
        self.linear_1 = nn.Linear(inner, config.hidden_size, bias=config.projector_bias)
        self.act = activation(config.projector_hidden_act)
        self.linear_2 = nn.Linear(
            config.hidden_size, config.hidden_size, bias=config.projector_bias
        )

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(self.act(self.linear_1(x)))


class PixtralVision(nn.Module):
    """From packed patches to the rows that replace [IMG] tokens.

    A patch attends to the patches of its own image only, so no image sees its neighbours.
    """

    def __init__(self, config: PixtralConfig) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.feature_layers = config.vision_feature_layers
        self.vision_model = PixtralTower(config)
        self.multi_modal_projector = Projector(config)

    def __call__(self, patches: mx.array, mask: mx.array, ids: mx.array) -> mx.array:
        """Vision rows of all images, [P, text E], patches in order.

        Args: patches float [P, C * p * p]; mask int32 [N, 2] and ids int32 [P] as in
        `PixtralInputs`. Both are read on the host: they must not depend on the model's results.
        """
        grids = np.array(mask)
        rows, columns = split_positions(np.array(ids), grids, self.side)
        lengths = grids.prod(axis=1).tolist()
        states = self.vision_model(patches, rows, columns, lengths)
        chosen = [states[layer] for layer in self.feature_layers]
        features = chosen[0] if len(chosen) == 1 else mx.concatenate(chosen, axis=-1)
        return self.multi_modal_projector(features)
