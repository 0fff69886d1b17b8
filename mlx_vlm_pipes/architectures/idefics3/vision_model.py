"""The SigLIP tower and the pixel-shuffle connector of Idefics3 and SmolVLM.

Source: transformers modeling_idefics3.py, modeling_smolvlm.py (spec, section 5.2).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_pipes.architectures.idefics3.model_config import Idefics3VisionConfig
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.vision import pixel_shuffle

MAX_PATCHES = 8192  # encoded at once: bounds the memory of long clips, keeps a GPU busy


def real_frames(
    pixel_values: np.ndarray, pixel_mask: np.ndarray | None, patch_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The frames of a Hugging Face batch, without its all-zero padding frames.

    Args: pixel_values [B, N, C, S, S]; pixel_mask [B, N, S, S], nonzero where a pixel counts.
    Returns: frames [M, C, S, S] and their patch mask, bool [M, S / p, S / p], or None without a
    pixel mask. A patch counts if any of its pixels does.
    """
    frames = pixel_values.reshape(-1, *pixel_values.shape[2:])
    is_real = frames.any(axis=(1, 2, 3))
    if pixel_mask is None:
        return frames[is_real], None
    mask = pixel_mask.reshape(-1, *pixel_mask.shape[2:])[is_real]
    rows, columns = (size // patch_size for size in mask.shape[1:])
    mask = mask[:, : rows * patch_size, : columns * patch_size]
    blocks = mask.reshape(len(mask), rows, patch_size, columns, patch_size)
    return frames[is_real], blocks.max(axis=(2, 4)).astype(np.bool_)


def patch_position_ids(mask: np.ndarray, side: int) -> np.ndarray:
    """Rows of the position table, int32 [N, R * C]; 0 for patches that do not count.

    Args: mask bool [N, R, C]; side: rows and columns of the trained grid. The k-th of n patches
    lies at the fraction k / n of the frame, so its row is floor(k * side / n): integers, because
    the reference's float32 boundaries go wrong at many grids when computed naively.
    """
    rows, columns = mask.shape[1:]
    count_h = np.maximum(mask[:, :, 0].sum(axis=1), 1)[:, None]
    count_w = np.maximum(mask[:, 0, :].sum(axis=1), 1)[:, None]
    row = np.minimum(np.arange(rows) * side // count_h, side - 1)  # [N, R]
    column = np.minimum(np.arange(columns) * side // count_w, side - 1)  # [N, C]
    ids = row[:, :, None] * side + column[:, None, :]
    return np.where(mask, ids, 0).reshape(len(mask), -1).astype(np.int32)


class VisionEmbeddings(nn.Module):
    """Patches and their positions: pixels [N, C, H, W] -> [N, P, E], patches row by row."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.patches_per_side
        inner = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(inner, config.hidden_size)  # a convolution, as a matrix
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def __call__(self, pixel_values: mx.array, mask: np.ndarray) -> mx.array:
        n, channels = pixel_values.shape[:2]
        rows, columns = mask.shape[1:]
        p = self.patch_size
        x = pixel_values[:, :, : rows * p, : columns * p].astype(self.patch_embedding.weight.dtype)
        x = x.reshape(n, channels, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(n, rows * columns, channels * p * p)  # [N, P, C * p * p]
        ids = patch_position_ids(mask, self.side)
        return self.patch_embedding(x) + self.position_embedding(mx.array(ids))


class VisionAttention(nn.Module):
    """Bidirectional self-attention inside each frame: [N, P, E] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.scale = config.num_attention_heads, config.head_dim**-0.5
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        n, p, _ = x.shape
        q, k, v = (
            projection(x).reshape(n, p, self.num_heads, -1).transpose(0, 2, 1, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [N, H, P, D]
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(n, p, -1))


class VisionMLP(nn.Module):
    """[N, P, E] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.act = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class VisionLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual: [N, P, E] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def __call__(self, h: mx.array, mask: mx.array | None) -> mx.array:
        h = h + self.self_attn(self.layer_norm1(h), mask)
        return h + self.mlp(self.layer_norm2(h))


class VisionEncoder(nn.Module):
    """The layers, one after another: [N, P, E] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, h: mx.array, mask: mx.array | None) -> mx.array:
        for layer in self.layers:
            h = layer(h, mask)
        return h


class VisionTransformer(nn.Module):
    """The tower: pixels [N, C, H, W] and patch mask [N, R, C] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixel_values: mx.array, mask: np.ndarray) -> mx.array:
        h = self.embeddings(pixel_values, mask)
        keys = None if mask.all() else mx.array(mask.reshape(len(mask), 1, 1, -1))
        return self.post_layernorm(self.encoder(h, keys))


class ModalityProjection(nn.Module):
    """[N, P / s^2, s^2 * E] -> [N, P / s^2, text E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        inner = config.hidden_size * config.scale_factor**2
        self.proj = nn.Linear(inner, config.text_config_hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj(x)


class Connector(nn.Module):
    """Folds s x s patches into one token: [N, R * C, E] -> [N, R * C / s^2, text E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.scale_factor = config.scale_factor
        self.modality_projection = ModalityProjection(config)

    def __call__(self, x: mx.array, rows: int, columns: int) -> mx.array:
        return self.modality_projection(pixel_shuffle(x, rows, columns, self.scale_factor))


class Idefics3Vision(nn.Module):
    """From frames to the rows that replace image tokens.

    Each frame attends to itself only, so its rows do not depend on its neighbours.
    """

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.vision_model = VisionTransformer(config)
        self.connector = Connector(config)

    def __call__(self, pixel_values: mx.array, patch_mask: np.ndarray | None = None) -> mx.array:
        """Vision rows of all frames.

        Args: pixel_values float [N, C, H, W], as the Hugging Face processor gives each frame;
        patch_mask bool [N, H / p, W / p] of the patches that count, None for all of them.
        Returns: [N * P / s^2, text E], frames in order.
        """
        n, _, height, width = pixel_values.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        step = max(1, MAX_PATCHES // max(1, rows * columns))
        parts: list[mx.array] = []
        for begin in range(0, n, step):
            frames = pixel_values[begin : begin + step]
            if parts:  # one after another: evaluated side by side they would need memory for all
                (frames,) = mx.depends([frames], [parts[-1]])
            mask = np.ones((1, rows, columns), np.bool_)
            if patch_mask is not None:
                mask = patch_mask[begin : begin + step]
            parts.append(self.connector(self.vision_model(frames, mask), rows, columns))
        features = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return features.reshape(n * features.shape[1], -1)
