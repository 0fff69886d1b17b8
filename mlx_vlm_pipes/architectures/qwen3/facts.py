"""Class defaults of Qwen3's text model. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.llama3.facts import QWEN
from mlx_vlm_pipes.facts import RoomFacts

FACTS = RoomFacts(class_defaults={"qwen3": {**QWEN, "head_dim": 128}})
