"""Pixtral: images of any size through a 2-D rotary tower, and a Mistral decoder."""

from mlx_vlm_pipes.architectures.pixtral.model import PixtralInputs, PixtralModel
from mlx_vlm_pipes.architectures.pixtral.model_config import PixtralConfig

__all__ = ["PixtralConfig", "PixtralInputs", "PixtralModel"]
