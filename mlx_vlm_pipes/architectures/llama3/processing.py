"""Llama family: chat messages or raw text to token ids. No vision."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.llama3.facts import FACTS
from mlx_vlm_pipes.processing.base import TextProcessor


class Llama3Processor(TextProcessor):
    """Text in, token ids out; pictures and clips are refused by name of the architecture."""

    facts = FACTS
