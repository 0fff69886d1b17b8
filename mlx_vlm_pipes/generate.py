"""python -m mlx_vlm_pipes.generate: ask a model about pictures from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes import __version__
from mlx_vlm_pipes.errors import PipesError

if TYPE_CHECKING:
    from mlx_vlm_pipes.pipeline import Pipeline

_EPILOG = """\
examples:
  python -m mlx_vlm_pipes.generate --image cat.png --prompt "What is in the picture?"
  python -m mlx_vlm_pipes.generate --model HuggingFaceTB/SmolVLM-256M-Instruct \\
      --image a.png --image b.png --prompt "What differs?" --max-tokens 100
"""
# command-line option -> option of Pipeline.generate
_SAMPLING = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_vlm_pipes.generate",
        description="Answer a prompt about pictures and clips with a vision-language model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--prompt", default="Describe the picture.", help="what to ask")
    prompt.add_argument("--system", help="a system message before the prompt")
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
    prompt.add_argument("--fps", type=float, default=2.0, help="frames a second taken from a clip")
    for name, word in (("min", "smallest"), ("max", "largest")):
        text = f"{word} size of a picture, for models that take any size"
        prompt.add_argument(f"--{name}-pixels", type=int, help=text)
    prompt.add_argument(
        "--raw", action="store_true", help="take the prompt verbatim, without the chat template"
    )
    answer = parser.add_argument_group("answer")
    for name, kind in _SAMPLING.items():
        answer.add_argument(f"--{name.replace('_', '-')}", type=kind, help=_HELP[name])
    answer.add_argument("--stop", action="append", help="text that ends the answer; repeatable")
    answer.add_argument("--ignore-eos", action="store_true", help="go on after the end token")
    output = parser.add_argument_group("output")
    output.add_argument("--plan", action="store_true", help="say what it needs; run nothing")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    output.add_argument("--quiet", action="store_true", help="the answer only, no figures")
    output.add_argument("--version", action="version", version=f"mlx_vlm_pipes {__version__}")
    return parser


_HELP = {
    "max_tokens": "at most so many new tokens (default 256)",
    "min_tokens": "no end before so many new tokens",
    "temperature": "0 is greedy (default); higher is more varied",
    "top_p": "sample from the likeliest tokens that make up this probability",
    "top_k": "sample from the k likeliest tokens",
    "min_p": "drop tokens less likely than this share of the likeliest",
    "repetition_penalty": "above 1: avoid tokens that were used before",
    "seed": "makes sampling repeatable",
}


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or hub id; default: the small bundled model")
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
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except PipesError as error:
        _say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _run(args: argparse.Namespace) -> int:
    from mlx_vlm_pipes.loading import load

    if args.model is None and not args.quiet:
        _say("using the bundled model (tiny-idefics3: coloured shapes only); --model takes others")
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
        images = [sys.stdin.buffer.read() if name == "-" else name for name in args.image]
        options = _options(args)
        if args.plan:
            return _print_plan(pipe, args, images, options)
        return _print_answer(pipe, args, images, options)
    finally:
        pipe.close()


def _options(args: argparse.Namespace) -> Any:
    """The options given on the command line, by their names in Pipeline.generate."""
    options: dict[str, Any] = {"raw": args.raw, "fps": args.fps, "ignore_eos": args.ignore_eos}
    for name in ("system", "stop", "min_pixels", "max_pixels", *_SAMPLING):
        value = getattr(args, name)
        if value is not None:
            options[name] = value
    return options


def _print_answer(pipe: Pipeline, args: argparse.Namespace, images: list[Any], options: Any) -> int:
    texts, tokens, last = [], [], None
    for chunk in pipe.stream(args.prompt, images, args.video, **options):
        texts.append(chunk.text)
        if chunk.token is not None:
            tokens.append(chunk.token)
        if not args.json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
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
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
        return 0
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not args.quiet:
        _say(
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
        sys.stdout.write(json.dumps(plan.as_dict()) + "\n")
    else:
        sys.stdout.write(f"{plan}\n")
    return 0 if plan.fits else 1


def _rate(count: int, seconds: float) -> float:
    return round(max(count, 0) / seconds, 1) if seconds > 0 else 0.0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
