"""Llama family: chat messages or raw text to token ids. No vision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.processing.base import TextProcessor

if TYPE_CHECKING:
    from typing_extensions import Self


class Llama3Processor(TextProcessor):
    """Text in, token ids out; pictures and clips are refused by name of the architecture."""

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> Self:
        """Read the tokenizer of a checkpoint.

        Args: config, the parsed config.json. Raises: ProcessorError.
        """
        return cls(folder, config)
