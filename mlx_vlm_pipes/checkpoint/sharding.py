"""A rank's part of a decoder's tensors: cut as they are read, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_vlm_pipes.checkpoint.state import StateDict
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.parallel import Cuts, decoder_shares, local_config
from mlx_vlm_pipes.ranks import Ranks


def _shapes(state: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: weight.shape for name, weight in state.items()}


@dataclass(frozen=True)
class OwnPart:
    """What one rank has of a decoder, in bytes: held in memory, and read of files for it."""

    held: int
    read: int
    kv_heads: int


def own_part(config: DecoderConfig, state: StateDict, rank: int, size: int) -> OwnPart:
    """From names and shapes alone. Raises: ConfigError where a decoder cannot be cut so."""
    parts = decoder_shares(config, _shapes(state), size)
    cuts, held, read = Cuts(config, parts, rank), 0, 0
    for name, weight in state.items():
        cut = cuts.of(name)
        shape = weight.shape if cut is None else cut.local(weight.shape)
        held += math.prod(shape) * weight.dtype.size_in_bytes
        read += weight.read_bytes(shape)
    begin, end = parts.kv_heads[rank]
    return OwnPart(held, read, end - begin)


def expected_bytes(config: DecoderConfig, text: StateDict, tower: StateDict, ranks: Ranks) -> int:
    """Bytes of what this process is to hold of a decoder and a tower, before any is read.

    Raises: ConfigError for what does not run on so many ranks.
    """
    outside = sum(weight.nbytes for weight in tower.values())
    if not ranks.are_many:
        return outside + sum(weight.nbytes for weight in text.values())
    if text.loras:
        raise ConfigError(
            f"LoRA adapters on {ranks.size} ranks; merge them into the model (convert --lora)"
        )
    held = own_part(config, text, ranks.rank, ranks.size).held
    return held + (outside if ranks.is_first else 0)


def keep_own_part(
    state: StateDict, config: DecoderConfig, ranks: Ranks, note: Callable[[int], None]
) -> DecoderConfig:
    """Replace the tensors of a whole decoder by a rank's part of them, read and evaluated.

    state: names below `language_model.`, which fit `config`; note: is told of bytes as they are
    read. Returns: the rank's own config. Raises: ConfigError where the decoder cannot be cut for
    so many ranks.
    """
    parts = decoder_shares(config, _shapes(state), ranks.size)
    cuts = Cuts(config, parts, ranks.rank)
    for name in list(state):
        cut = cuts.of(name)
        if cut is None:
            note(state[name].read_bytes(state[name].shape))
            continue
        whole = state.pop(name)  # let go before the next one is read
        state[name] = whole.part(cut.axis, cut.within(whole.shape))
        note(whole.read_bytes(state[name].shape))
    return local_config(config, parts, ranks)
