"""python -m mlx_vlm_pipes.chat: a conversation about pictures in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mlx_vlm_pipes.arguments import (
    BUNDLED_NOTE,
    add_media_options,
    add_model_options,
    add_options,
    given_options,
    load_pipeline,
    model_name,
    refuse_foreign_flags,
)
from mlx_vlm_pipes.command import new_parser, run_command, say, terminable
from mlx_vlm_pipes.options import ANSWER_OPTIONS, PROMPT_OPTIONS, SAMPLING_OPTIONS

if TYPE_CHECKING:
    from mlx_vlm_pipes.pipeline import Pipeline
    from mlx_vlm_pipes.prompt_cache import PromptCache

_EPILOG = """\
examples:
  python -m mlx_vlm_pipes.chat --model HuggingFaceTB/SmolVLM-256M-Instruct
  python -m mlx_vlm_pipes.chat --image cat.png --system "Answer in one sentence."
  python -m mlx_vlm_pipes.chat --quiet < questions.txt

/help lists what can be typed there. Where the input is no terminal, each line is a turn.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "chat",
        description="Talk with a vision-language model about pictures and clips.",
        epilog=_EPILOG,
        usage="%(prog)s [options]",
    )
    add_model_options(parser)
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--load", metavar="FILE", help="go on with a conversation that was saved")
    add_media_options(talk, "a picture for the first message: path or http(s) URL; may be repeated")
    talk.add_argument(
        "--prompt-cache",
        "--prompt-cache-file",
        metavar="FILE",
        help="begin with the cache in FILE, if it fits; at the end the conversation's is written",
    )
    spoken = {name: option for name, option in PROMPT_OPTIONS.items() if name != "raw"}
    add_options(talk, spoken)
    answers = parser.add_argument_group("answers")
    add_options(answers, SAMPLING_OPTIONS)
    add_options(answers, ANSWER_OPTIONS)
    parser.add_argument("--quiet", action="store_true", help="begin without a word")
    refuse_foreign_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 130 after Ctrl-C twice, 2 for a mistake in the arguments, or in the lines of
    an input that is no terminal."""
    return run_command(build_parser, _run, argv, is_joint=True)


def _run(args: argparse.Namespace) -> int:
    from mlx_vlm_pipes.dialogue.lines import Lines
    from mlx_vlm_pipes.dialogue.session import COMMANDS, Session

    options = given_options(args)
    if args.model is None and not args.quiet:
        say(BUNDLED_NOTE)
    with load_pipeline(args) as pipe, terminable(), Lines(list(COMMANDS)) as lines:
        cache = _prompt_cache(pipe, args)
        chat = pipe.chat(**options)
        session = Session(pipe, chat, lines, has_limit=args.max_length is not None)
        if not args.quiet:
            _greet(pipe, args.model)
        if args.load is not None:
            session.load(args.load)
            chat.system = options.get("system", chat.system)  # what is given now wins
        session.attach("image", args.image)
        session.attach("video", args.video)
        status = session.run()
        roles = [message["role"] for message in chat.history]
        if cache is not None and session.has_answered and "assistant" in roles:
            cache.write(chat.history, (), (), chat.options)
        return status


def _prompt_cache(pipe: Pipeline, args: argparse.Namespace) -> PromptCache | None:
    """What --prompt-cache names. Raises: PrefixError where something else lies there."""
    if args.prompt_cache is None:
        return None
    from mlx_vlm_pipes.prompt_cache import PromptCache

    return PromptCache(pipe, args.prompt_cache, quiet=args.quiet)


def _greet(pipe: Pipeline, name: str | None) -> None:
    model, memory = pipe.model, pipe.engine.memory_bytes
    say(model_name(name))
    say(
        f"{model.weight_bytes / 1e6:.4g} MB of weights, {model.dtype.name}, {model.device.label}; "
        f"holds {pipe.max_seq_len} tokens; {memory / 1e9:.3g} GB of memory"
    )
    say("/help lists the commands, Ctrl-D leaves\n")


if __name__ == "__main__":
    sys.exit(main())
