"""python -m mlx_vlm_pipes.check: what a model folder, or this machine, is good for."""

from __future__ import annotations

import argparse
import sys

from mlx_vlm_pipes.command import new_parser, put, put_json, run_command, terminable
from mlx_vlm_pipes.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "check",
        description="Examine a checkpoint: reads headers and JSON only, in seconds at any size. "
        "With --device: examine this machine, in about a minute.",
        epilog="exit status: 0 usable (with --device: to be trusted), 1 not, "
        "2 there is no such model",
    )
    parser.add_argument("model", nargs="?", help="folder, GGUF file or hub id")
    parser.add_argument("--model", dest="named", help="the same, as the other commands take it")
    parser.add_argument(
        "--families", action="store_true", help="list the model classes that are supported"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--run", action="store_true", help="load the model too, and look at its logits"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="say what each of N machines would hold of it"
    )
    parser.add_argument(
        "--device",
        action="store_true",
        help="compare what this machine computes with stored numbers, and say how fast it is, "
        "with a model given that one too",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one process of --device
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 usable, 1 not usable, 2 with one line on standard error otherwise."""
    return run_command(build_parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    if args.model is not None and args.named is not None:
        raise InputError(f"two models, {args.model} and {args.named}; give one of them")
    args.model = args.model if args.named is None else args.named
    if args.ranks is not None and (args.ranks < 2 or args.device):
        raise InputError(f"--ranks {args.ranks}; it takes 2 or more, and a model without --device")
    if args.families:
        return _list_families(is_json=args.json)
    if args.device:
        return _check_device(args)
    if args.model is None:
        raise InputError(
            "no model given; name a folder, GGUF file or hub id, or give --families or --device"
        )
    from mlx_vlm_pipes.doctor import examine
    from mlx_vlm_pipes.doctor.trial import try_out
    from mlx_vlm_pipes.loading import resolve_folder

    folder = resolve_folder(args.model, args.revision)
    checkup = examine(folder, args.ranks)
    if args.run and checkup.is_usable:
        try_out(folder, checkup)
    if args.json:
        put_json(checkup.as_dict())
    else:
        put("\n".join(checkup.lines()) + "\n")
    return 0 if checkup.is_usable else 1


def _check_device(args: argparse.Namespace) -> int:
    """The machine's report, or one part of it as messages."""
    from tqdm import tqdm

    from mlx_vlm_pipes.doctor.device import PARTS, examine_device, run_part
    from mlx_vlm_pipes.loading import resolve_folder

    if args.run:
        raise InputError("--run is for a model's folder; with --device every model is run")
    folder = None if args.model is None else resolve_folder(args.model, args.revision)
    if args.part is not None:
        run_part(args.part, folder, put_json)
        return 0
    with terminable(), tqdm(total=len(PARTS) + 1, disable=None, leave=False) as bar:

        def show(done: int, doing: str) -> None:
            bar.set_description(doing, refresh=False)
            bar.update(done - bar.n)

        report = examine_device(folder, show)
    if not args.json:
        put("\n".join([*report.lines(), "", "To paste into a report:", ""]))
    put_json(report.as_dict())
    return 0 if report.is_trusted else 1


def _list_families(*, is_json: bool) -> int:
    from mlx_vlm_pipes.registry import families

    if is_json:
        put_json(families())
    else:
        put("".join(f"{room}: {', '.join(names)}\n" for room, names in families().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
