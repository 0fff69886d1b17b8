"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffle, and a Llama decoder."""

from mlx_vlm_pipes.architectures.idefics3.model import Idefics3Inputs, Idefics3Model
from mlx_vlm_pipes.architectures.idefics3.model_config import (
    Idefics3Config,
    Idefics3VisionConfig,
)

__all__ = ["Idefics3Config", "Idefics3Inputs", "Idefics3Model", "Idefics3VisionConfig"]
