"""python -m mlx_vlm_pipes.convert: quantise, cast or merge a checkpoint, in mlx-vlm's form."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlx_vlm_pipes.command import new_parser, put, put_json, run_command, terminable

_EPILOG = """\
examples:
  python -m mlx_vlm_pipes.convert --model HuggingFaceTB/SmolVLM-256M-Instruct --out smol --bits 4
  python -m mlx_vlm_pipes.convert --model tuned-base --out fused --lora my-adapter
  python -m mlx_vlm_pipes.convert --model some-4bit --out floats --dequantize --dtype bfloat16

mixed recipes give most of the decoder the first number of bits, and the second to what hurts most:
the embedding, the output head, and the value and down projections of the first and last eighth of
the layers and of every third one between (as mlx-lm and mlx-vlm do).

the folder appears when it is whole. A conversion that is killed (SIGKILL) leaves a hidden
.NAME.incomplete-PID beside it, which the next one to the same name removes.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "convert",
        description="Write a checkpoint that this package, mlx-vlm and mlx-lm load: quantised, "
        "cast, dequantised, or with an adapter merged.",
        epilog=_EPILOG,
    )
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub id")
    parser.add_argument("--out", required=True, type=Path, help="folder to make; must not exist")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    packing = parser.add_argument_group("quantisation")
    packing.add_argument("--bits", type=int, help="2, 3, 4, 5, 6 or 8 (affine); default 4")
    packing.add_argument("--group-size", type=int, help="32, 64 or 128 (affine); default 64")
    packing.add_argument("--mode", default="affine", help="affine (default), mxfp4, mxfp8 or nvfp4")
    packing.add_argument(
        "--mixed", metavar="RECIPE",
        help="mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6 or mixed_4_8, see below",
    )  # fmt: skip
    vision = packing.add_mutually_exclusive_group()
    vision.add_argument(
        "--keep-vision",
        action="store_true",
        help="leave the vision tower and the connector as floats (default)",
    )
    vision.add_argument("--quantize-vision", action="store_true", help="quantise them too")
    packing.add_argument("--dequantize", action="store_true", help="write plain floats")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: as it is")
    parser.add_argument("--lora", type=Path, help="folder of an adapter to merge")
    parser.add_argument(
        "--no-measure", action="store_true", help="do not compare the result with the source"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error for a user's mistake."""
    return run_command(build_parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from mlx_vlm_pipes.conversion import ConvertOptions, convert
    from mlx_vlm_pipes.conversion.card import as_dict

    options = ConvertOptions(
        model=args.model,
        out=args.out,
        bits=args.bits,
        group_size=args.group_size,
        mode=args.mode,
        mixed=args.mixed,
        dtype=args.dtype,
        quantize_vision=args.quantize_vision,
        dequantize=args.dequantize,
        lora=args.lora,
        revision=args.revision,
        measure=not args.no_measure,
    )
    with terminable():
        report = convert(options)
    if args.json:
        put_json(as_dict(report))
    else:
        put("\n".join([f"wrote {report.out}", *report.lines()]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
