"""python -m mlx_vlm_pipes.generate: ask a model about pictures from the command line."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.command import INTERRUPTED, new_parser, put, put_json, run_command, say
from mlx_vlm_pipes.display.view import require_folder, shown_answer
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.options import (
    ALIASES,
    ELSEWHERE,
    OPTIONS,
    PROMPT_OPTIONS,
    SAMPLING_OPTIONS,
    Option,
    Texts,
    read_options,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_vlm_pipes.engine.plan import Plan
    from mlx_vlm_pipes.engine.requests import Chunk, Timings, Usage
    from mlx_vlm_pipes.pipeline import Pipeline

MAX_STDIN_BYTES = 256 * 2**20
DEFAULT_PROMPT = "Describe the picture."
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
        usage="%(prog)s [options]",  # the list of all flags would hide an error below it
    )
    _add_model_options(parser)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", help="what to ask, or - for standard input; default with a picture or a clip: "
        f"{DEFAULT_PROMPT!r}",
    )  # fmt: skip
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
                group.add_argument(*_flags(option), **_keywords(option))
    output = parser.add_argument_group("output")
    output.add_argument("--plan", action="store_true", help="say what it needs; run nothing")
    output.add_argument(
        "--show", metavar="FILE.png",
        help="write what the model saw: tiles, limits, boxes of the answer, frames with times",
    )  # fmt: skip
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    output.add_argument("--quiet", action="store_true", help="the answer only, no figures")
    for name in sorted(ELSEWHERE.keys() - {"adapter_path"}):
        parser.add_argument(_flag(name), nargs="*", action=_Elsewhere, help=argparse.SUPPRESS)
    return parser


class _Elsewhere(argparse.Action):
    """A flag of another program: says what there is instead."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]}: {ELSEWHERE[self.dest]}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flags(option: Option) -> list[str]:
    """An option's own flag, then those that others have for it."""
    others = [alias for alias, name in ALIASES.items() if name == option.name]
    return [_flag(name) for name in (option.name, *others)]


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
    model.add_argument("--adapter", "--adapter-path", help="folder of a LoRA adapter")
    model.add_argument("--kv-bits", type=int, choices=[4, 8], help="quantise the KV cache")
    model.add_argument("--max-length", type=int, help="limit on prompt plus answer, in tokens")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error for a user's mistake."""
    return run_command(build_parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from mlx_vlm_pipes.loading import load

    options = given_options(args)  # before the model is loaded: a mistake is told at once
    _check_show(args)
    prompt, images = _asked(args), [_picture(name) for name in args.image]
    if args.model is None and not args.quiet:
        say("using the bundled model (tiny-idefics3: coloured shapes only); --model takes others")
    with load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        adapter=args.adapter,
        max_length=args.max_length,
        kv_bits=args.kv_bits,
    ) as pipe:
        if args.plan:
            if args.show:
                reading = {k: v for k, v in options.items() if k in PROMPT_OPTIONS}
                pipe.show(images, args.video, prompt, **reading).save(args.show)
            return _print_plan(pipe.plan(prompt, images, args.video, **options), args)
        answer, chunks = Answer(args), pipe.stream(prompt, images, args.video, **options)
        status = answer.print(pipe, chunks)
        if args.show:
            shown_answer(answer.text, chunks.media).save(args.show)
        return status


def _check_show(args: argparse.Namespace) -> None:
    """Raises: InputError for a --show that nothing can be written for."""
    if args.show is None:
        return
    require_folder(args.show)
    if not args.image and not args.video:
        raise InputError("--show: there is no picture to show; give --image or --video")


def _asked(args: argparse.Namespace) -> str:
    """The prompt.

    Raises: InputError where there is neither one nor a picture, and where standard input is to be
    read twice.
    """
    if [args.prompt, *args.image].count("-") > 1:
        raise InputError("--prompt - and --image -: standard input holds one of them, once")
    if args.prompt is None:
        if not args.image and not args.video:
            raise InputError("nothing to answer; give --prompt, --image or --video")
        return DEFAULT_PROMPT
    if args.prompt != "-":
        return args.prompt
    try:
        return _standard_input("--prompt").decode()
    except UnicodeDecodeError:
        raise InputError("--prompt -: standard input is no text in UTF-8") from None


