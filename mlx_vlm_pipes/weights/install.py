"""Putting weights into modules: each tensor has its place, each place its tensor, or one error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vlm_pipes.errors import WeightsError, clip
from mlx_vlm_pipes.weights.checkpoint import WeightData
from mlx_vlm_pipes.weights.layout import MAX_NAMED, group_names

_FOREIGN_SUFFIXES = (".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv", ".weight_packed")


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Dotted parameter name -> shape; nothing is evaluated, so a 70B model costs milliseconds."""
    return {name: tuple(array.shape) for name, array in _parameters(module).items()}


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters())))


def install_weights(module: nn.Module, weights: Mapping[str, mx.array | WeightData]) -> None:
    """Give every parameter of a module its tensor, unevaluated, in the tensor's own dtype.

    Args: weights, parameter name (list members by number: `mlp1.0.weight`) -> array.
    Raises: WeightsError, one line, if any is missing, unexpected, mis-shaped, or packed where
    the module is not; the module is then unchanged. At most ten groups of each are named.
    """
    arrays = {n: w.data if isinstance(w, WeightData) else w for n, w in weights.items()}
    parameters = _parameters(module)
    check_names_and_shapes(
        {name: tuple(array.shape) for name, array in parameters.items()},
        {name: tuple(array.shape) for name, array in arrays.items()},
    )
    packed = [n for n, a in arrays.items() if _is_float(parameters[n]) and not _is_float(a)]
    plain = [n for n, a in arrays.items() if _is_float(a) and not _is_float(parameters[n])]
    if packed or plain:
        raise WeightsError(
            f"{len(packed or plain)} tensors are {'integers' if packed else 'floats'} where the"
            f" model has {'floats' if packed else 'packed integers'}:"
            f" {group_names(packed or plain)}; the quantization entry of config.json does not fit"
        )
    module.update(cast("dict[str, Any]", tree_unflatten(list(arrays.items()))))


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def check_names_and_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what a model wants with what a checkpoint has, both by canonical name.

    Raises: WeightsError naming at most ten groups each of missing, unexpected and mis-shaped
    tensors, and the likely causes.
    """
    problems = describe_mismatch(expected, found)
    if problems:
        raise WeightsError("weights do not fit the model: " + "; ".join(problems))


def describe_mismatch(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What is missing, unexpected, mis-shaped, and why probably; empty if all is well."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and expected[name] != found[name]]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {group_names(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected: {group_names(unexpected)}")
    if wrong:
        parts.append(f"{len(wrong)} mis-shaped: {_group_shapes(wrong, expected, found)}")
    causes = _likely_causes(set(expected), missing, unexpected, wrong)
    return [*parts, *(f"likely cause: {cause}" for cause in causes)]


def _group_shapes(
    names: Iterable[str],
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> str:
    """Mis-shaped tensors, alike ones of different layers folded together."""
    counts: dict[str, int] = {}
    for name in names:
        folded = clip(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), 120)
        text = f"{folded} is {list(found[name])}, expected {list(expected[name])}"
        counts[text] = counts.get(text, 0) + 1
    shown = [f"{t} (x{n})" if n > 1 else t for t, n in list(counts.items())[:MAX_NAMED]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more kinds" if more > 0 else "")


def _likely_causes(
    expected: set[str], missing: list[str], unexpected: list[str], wrong: list[str]
) -> list[str]:
    causes = []
    foreign = [name for name in unexpected if name.endswith(_FOREIGN_SUFFIXES)]
    if foreign:
        causes.append(
            f"'{clip(foreign[0])}' is of a quantisation format that config.json does not declare"
        )
    elif any(name.endswith(".scales") for name in unexpected):
        causes.append("tensors are packed but config.json has no fitting quantization entry")
    if any(".lora_" in name for name in unexpected):
        causes.append("these are LoRA tensors; load them with adapter=")
    if "language_model.lm_head.weight" in missing:
        causes.append("no output head: set tie_word_embeddings to true if the model ties them")
    causes += _extra_prefix(expected, unexpected) or _missing_parts(expected, missing)
    causes += _layer_count(missing, unexpected)
    vocabulary = [name for name in wrong if "embed_tokens" in name or "lm_head" in name]
    if vocabulary and len(vocabulary) == len(wrong):
        causes.append("vocab_size in config.json is not the checkpoint's")
    return causes


def _missing_parts(expected: set[str], missing: list[str]) -> list[str]:
    """Parts of the model (first name component) of which nothing at all was found."""
    absent = set(missing)
    parts = dict.fromkeys(name.split(".")[0] for name in missing if "." in name)
    return [
        f"the whole {part} is missing, perhaps a shard or a text-only checkpoint"
        for part in parts
        if all(name in absent for name in expected if name.startswith(part + "."))
    ]


def _extra_prefix(expected: set[str], unexpected: list[str]) -> list[str]:
    """A prefix without which most of the unexpected names would be right."""
    for depth in (1, 2, 3):
        cut = [name.split(".", depth) for name in unexpected]
        fits = [parts for parts in cut if parts[-1] in expected and len(parts) == depth + 1]
        if fits and 2 * len(fits) > len(unexpected):
            prefix = ".".join(fits[0][:depth])
            return [f"names carry the extra prefix '{clip(prefix)}.'"]
    return []


def _layer_count(missing: list[str], unexpected: list[str]) -> list[str]:
    """Whether the files hold fewer or more layers than the configuration says."""
    for names, what in ((missing, "fewer"), (unexpected, "more")):
        layers = {int(n) for name in names for n in re.findall(r"layers\.(\d{1,6})\.", name)}
        if layers and 0 not in layers and max(layers) - min(layers) + 1 == len(layers):
            return [f"the files hold {what} layers than config.json says, from {min(layers)} on"]
    return []
