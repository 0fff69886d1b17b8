"""Qwen3's text configuration, which InternVL may carry."""

from mlx_vlm_pipes.architectures.qwen3.model_config import Qwen3Config

__all__ = ["Qwen3Config"]
