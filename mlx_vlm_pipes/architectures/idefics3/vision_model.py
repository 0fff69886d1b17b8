"""The SigLIP tower and the pixel-shuffle connector of Idefics3 and SmolVLM.

Source: transformers modeling_idefics3.py, modeling_smolvlm.py.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_pipes.architectures.idefics3.model_config import Idefics3VisionConfig
from mlx_vlm_pipes.nn.activations import activation
from mlx_vlm_pipes.nn.vision import pixel_shuffle
from mlx_vlm_pipes.rounding import attend

MAX_PATCHES = 8192  # encoded at once: bounds the memory of long clips, keeps a GPU busy


def patch_position_ids(rows: int, columns: int, side: int) -> np.ndarray:
    """Rows of the position table, int32 [R * C]; side: rows and columns of the trained grid.

    The k-th of n patches lies at the fraction k / n of the frame, so its row is
    floor(k * side / n): integers, because the reference's float32 boundaries go wrong at many
    grids when computed naively.
    """
    row = np.arange(rows) * side // rows
    column = np.arange(columns) * side // columns
    return (row[:, None] * side + column).reshape(-1).astype(np.int32)


class VisionEmbeddings(nn.Module):
    """Patches and their positions: pixels [N, C, H, W] -> [N, P, E], patches row by row."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.patches_per_side
        inner = config.num_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(inner, config.hidden_size)  # a convolution, as a matrix
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        n, channels, height, width = pixel_values.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        x = pixel_values[:, :, : rows * p, : columns * p].astype(self.patch_embedding.weight.dtype)
        x = x.reshape(n, channels, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(n, rows * columns, channels * p * p)  # [N, P, C * p * p]
        ids = mx.array(patch_position_ids(rows, columns, self.side))
        return self.patch_embedding(x) + self.position_embedding(ids)


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

    def __call__(self, x: mx.array) -> mx.array:
        n, p, _ = x.shape
        q, k, v = (
            projection(x).reshape(n, p, self.num_heads, -1).transpose(0, 2, 1, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [N, H, P, D]
        out = attend(q, k, v, scale=self.scale)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(n, p, -1))


class VisionMLP(nn.Module):
    """[N, P, E] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.activation_fn = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation_fn(self.fc1(x)))


class VisionLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual: [N, P, E] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def __call__(self, h: mx.array) -> mx.array:
        h = h + self.self_attn(self.layer_norm1(h))
        return h + self.mlp(self.layer_norm2(h))


class VisionEncoder(nn.Module):
    """The layers, one after another: [N, P, E] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, h: mx.array) -> mx.array:
        for layer in self.layers:
            h = layer(h)
        return h


class VisionTransformer(nn.Module):
    """The tower: pixels [N, C, H, W] -> [N, P, E]."""

    def __init__(self, config: Idefics3VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


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

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """Vision rows of all frames.

        Args: pixel_values float [N, C, H, W], as the Hugging Face processor gives each frame.
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
            parts.append(self.connector(self.vision_model(frames), rows, columns))
        features = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return features.reshape(n * features.shape[1], -1)
