"""InternViT, pixel shuffle and the projector: tiles of pixels to rows of text width.

Hidden states are flat, [N * T, E], with T = patches + 1: every projection is one matrix product.
Source: transformers modeling_internvl.py; modeling_intern_vit.py of the InternVL repositories.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_pipes.architectures.internvl.model_config import (
    CHANNELS,
    InternVLConfig,
    VisionConfig,
)
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.vision import pixel_shuffle
from mlx_vlm_pipes.processing.transforms import cut_tiles
from mlx_vlm_pipes.rounding import attend

PASS_TOKENS = 8192  # tokens that go through the tower together: bounds memory, still fills a GPU
PROJECTOR_EPS = 1e-5
CUBIC = -0.75  # torch's bicubic coefficient


PixelsT = TypeVar("PixelsT", mx.array, np.ndarray)


def as_patches(pixels: PixelsT, patch: int) -> PixelsT:
    """Tiles in the one layout that everything here takes, [N, R, C, 3, p, p].

    Args: pixels, that or [N, 3, H, W]. Raises: InputError for other shapes.
    """
    shape = pixels.shape
    if pixels.ndim == 6 and shape[3:] == (CHANNELS, patch, patch):
        return pixels
    if pixels.ndim != 4 or shape[1] != CHANNELS or shape[2] % patch or shape[3] % patch:
        raise InputError(
            f"InternVL pixel_values {list(shape)}; expected [tiles, rows, columns, 3, {patch},"
            f" {patch}] or [tiles, 3, height, width] in multiples of {patch}"
        )
    return cut_tiles(pixels, patch)


@lru_cache(maxsize=32)
def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """float32 [new, old]: resizes an axis as torch does (half-pixel centres, no antialias)."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        distance = np.abs(centre - (base + tap))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
        index = np.clip(base + tap, 0, old - 1)  # the border repeats
        np.add.at(matrix, (np.arange(new), index), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def resize_positions(table: mx.array, rows: int, columns: int) -> mx.array:
    """Position embeddings for a grid: [P0 + 1, E] -> [rows * columns + 1, E].

    The first row, of the class token, stays; the others are a square grid, resized bicubically.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if rows == side and columns == side:
        return table
    grid = table[1:].astype(mx.float32).reshape(side, side * table.shape[1])
    grid = mx.array(bicubic_matrix(side, rows)) @ grid  # [rows, side * E]
    grid = mx.array(bicubic_matrix(side, columns)) @ grid.reshape(rows, side, -1)
    resized = grid.reshape(rows * columns, -1).astype(table.dtype)
    return mx.concatenate([table[:1], resized])


@partial(mx.compile, shapeless=True)
def add_scaled(residual: mx.array, x: mx.array, scale: mx.array) -> mx.array:
    """residual + scale * x, [T, E] with a layer scale [E], in one kernel."""
    return residual + scale * x


class Embeddings(nn.Module):
    """Patches behind a class token, with positions if the tower has a table of them.

    [N, R, C, 3, p, p] -> [N * (R*C + 1), E].
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, grid = config.hidden_size, config.image_size // config.patch_size
        self.patch_embedding = nn.Linear(CHANNELS * config.patch_size**2, size)
        self.class_embedding = mx.zeros((size,))
        if config.has_positions:
            self.position_embedding = mx.zeros((grid * grid + 1, size))

    def __call__(self, pixels: mx.array) -> mx.array:
        n, rows, columns = pixels.shape[:3]
        pixels = pixels.astype(self.class_embedding.dtype)
        x = self.patch_embedding(pixels.reshape(n, rows * columns, -1))  # [N, P, E]
        first = self.class_embedding
        if "position_embedding" in self:
            positions = resize_positions(self.position_embedding, rows, columns)
            first, x = first + positions[0], x + positions[1:]
        first = mx.broadcast_to(first, (n, 1, x.shape[-1]))
        x = mx.concatenate([first, x], axis=1)  # [N, P + 1, E]
        return x.reshape(-1, x.shape[-1])


class Attention(nn.Module):
    """Bidirectional attention inside each tile: [N * T, E] -> [N * T, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.qkv_bias
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        if config.stacked_qkv:
            self.qkv = nn.Linear(size, 3 * size, bias=bias)
        else:
            self.q_proj = nn.Linear(size, size, bias=bias)
            self.k_proj = nn.Linear(size, size, bias=bias)
            self.v_proj = nn.Linear(size, size, bias=bias)
        if config.qk_normalization:  # over all features, before they are split into heads
            self.q_norm = nn.RMSNorm(size, config.qk_norm_eps)
            self.k_norm = nn.RMSNorm(size, config.qk_norm_eps)
        self.proj = nn.Linear(size, size, bias=config.o_proj_bias)

    def __call__(self, x: mx.array, tokens: int) -> mx.array:
        if "qkv" in self:
            q, k, v = mx.split(self.qkv(x), 3, axis=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (
            y.reshape(-1, tokens, self.num_heads, self.head_dim).transpose(0, 2, 1, 3)
            for y in (q, k, v)
        )  # [N, H, T, D]
        out = attend(q, k, v, scale=self.scale)
        return self.proj(out.transpose(0, 2, 1, 3).reshape(x.shape))


class MLP(nn.Module):
    """Widen, activate, narrow: [N * T, E] -> [N * T, E]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation_fn(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Attention and MLP, each behind a norm, scaled per feature, around a residual.

    [N * T, E] -> [N * T, E].
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        norm = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.ls1 = mx.ones((config.hidden_size,))
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.ls2 = mx.ones((config.hidden_size,))

    def __call__(self, h: mx.array, tokens: int) -> mx.array:
        h = add_scaled(h, self.attn(self.norm1(h), tokens), self.ls1)
        return add_scaled(h, self.mlp(self.norm2(h)), self.ls2)


class Encoder(nn.Module):
    """The layers, under the name that checkpoints give them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]


class Tower(nn.Module):
    """InternViT up to one hidden state: [N, R, C, 3, p, p] -> [N, R * C, E], no class token."""

    def __init__(self, config: VisionConfig, feature_layer: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        if config.final_norm:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = config.num_hidden_layers
        self.depth = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
        self.normed = config.final_norm and feature_layer == -1

    def __call__(self, pixels: mx.array) -> mx.array:
        n, rows, columns = pixels.shape[:3]
        tokens = rows * columns + 1
        h = self.embeddings(pixels)
        for layer in self.encoder.layers[: self.depth]:
            h = layer(h, tokens)
        if self.normed:
            h = self.layernorm(h)
        return h.reshape(n, tokens, -1)[:, 1:]


class Projector(nn.Module):
    """Shuffled features to text width: [..., f * f * E] -> [..., D]."""

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        size = config.vision_config.hidden_size * config.shuffle_factor**2
        text = config.llm_config.hidden_size
        self.layer_norm = nn.LayerNorm(size, eps=PROJECTOR_EPS)
        self.linear_1 = nn.Linear(size, text)
        self.act = activation(config.projector_hidden_act)
        self.linear_2 = nn.Linear(text, text)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(self.act(self.linear_1(self.layer_norm(x))))


class VisionModel(nn.Module):
    """Everything from pixels to text width.

    pixels [N, R, C, 3, p, p] or [N, 3, H, W] -> [N * R * C / f^2, D], tile after tile, in the
    tower's dtype. f is 1 / downsample_ratio. Raises: InputError for grids that f does not divide.
    """

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        self.patch_size, self.factor = config.vision_config.patch_size, config.shuffle_factor
        self.vision_model = Tower(config.vision_config, config.vision_feature_layer)
        self.multi_modal_projector = Projector(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        pixels = as_patches(pixels, self.patch_size)
        n, rows, columns = pixels.shape[:3]
        if rows % self.factor or columns % self.factor:
            raise InputError(
                f"tiles of {rows} x {columns} patches do not divide into blocks of"
                f" {self.factor} x {self.factor}; resize to multiples of"
                f" {self.factor * self.patch_size} pixels"
            )
        step = max(1, PASS_TOKENS // (rows * columns + 1))
        features = [self._encode(pixels[i : i + step]) for i in range(0, n, step)]
        rows_out = features[0] if len(features) == 1 else mx.concatenate(features)
        return rows_out.reshape(-1, rows_out.shape[-1])

    def _encode(self, pixels: mx.array) -> mx.array:
        _, rows, columns = pixels.shape[:3]
        x = pixel_shuffle(self.vision_model(pixels), rows, columns, self.factor)
        return self.multi_modal_projector(x)  # [N, P / f^2, D]
