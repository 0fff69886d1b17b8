"""Tokenizer, special tokens, chat template and picture settings against the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_pipes.checkpoint.state import LANGUAGE
from mlx_vlm_pipes.contexts import require_known_tokens
from mlx_vlm_pipes.doctor.report import Checkup
from mlx_vlm_pipes.doctor.tensors import Tensors
from mlx_vlm_pipes.errors import InputError, PipesError, clip
from mlx_vlm_pipes.processing.base import TextProcessor
from mlx_vlm_pipes.processing.chat_template import find_template
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.registry import Room

_PROMPT = "Is this template in order?"


def examine_processor(
    room: Room, folder: Path, values: Mapping[str, Any], tensors: Tensors | None, checkup: Checkup
) -> None:
    """Build the processor as loading does, and hold it against config.json and the embedding."""
    processor: TextProcessor | None = None
    with checkup.collecting("processor"):
        processor = room.processor_class()(folder, values)
    tokenizer: Tokenizer | None = processor.tokenizer if processor is not None else None
    if tokenizer is None:
        try:
            tokenizer = Tokenizer(folder)
        except PipesError:
            return  # found above
    _look_at_tokens(tokenizer, tensors, checkup)
    if processor is not None:
        _look_at_ends(processor, tensors, checkup)
    _look_at_prompt(tokenizer, tensors, checkup)
    _look_at_template(folder, tokenizer, processor, checkup)


def _rows(tensors: Tensors | None) -> int | None:
    """Rows of the embedding, None where it is unknown."""
    embedding = tensors.state.get(LANGUAGE + "embed_tokens.weight") if tensors else None
    return embedding.shape[0] if embedding is not None and embedding.shape else None


def _look_at_tokens(tokenizer: Tokenizer, tensors: Tensors | None, checkup: Checkup) -> None:
    rows = _rows(tensors)
    if rows is not None and tokenizer.vocab_size > rows:
        checkup.error(
            "tokenizer",
            f"has {tokenizer.vocab_size} tokens, the embedding only {rows} rows; they are of"
            " different models",
        )
    elif rows is not None and (beyond := tokenizer.beyond(rows)):
        token, number = next(iter(beyond.items()))
        checkup.warn(
            "tokenizer",
            f"{len(beyond)} tokens lie beyond the {rows} embedding rows, the first is"
            f" {clip(token)!r} with id {number}; prompts that have them are refused",
        )
    missing = [
        f"{key} {token!r}"
        for key, token in tokenizer.named_tokens.items()
        if key in ("bos_token", "eos_token", "pad_token", "unk_token")
        and tokenizer.token_id(token) is None
    ]
    if missing:
        checkup.warn("tokenizer", f"special tokens that it lacks: {', '.join(missing)}")


def _look_at_prompt(tokenizer: Tokenizer, tensors: Tensors | None, checkup: Checkup) -> None:
    """Whether plain English has rows in the embedding."""
    rows = _rows(tensors)
    with checkup.collecting("tokenizer"):
        if rows is not None:
            require_known_tokens(np.array(tokenizer.encode(_PROMPT)), rows)


def _look_at_ends(processor: TextProcessor, tensors: Tensors | None, checkup: Checkup) -> None:
    """End tokens: there are some, and the model can make them."""
    rows = _rows(tensors)
    ends = processor.eos_token_ids
    if not ends:
        checkup.warn("tokenizer", "no end token is known; answers end at max_tokens only")
    beyond = [token for token in ends if rows is not None and token >= rows]
    if beyond:
        checkup.error("tokenizer", f"end token {beyond[0]} lies beyond the {rows} embedding rows")


def _look_at_template(
    folder: Path, tokenizer: Tokenizer, processor: TextProcessor | None, checkup: Checkup
) -> None:
    """Where the template is, whether it compiles, and whether it takes a plain message."""
    with checkup.collecting("chat template"):
        found = find_template(folder)
        if found is None:
            checkup.warn("chat template", "there is none; only raw prompts can be given")
            return
        checkup.chat_template = found[1]
        template = tokenizer.chat_template
        if template is None or processor is None:
            return
        template.check()
        request = PromptRequest(_PROMPT)
        try:
            text = processor.process(request).text
        except InputError as error:
            checkup.warn("chat template", f"refuses a plain message: {error}")
            return
        if _PROMPT not in text:
            checkup.error("chat template", "loses the text of the message")
