"""Print dispatches a layer and in all: of built-in cases, or of one checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_vlm_pipes.contexts import SamplingParams
from tools.count_kernels import Count
from tools.count_kernels.cases import (
    FIXTURES,
    LAYERS,
    TOWERS,
    count_decode,
    count_sampling,
    count_tower,
    decoder,
    decoder_config,
    load_checkpoint,
)

ROWS = (1, 8)


def decode() -> None:
    for title, bits, kv_bits, adapters in (
        ("float", None, None, 0),
        ("4-bit weights", 4, None, 0),
        ("8-bit cache", None, 8, 0),
        ("LoRA on all seven, one adapter", None, None, 1),
        ("LoRA on all seven, two adapters", None, None, 2),
    ):
        model = decoder(decoder_config(), bits=bits, adapters=adapters)
        for rows in ROWS:
            found = count_decode(model, rows, kv_bits=kv_bits)
            report(f"decode, {title}, {rows} rows", found, LAYERS)


def sampling() -> None:
    both = SamplingParams(temperature=0.7, top_k=40, top_p=0.9)
    for title, params in (
        ("greedy", SamplingParams(temperature=0.0)),
        ("temperature", SamplingParams(temperature=0.7)),
        ("min_p", SamplingParams(temperature=0.7, min_p=0.05)),
        ("top_p", SamplingParams(temperature=0.7, top_p=0.9)),
        ("top_k and top_p", both),
        ("penalties", SamplingParams(temperature=0.7, repetition_penalty=1.1, presence_penalty=1)),
    ):
        for rows in ROWS:
            report(f"sampling, {title}, {rows} rows", count_sampling([params] * rows))


def towers() -> None:
    for name, fixture in TOWERS.items():
        whole, layer = count_tower(FIXTURES / fixture, fused=True)
        report(f"tower, {name}: {layer} a layer", whole)


CASES: dict[str, Callable[[], None]] = {"decode": decode, "sampling": sampling, "towers": towers}


def checkpoint(folder: Path) -> None:
    model = load_checkpoint(folder)
    language = model.language.decoder
    for rows in ROWS:
        found = count_decode(language, rows)
        report(f"decode, {folder.name}, {rows} rows", found, language.config.num_layers)
    if model.vision_model is not None:
        whole, layer = count_tower(folder)
        report(f"tower, {folder.name}: {layer} a layer", whole)


def report(title: str, found: Count, layers: int | None = None) -> None:
    each = "" if layers is None else f", {found.total / layers:.1f} a layer of {layers}"
    parts = ", ".join(f"{name} {number}" for name, number in found.by_primitive.most_common())
    sys.stdout.write(f"{title}: {found.total}{each}\n    {parts}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", type=Path, help="a checkpoint's folder, in place of the cases")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)  # elsewhere MLX would make its own kernels of our stand-ins
    if args.model is not None:
        checkpoint(args.model)
        return
    for name in args.cases:
        CASES[name]()


if __name__ == "__main__":
    main()
