"""Random weights, keyed by parameter name so that they do not depend on torch's generators."""

import math
import zlib
from collections.abc import Collection

import numpy as np
import torch

FINAL_NORMS = ("model.norm.weight", "language_model.norm.weight", "text_model.norm.weight")


def randomise(model: torch.nn.Module, seed: int, quiet_ids: Collection[int], *, tied: bool) -> None:
    """Overwrite every parameter, in place.

    Scales are chosen so that attention is peaked and every part of the network matters for the
    logits; the rows of `quiet_ids` in the head are small, so that greedy tokens are plain text.
    """
    seen: set[int] = set()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        rng = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) % 2**32)
        value = _draw(name, tuple(parameter.shape), rng, tied=tied)
        if "lm_head" in name or (tied and "embed_tokens" in name):
            value[list(quiet_ids)] *= 0.3
        parameter.copy_(torch.from_numpy(value.astype(np.float32)))


def round_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).float())


def _draw(
    name: str, shape: tuple[int, ...], rng: np.random.RandomState, *, tied: bool
) -> np.ndarray:
    leaf = name.rsplit(".", 1)[-1]
    if "embed_tokens" in name:
        return rng.standard_normal(shape) * (2.5 / math.sqrt(shape[-1]) if tied else 1.0)
    if "lm_head" in name:
        return rng.standard_normal(shape) * (2.5 / math.sqrt(shape[-1]))
    if any(k in name for k in ("position_embedding", "pos_embed.", "cls_token")):
        return rng.standard_normal(shape) * 0.6
    if len(shape) >= 2:
        gain = 1.5 if any(k in name for k in ("q_proj", "k_proj", ".qkv", "qkv_proj")) else 1.1
        return rng.standard_normal(shape) * gain / math.sqrt(np.prod(shape[1:]))
    if leaf.startswith("lambda"):
        return rng.uniform(0.4, 1.2, shape)
    if leaf == "bias":
        return rng.standard_normal(shape) * 0.2
    value = rng.uniform(0.5, 1.5, shape)
    if tied and name.endswith(FINAL_NORMS):
        # Signs keep a tied head from simply repeating its input.
        value *= np.where(rng.rand(*shape) < 0.5, -1.0, 1.0)
    return value
