"""The JSON files that a GGUF file stands for, by the names that a model folder has them under."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.gguf.config import config_values, generation_values
from mlx_vlm_pipes.gguf.header import GGUFHeader, read_gguf
from mlx_vlm_pipes.gguf.tokenizer import tokenizer_settings, tokenizer_values

DOCUMENTS: dict[str, Callable[[GGUFHeader], dict[str, Any]]] = {
    "config.json": config_values,
    "generation_config.json": generation_values,
    "tokenizer.json": tokenizer_values,
    "tokenizer_config.json": tokenizer_settings,
}


def gguf_document(path: Path) -> dict[str, Any] | None:
    """`model.gguf/config.json` and the like; None for a name that is none of DOCUMENTS.

    Raises: CheckpointError, one line naming the file.
    """
    make = DOCUMENTS.get(path.name)
    return None if make is None else make(read_gguf(path.parent))
