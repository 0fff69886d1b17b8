"""Qwen3-VL, dense: pictures at any size, clips frame by frame, features for the first layers."""

from mlx_vlm_pipes.architectures.qwen3_vl.model import Qwen3VLInputs, Qwen3VLModel
from mlx_vlm_pipes.architectures.qwen3_vl.model_config import Qwen3VLConfig, VisionConfig

__all__ = ["Qwen3VLConfig", "Qwen3VLInputs", "Qwen3VLModel", "VisionConfig"]
