"""python -m mlx_vlm_pipes.generate: ask a model about pictures from the command line."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.command import new_parser, put, put_json, run_command, say
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.options import (
    OPTIONS,
    PROMPT_OPTIONS,
    SAMPLING_OPTIONS,
    Option,
    Texts,
    read_options,
)

if TYPE_CHECKING:
    from mlx_vlm_pipes.pipeline import Pipeline

MAX_STDIN_BYTES = 256 * 2**20
_EPILOG = """\
examples:
  python -m mlx_vlm_pipes.generate --image cat.png --prompt "What is in the picture?"
  python -m mlx_vlm_pipes.generate --model HuggingFaceTB/SmolVLM-256M-Instruct \\
      --image a.png --image b.png --prompt "What differs?" --max-tokens 100
"""


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "generate",
        description="Answer a prompt about pictures and clips with a vision-language model.",
        epilog=_EPILOG,
    )
    _add_model_options(parser)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", default="Describe the picture.", help="what to ask")
    prompt.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture: path, http(s) URL, or - for standard input; may be repeated",
    )
    prompt.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a clip: video file, animated GIF or WebP, or folder of frames; may be repeated",
    )
    answer = parser.add_argument_group("answer")
    for group, options in ((prompt, PROMPT_OPTIONS), (answer, SAMPLING_OPTIONS)):
        for option in options.values():
            if option.has_flag:
                group.add_argument(_flag(option), **_keywords(option))
    output = parser.add_argument_group("output")
    output.add_argument("--plan", action="store_true", help="say what it needs; run nothing")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    output.add_argument("--quiet", action="store_true", help="the answer only, no figures")
    return parser


def _flag(option: Option) -> str:
    return f"--{option.name.replace('_', '-')}"


def _keywords(option: Option) -> dict[str, Any]:
    """The arguments of argparse for an option; one that is not given leaves no attribute."""
    shared = {"default": argparse.SUPPRESS, "help": option.help}
    if option.kind is bool:
        return {**shared, "action": "store_true"}
    if option.kind == Texts:
        return {**shared, "action": "append", "help": f"{option.help}; may be repeated"}
    if option.default is not None:
        shared["help"] += f" (default {option.default})"
    return {**shared, "type": option.kind}


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", help="folder, GGUF file or hub id; default: the small bundled model"
    )
    model.add_argument("--revision", help="branch, tag or commit of a hub id")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="auto: the checkpoint's own on a GPU, float32 on a CPU",
    )
    model.add_argument("--device", choices=["cpu", "gpu"], help="default: the GPU if there is one")
    model.add_argument("--adapter", help="folder of a LoRA adapter")
    model.add_argument("--kv-bits", type=int, choices=[4, 8], help="quantise the KV cache")
    model.add_argument("--max-length", type=int, help="limit on prompt plus answer, in tokens")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error for a user's mistake."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    from mlx_vlm_pipes.loading import load

    options = given_options(args)  # before the model is loaded: a mistake is told at once
    if args.model is None and not args.quiet:
        say("using the bundled model (tiny-idefics3: coloured shapes only); --model takes others")
    pipe = load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        adapter=args.adapter,
        max_length=args.max_length,
        kv_bits=args.kv_bits,
    )
    try:
        images = [_standard_input() if name == "-" else name for name in args.image]
        if args.plan:
            return _print_plan(pipe, args, images, options)
        return _print_answer(pipe, args, images, options)
    finally:
        pipe.close()


def _standard_input() -> bytes:
    """Raises: InputError where there is none, or more of it than a picture may have."""
    if sys.stdin is None:
        raise InputError("--image -: standard input is closed")
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise InputError(f"--image -: more than {MAX_STDIN_BYTES} bytes on standard input")
    return data


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options given on the command line. Raises: InputError, as `Option.read`."""
    names = [name for name, option in OPTIONS.items() if option.has_flag]
    return read_options({k: v for k, v in vars(args).items() if k in names}, OPTIONS)


def _print_answer(pipe: Pipeline, args: argparse.Namespace, images: list[Any], options: Any) -> int:
    texts, tokens, last = [], [], None
    for chunk in pipe.stream(args.prompt, images, args.video, **options):
        texts.append(chunk.text)
        if chunk.token is not None:
            tokens.append(chunk.token)
        if not args.json:
            put(chunk.text)
        last = chunk
    assert last is not None
    assert last.usage is not None
    assert last.timings is not None
    figures = {
        "prompt_tokens": last.usage.prompt_tokens,
        "image_tokens": last.usage.image_tokens,
        "completion_tokens": last.usage.completion_tokens,
        "prompt_tokens_per_s": _rate(last.usage.prompt_tokens, last.timings.prompt_s),
        "completion_tokens_per_s": _rate(
            last.usage.completion_tokens - 1, last.timings.generation_s
        ),
        "peak_memory_bytes": pipe.peak_memory_bytes(),
    }
    if args.json:
        record = {
            "text": "".join(texts),
            "tokens": tokens,
            "finish_reason": last.finish_reason,
            **figures,
        }
        put_json(record)
        return 0
    put("\n")
    if not args.quiet:
        say(
            f"prompt: {figures['prompt_tokens']} tokens ({figures['image_tokens']} of them image"
            f" tokens), {figures['prompt_tokens_per_s']:.0f} tokens/s;"
            f" answer: {figures['completion_tokens']} tokens,"
            f" {figures['completion_tokens_per_s']:.0f} tokens/s;"
            f" peak memory: {figures['peak_memory_bytes'] / 1e6:.0f} MB"
        )
    return 0


def _print_plan(pipe: Pipeline, args: argparse.Namespace, images: list[Any], options: Any) -> int:
    plan = pipe.plan(args.prompt, images, args.video, **options)
    if args.json:
        put_json(plan.as_dict())
    else:
        put(f"{plan}\n")
    return 0 if plan.fits else 1


def _rate(count: int, seconds: float) -> float:
    return round(max(count, 0) / seconds, 1) if seconds > 0 else 0.0


if __name__ == "__main__":
    sys.exit(main())
