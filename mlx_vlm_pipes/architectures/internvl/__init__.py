"""InternVL: InternViT, pixel shuffle and a Llama, Qwen2 or Qwen3 decoder."""

from mlx_vlm_pipes.architectures.internvl.model import InternVLInputs, InternVLModel
from mlx_vlm_pipes.architectures.internvl.model_config import InternVLConfig, VisionConfig

__all__ = ["InternVLConfig", "InternVLInputs", "InternVLModel", "VisionConfig"]
