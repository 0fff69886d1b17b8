"""A rank's part of a decoder's tensors: cut as they are read, one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_vlm_pipes.checkpoint.state import LANGUAGE, StateDict
from mlx_vlm_pipes.errors import ConfigError, clip
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.parallel import Cut, Cuts, decoder_shares, local_config
from mlx_vlm_pipes.ranks import Ranks
from mlx_vlm_pipes.weights import LoRAAdapter


def _cuts(config: DecoderConfig, state: StateDict, ranks: Ranks) -> Cuts:
    return Cuts(config, decoder_shares(config, state.shapes, ranks.size), ranks.rank)


@dataclass(frozen=True)
class OwnPart:
    """What one rank has of a decoder, in bytes: held in memory, and read of files for it."""

    held: int
    read: int
    kv_heads: int


def own_part(config: DecoderConfig, state: StateDict, rank: int, size: int) -> OwnPart:
    """From names and shapes alone. Raises: ConfigError where a decoder cannot be cut so."""
    parts = decoder_shares(config, state.shapes, size)
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
    for lora in text.loras:
        own_lora(lora, _cuts(config, text, ranks))
    held = own_part(config, text, ranks.rank, ranks.size).held
    return held + (outside if ranks.is_first else 0)


def keep_own_part(
    state: StateDict, config: DecoderConfig, ranks: Ranks, note: Callable[[int], None]
) -> DecoderConfig:
    """Replace the tensors and adapters of a whole decoder by a rank's part of them, the tensors
    read and evaluated.

    state: names below `language_model.`, which fit `config`; note: is told of bytes as they are
    read. Returns: the rank's own config. Raises: ConfigError where the decoder cannot be cut for
    so many ranks.
    """
    parts = decoder_shares(config, state.shapes, ranks.size)
    cuts = Cuts(config, parts, ranks.rank)
    state.loras = [own_lora(lora, cuts) for lora in state.loras]
    for name in list(state):
        cut = cuts.of(name)
        if cut is None:
            note(state[name].read_bytes(state[name].shape))
            continue
        whole = state.pop(name)  # let go before the next one is read
        state[name] = whole.part(cut.axis, cut.within(whole.shape))
        note(whole.read_bytes(state[name].shape))
    return local_config(config, parts, ranks)


def own_lora(lora: LoRAAdapter, cuts: Cuts) -> LoRAAdapter:
    """An adapter of a rank's part, lazily: rows of B where outputs are cut, columns of A where
    inputs are. What lies outside the decoder stays as it is.

    Raises: ConfigError for a DoRA pair of a linear whose rows no rank has whole.
    """
    layers = {}
    for path, pair in lora.layers.items():
        inside = path.startswith(LANGUAGE)
        cut = cuts.of(f"{path.removeprefix(LANGUAGE)}.weight") if inside else None
        if cut is None:
            layers[path] = pair
        elif cut.axis == 1:
            if pair.magnitude is not None:
                raise ConfigError(
                    f"adapter '{clip(lora.name)}' is DoRA on '{clip(path)}', whose rows no rank has"
                    " whole; merge it into the model (convert --lora)"
                )
            layers[path] = replace(pair, a=_taken(pair.a, cut, 1))
        else:
            magnitude = None if pair.magnitude is None else _taken(pair.magnitude, cut, 0)
            layers[path] = replace(pair, b=_taken(pair.b, cut, 0), magnitude=magnitude)
    return replace(lora, layers=layers)


def _taken(array: mx.array, cut: Cut, axis: int) -> mx.array:
    """The cut's elements of an axis."""
    places = [mx.arange(begin, end) for begin, end in cut.spans]
    return mx.take(array, mx.concatenate(places), axis=axis)
