"""Llama 3 and its relatives: text only."""

from mlx_vlm_pipes.architectures.llama3.model import Llama3Inputs, Llama3Model, LlamaModelBase
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config

__all__ = ["Llama3Config", "Llama3Inputs", "Llama3Model", "LlamaModelBase"]
