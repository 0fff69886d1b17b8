"""Every precision against transformers' float32, and packed weights against the same unpacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mlx_vlm_pipes.conversion.job import convert
from mlx_vlm_pipes.conversion.measure import compare
from mlx_vlm_pipes.conversion.recipe import ConvertOptions
from mlx_vlm_pipes.doctor.device.references import (
    Case,
    answer,
    difference,
    load_cases,
    opened,
    right_tokens,
    text_logits,
)
from mlx_vlm_pipes.doctor.device.report import Recorder
from mlx_vlm_pipes.dtypes import DeviceRef
from mlx_vlm_pipes.pipeline import Pipeline

# Of the largest logit. On a CPU float32 comes to 1e-6; a GPU adds in another order.
FLOAT32_BAR = 1e-4
# Mean KL divergence to float32, in nats: five times what each came to on a CPU (transformers' own
# float16 and bfloat16 come to the same there); a broken kernel is off by a hundred times that.
KL_BARS = {"float32": 1e-8, "float16": 2e-5, "bfloat16": 1e-3}
CACHE_KL_BARS = {"float32": 1e-4, "bfloat16": 1e-3}
PACKED_KL_BARS = {"float32": 1e-8, "float16": 1e-4, "bfloat16": 5e-3}  # scales are rounded too
PACKING_KL_BAR = 0.1  # what four bits do to the model, whatever the kernels


@dataclass(frozen=True)
class Variant:
    """A way to load the model, how far it may be from the reference, and what to do if it is."""

    name: str
    kl_bar: float
    remedy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    logits_bar: float | None = None


@dataclass(frozen=True)
class Reference:
    """Logits [T, V] of the first cases, greedy tokens of all."""

    logits: list[np.ndarray]
    tokens: list[list[int]]


VARIANTS = (
    Variant(
        "float32", KL_BARS["float32"],
        "float32 is rounded here: set MLX_ENABLE_TF32=0, or use load(device='cpu')",
        {"dtype": "float32"}, FLOAT32_BAR,
    ),
    Variant(
        "float16", KL_BARS["float16"], "use load(dtype='bfloat16') or 'float32'",
        {"dtype": "float16"},
    ),
    Variant(
        "bfloat16", KL_BARS["bfloat16"], "use load(dtype='float16') or 'float32'",
        {"dtype": "bfloat16"},
    ),
    Variant(
        "8-bit cache, float32", CACHE_KL_BARS["float32"], "leave kv_bits out",
        {"dtype": "float32", "kv_bits": 8},
    ),
    Variant(
        "8-bit cache, bfloat16", CACHE_KL_BARS["bfloat16"], "leave kv_bits out",
        {"dtype": "bfloat16", "kv_bits": 8},
    ),
)  # fmt: skip
PACKED = "use the model unquantised"
PACKED_VARIANTS = (
    Variant(
        "4 bits, float32", PACKED_KL_BARS["float32"], PACKED, {"dtype": "float32"}, FLOAT32_BAR
    ),
    Variant("4 bits, float16", PACKED_KL_BARS["float16"], PACKED, {"dtype": "float16"}),
    Variant("4 bits, bfloat16", PACKED_KL_BARS["bfloat16"], PACKED, {"dtype": "bfloat16"}),
)


def check_precision(record: Recorder, folder: Path) -> None:
    """All variants of the model in `folder`, which is the bundled one, and of it in four bits."""
    cases = load_cases()
    wanted = Reference(
        [case.logits for case in cases if case.logits is not None],
        [case.tokens for case in cases],
    )
    with record.trying("prompts"), opened(folder) as pipe:
        prompts = [pipe.encode(case.messages, images=[case.picture]) for case in cases]
        ids = [prompt.input_ids for prompt in prompts]
        record.all_of("prompts: token ids", right_tokens(ids, [c.ids for c in cases]), len(cases))
    for variant in VARIANTS:
        with record.trying(variant.name, variant.remedy):
            with opened(folder, **variant.options) as pipe:
                found = measure(pipe, cases)
            _compare(record, variant, found, wanted)
    with record.trying("4 bits", PACKED), TemporaryDirectory() as name:
        _check_packed(record, folder, Path(name), cases, wanted)


def measure(pipe: Pipeline, cases: Sequence[Case]) -> Reference:
    """What a pipeline makes of the cases, one at a time."""
    logits = [text_logits(pipe, case) for case in cases if case.logits is not None]
    return Reference(logits, [answer(pipe, case).tokens for case in cases])


def _compare(record: Recorder, variant: Variant, found: Reference, wanted: Reference) -> None:
    name, bar = variant.name, variant.logits_bar
    right = right_tokens(found.tokens, wanted.tokens)
    record.all_of(f"{name}: answers", right, len(wanted.tokens))
    record.at_most(f"{name}: mean KL", _mean_kl(found, wanted), variant.kl_bar, " nats")
    if bar is not None:
        apart = difference(found.logits, wanted.logits)
        record.at_most(f"{name}: logits", apart, bar, " of the largest")


def _mean_kl(found: Reference, wanted: Reference) -> float:
    """Over all positions, in nats."""
    old, new = np.concatenate(wanted.logits), np.concatenate(found.logits)
    return compare(old, new, with_image=True).mean_kl


def _check_packed(
    record: Recorder, folder: Path, scratch: Path, cases: Sequence[Case], wanted: Reference
) -> None:
    """Four bits: packed kernels against floats of the same values, unpacked on the CPU."""
    packed, unpacked = scratch / "packed", scratch / "unpacked"
    # float32 scales: packed and unpacked are the same numbers
    convert(ConvertOptions(model=folder, out=packed, bits=4, dtype="float32", measure=False))
    with DeviceRef.CPU().to_device().active():
        floats = {"dequantize": True, "dtype": "float32"}
        convert(ConvertOptions(model=packed, out=unpacked, measure=False, **floats))
    few = [case for case in cases if case.logits is not None]
    with opened(unpacked, dtype="float32") as pipe:
        same = measure(pipe, few)
    plain = Reference(wanted.logits, wanted.tokens[: len(few)])
    record.at_most("4 bits: mean KL of packing", _mean_kl(same, plain), PACKING_KL_BAR, " nats")
    for variant in PACKED_VARIANTS:
        with record.trying(variant.name, variant.remedy):
            with opened(packed, **variant.options) as pipe:
                found = measure(pipe, few)
            _compare(record, variant, found, same)