def _picture(name: str) -> str | bytes:
    return _standard_input("--image") if name == "-" else name


def _standard_input(flag: str) -> bytes:
    """Raises: InputError where there is none, or more of it than a picture may have."""
    if sys.stdin is None:
        raise InputError(f"{flag} -: standard input is closed")
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise InputError(f"{flag} -: more than {MAX_STDIN_BYTES} bytes on standard input")
    return data


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options given on the command line. Raises: InputError, as `Option.read`."""
    names = [name for name, option in OPTIONS.items() if option.has_flag]
    return read_options({k: v for k, v in vars(args).items() if k in names}, OPTIONS)


class Answer:
    """An answer on its way to standard output, with its figures on standard error."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._is_json, self._is_quiet = args.json, args.quiet
        self.text = ""
        self._tokens: list[int] = []
        self._began = time.perf_counter()

    def print(self, pipe: Pipeline, chunks: Iterator[Chunk]) -> int:
        """Exit status: 0, or 130 after Ctrl-C."""
        last = None
        try:
            for chunk in chunks:
                self._add(chunk)
                last = chunk
        except KeyboardInterrupt:
            return self._interrupted()
        assert last is not None
        assert last.usage is not None
        assert last.timings is not None
        memory = pipe.peak_memory_bytes()
        if self._is_json:
            put_json(self._record(last, last.usage, last.timings, memory))
            return 0
        put("\n")
        if not self._is_quiet:
            _say_figures(last.finish_reason, last.usage, last.timings, memory)
        return 0

    def _add(self, chunk: Chunk) -> None:
        # Idefics3 answers begin with a space, as in transformers: the tokens keep it
        text = chunk.text if self.text else chunk.text.lstrip()
        self.text += text
        if chunk.token is not None:
            self._tokens.append(chunk.token)
        if not self._is_json:
            put(text)

    def _interrupted(self) -> int:
        if not self._is_json:
            put("\n")
        say("interrupted")
        if not self._is_quiet:
            seconds = time.perf_counter() - self._began
            say(f"answer: {len(self._tokens)} tokens so far, {seconds:.1f} s with the prompt")
        return INTERRUPTED

    def _record(
        self, last: Chunk, usage: Usage, timings: Timings, memory: int
    ) -> dict[str, object]:
        return {
            "text": self.text,
            "tokens": self._tokens,
            "finish_reason": last.finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "image_tokens": usage.image_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "prompt_tokens_per_s": _rate(usage.prompt_tokens, timings.prompt_s),
            "completion_tokens_per_s": _rate(usage.completion_tokens - 1, timings.generation_s),
            "peak_memory_bytes": memory,
        }


def _say_figures(reason: str | None, usage: Usage, timings: Timings, memory: int) -> None:
    """Two lines that fit into 80 columns."""
    kinds = [f"{usage.image_tokens} image"] if usage.image_tokens else []
    kinds += [f"{usage.cached_tokens} cached"] if usage.cached_tokens else []
    of_them = f" ({', '.join(kinds)})" if kinds else ""
    say(
        f"prompt: {usage.prompt_tokens} tokens{of_them}, {timings.prompt_s:.2f} s,"
        f" {_rate(usage.prompt_tokens, timings.prompt_s):.0f} tokens/s"
    )
    ended = "cut at --max-tokens or --max-length" if reason == "length" else f"ended by {reason}"
    say(
        f"answer: {usage.completion_tokens} tokens,"
        f" {_rate(usage.completion_tokens - 1, timings.generation_s):.0f} tokens/s,"
        f" {ended}; peak {memory / 1e6:.0f} MB"
    )


def _print_plan(plan: Plan, args: argparse.Namespace) -> int:
    if args.json:
        put_json(plan.as_dict())
    else:
        put(f"{plan}\n")
    return 0 if plan.fits else 1


def _rate(count: int, seconds: float) -> float:
    return round(max(count, 0) / seconds, 1) if seconds > 0 else 0.0


if __name__ == "__main__":
    sys.exit(main())
