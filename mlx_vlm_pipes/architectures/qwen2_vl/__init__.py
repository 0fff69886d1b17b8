"""Qwen2-VL: pictures and clips of any size, whole-frame vision attention, three-axis positions."""

from mlx_vlm_pipes.architectures.qwen2_vl.model import Qwen2VLInputs, Qwen2VLModel
from mlx_vlm_pipes.architectures.qwen2_vl.model_config import Qwen2VLConfig, VisionConfig

__all__ = ["Qwen2VLConfig", "Qwen2VLInputs", "Qwen2VLModel", "VisionConfig"]
