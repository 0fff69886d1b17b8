"""Whether the output head is the embedding. Decided here and nowhere else.

config.json may say so (the outer part or the text part), the files may lack a head, and a head
that differs from the embedding is used whatever config.json says, as in transformers.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import mlx.core as mx

from mlx_vlm_pipes.hf_config import tie_flag
from mlx_vlm_pipes.weights import WeightData

HEAD, EMBEDDING = "lm_head", "embed_tokens"


def declared_tied(outer: Any, text: Any) -> bool:
    """Whether either configuration says so; a text one knows nothing of the part around it."""
    return bool(tie_flag(outer, text))


def tied_by_names(
    outer: Any, text: Any, names: Container[str], head: str = f"{HEAD}.weight"
) -> bool:
    """The rule of `finalize`: declared, or no head among the names. Reads no values.

    Args: outer and text, the two configurations that may declare it; head, the head's full name.
    """
    return declared_tied(outer, text) or head not in names


def settle_head(state: dict[str, WeightData], *, tied: bool, prefix: str = "") -> bool:
    """Whether the head is the embedding after all; one that repeats it is dropped from `state`.

    Args: tied, what `tied_by_names` made of it; prefix, what stands before the decoder's names.
    Reads head and embedding where both are there and are said to be one.
    """
    head = _module(state, f"{prefix}{HEAD}.")
    embedding = _module(state, f"{prefix}{EMBEDDING}.")
    if not tied or not head or not embedding:
        return tied
    same = head.keys() == embedding.keys() and all(
        weight.shape == embedding[name].shape and mx.array_equal(weight.data, embedding[name].data)
        for name, weight in head.items()
    )
    if same:
        for name in head:
            del state[f"{prefix}{HEAD}.{name}"]
    return same


def _module(state: dict[str, WeightData], prefix: str) -> dict[str, WeightData]:
    """A module's tensors by their last name: weight, and scales and biases where it is packed."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
