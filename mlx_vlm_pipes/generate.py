"""python -m mlx_vlm_pipes.generate: ask a model about pictures from the command line."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.arguments import (
    BUNDLED_NOTE,
    add_media_options,
    add_model_options,
    add_options,
    figures_lines,
    given_options,
    load_pipeline,
    rate,
    refuse_foreign_flags,
)
from mlx_vlm_pipes.command import INTERRUPTED, new_parser, put, put_json, run_command, say
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.launcher import launched_size
from mlx_vlm_pipes.options import ANSWER_OPTIONS, PROMPT_OPTIONS, SAMPLING_OPTIONS, among

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_vlm_pipes.engine.plan import Plan
    from mlx_vlm_pipes.engine.requests import Chunk, Timings, Usage
    from mlx_vlm_pipes.media.places import PlaceReader
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
    add_model_options(parser)
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--prompt", help="what to ask, or - for standard input; default with a picture or a clip: "
        f"{DEFAULT_PROMPT!r}",
    )  # fmt: skip
    add_media_options(
        prompt, "a picture: path, http(s) URL, or - for standard input; may be repeated"
    )
    add_options(prompt, PROMPT_OPTIONS)
    prompt.add_argument(
        "--prompt-cache",
        "--prompt-cache-file",
        metavar="FILE",
        help="keep the prompt's cache in FILE: read if it fits, else computed and written",
    )
    answer = parser.add_argument_group("answer")
    add_options(answer, SAMPLING_OPTIONS)
    add_options(answer, ANSWER_OPTIONS)
    output = parser.add_argument_group("output")
    output.add_argument("--plan", action="store_true", help="say what it needs; run nothing")
    output.add_argument(
        "--show", metavar="FILE.png",
        help="write what the model saw: tiles, limits, boxes of the answer, frames with times",
    )  # fmt: skip
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    output.add_argument("--quiet", action="store_true", help="the answer only, no figures")
    refuse_foreign_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on standard error for a user's mistake."""
    return run_command(build_parser, _run, argv, is_joint=True)


def _run(args: argparse.Namespace) -> int:
    options = given_options(args)  # before the model is loaded: a mistake is told at once
    _check_show(args)
    if args.prompt_cache is not None and launched_size() > 1:
        raise InputError("--prompt-cache: not with several ranks; leave it out")
    prompt, images = _asked(args), [_picture(name) for name in args.image]
    if args.model is None and not args.quiet:
        say(BUNDLED_NOTE)
    with load_pipeline(args) as pipe:
        if args.plan:
            if args.show:
                reading: Any = among(options, PROMPT_OPTIONS)
                pipe.show(images, args.video, prompt, **reading).save(args.show)
            return _print_plan(pipe.plan(prompt, images, args.video, **options), args)
        cache = None
        if args.prompt_cache is not None:
            from mlx_vlm_pipes.prompt_cache import PromptCache

            cache = PromptCache(pipe, args.prompt_cache, quiet=args.quiet)
        answer, chunks = Answer(args), pipe.stream(prompt, images, args.video, **options)
        if chunks.places is not None:
            answer.places = chunks.places.reader()
        status = answer.print(pipe, chunks if cache is None else cache.watch(chunks))
        if cache is not None:
            cache.keep(prompt, images, args.video, options)
        if args.show:
            from mlx_vlm_pipes.display.view import shown_answer

            shown_answer(answer.written, chunks.media).save(args.show)
        return status


def _check_show(args: argparse.Namespace) -> None:
    """Raises: InputError for a --show that nothing can be written for."""
    if args.show is None:
        return
    from mlx_vlm_pipes.display.view import require_folder

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


class Answer:
    """An answer on its way to standard output, with its figures on standard error.

    text: as it is printed; written: as the model wrote it. places: takes marked numbers from one to
    the other.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._is_json, self._is_quiet = args.json, args.quiet
        self.places: PlaceReader | None = None
        self.text = self.written = ""
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
            for line in figures_lines(last.finish_reason, last.usage, last.timings, memory):
                say(line)
        return 0

    def _add(self, chunk: Chunk) -> None:
        # Idefics3 answers begin with a space, as in transformers: the tokens keep it
        text = chunk.text if self.written else chunk.text.lstrip()
        self.written += text
        if self.places is not None:
            is_last = chunk.finish_reason is not None
            text = self.places.add(text) + (self.places.finish() if is_last else "")
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
            "prompt_tokens_per_s": rate(usage.prompt_tokens, timings.prompt_s),
            "completion_tokens_per_s": rate(usage.completion_tokens - 1, timings.generation_s),
            "peak_memory_bytes": memory,
        }


def _print_plan(plan: Plan, args: argparse.Namespace) -> int:
    if args.json:
        put_json(plan.as_dict())
    else:
        put(f"{plan}\n")
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
