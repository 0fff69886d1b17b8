"""Qwen2.5-VL: pictures and clips of any size, windowed vision attention, three-axis positions."""

from mlx_vlm_pipes.architectures.qwen2_5vl.model import Qwen2_5VLInputs, Qwen2_5VLModel
from mlx_vlm_pipes.architectures.qwen2_5vl.model_config import Qwen2_5VLConfig, VisionConfig

__all__ = ["Qwen2_5VLConfig", "Qwen2_5VLInputs", "Qwen2_5VLModel", "VisionConfig"]
