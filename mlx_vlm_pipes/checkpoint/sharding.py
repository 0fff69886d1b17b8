"""A rank's part of a decoder's tensors: cut as they are read, one at a time."""

from __future__ import annotations

from collections.abc import Callable

from mlx_vlm_pipes.checkpoint.state import StateDict
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.parallel import Cuts, decoder_shares, local_config
from mlx_vlm_pipes.ranks import Ranks


def keep_own_part(
    state: StateDict, config: DecoderConfig, ranks: Ranks, note: Callable[[int], None]
) -> DecoderConfig:
    """Replace the tensors of a whole decoder by a rank's part of them, read and evaluated.

    state: names below `language_model.`, which fit `config`; note: is told of bytes as they are
    read. Returns: the rank's own config. Raises: ConfigError where the decoder cannot be cut for
    so many ranks.
    """
    shapes = {name: weight.shape for name, weight in state.items()}
    parts = decoder_shares(config, shapes, ranks.size)
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
