"""The groups of arguments that commands share: the model, a request's options, the figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.options import ALIASES, ELSEWHERE, OPTIONS, Option, Texts, read_options
from mlx_vlm_pipes.paths import user_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlx_vlm_pipes.engine.requests import Timings, Usage
    from mlx_vlm_pipes.pipeline import Pipeline

MAX_FILE_BYTES = 8 * 2**20  # of what a flag names
BUNDLED_NAME = "tiny-idefics3"
BUNDLED_NOTE = "using the bundled model (it knows coloured shapes); --model takes others"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `load_pipeline` reads."""
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
    model.add_argument(
        "--draft-model",
        "--draft",
        metavar="MODEL",
        help="a smaller model with the same tokenizer, which drafts the answer's tokens",
    )
    model.add_argument("--kv-bits", type=int, choices=[4, 8], help="quantise the KV cache")
    model.add_argument("--max-length", type=int, help="limit on prompt plus answer, in tokens")


def load_pipeline(args: argparse.Namespace) -> Pipeline:
    """The model that the arguments name. Raises: as `load`."""
    from mlx_vlm_pipes.loading import load

    return load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        adapter=args.adapter,
        draft=args.draft_model,
        max_length=args.max_length,
        kv_bits=args.kv_bits,
        distributed="auto",
    )


def model_name(given: str | None) -> str:
    """What the model that --model names is called: the last part of it, or the bundled one's."""
    return BUNDLED_NAME if given is None else Path(given).name or given


def add_media_options(group: argparse._ArgumentGroup, image_help: str) -> None:
    group.add_argument("--image", action="append", default=[], metavar="FILE", help=image_help)
    group.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a clip: video file, animated GIF or WebP, or folder of frames; may be repeated",
    )


def add_options(group: argparse._ArgumentGroup, options: Mapping[str, Option]) -> None:
    """A flag for each of these options that has one."""
    for option in options.values():
        if option.has_flag:
            group.add_argument(*_flags(option), **_keywords(option))
    if "chat_template_kwargs" in options:
        group.add_argument(
            "--enable-thinking", "--no-enable-thinking", nargs=0, default=argparse.SUPPRESS,
            action=_Thinking, help="for templates that read it: whether to think first",
        )  # fmt: skip


def refuse_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of other programs end the command with what there is instead (ELSEWHERE)."""
    for name in sorted(ELSEWHERE.keys() - {"adapter_path", "draft_model", "enable_thinking"}):
        parser.add_argument(_flag(name), nargs="*", action=_Elsewhere, help=argparse.SUPPRESS)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options given on the command line. Raises: InputError, as `Option.read`."""
    names = [name for name, option in OPTIONS.items() if option.has_flag]
    return read_options({k: v for k, v in vars(args).items() if k in names}, OPTIONS)


def figures_lines(reason: str | None, usage: Usage, timings: Timings, memory: int) -> list[str]:
    """Lines about an answer that fit into 80 columns. memory: bytes."""
    ended = "cut at --max-tokens or --max-length" if reason == "length" else f"ended by {reason}"
    kept = f"drafts: {usage.accepted_tokens} of {usage.drafted_tokens} tokens were right"
    return [
        f"prompt: {usage.prompt_tokens} tokens{usage.of_prompt}, {timings.prompt_s:.2f} s,"
        f" {rate(usage.prompt_tokens, timings.prompt_s):.0f} tokens/s",
        f"answer: {usage.completion_tokens} tokens,"
        f" {rate(usage.completion_tokens - 1, timings.generation_s):.0f} tokens/s,"
        f" {ended}; peak {memory / 1e6:.0f} MB",
        *([kept] if usage.drafted_tokens else []),
    ]


def rate(count: int, seconds: float) -> float:
    """So many a second, to one digit; 0 where no time has passed."""
    return round(max(count, 0) / seconds, 1) if seconds > 0 else 0.0


class _Elsewhere(argparse.Action):
    """A flag of another program: says what there is instead."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]}: {ELSEWHERE[self.dest]}")


class _Thinking(argparse.Action):
    """`enable_thinking` among the variables of the chat template."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, flag: str | None = None
    ) -> None:
        _join(namespace, {"enable_thinking": flag == "--enable-thinking"})


class _Variables(argparse.Action):
    """An object in JSON: variables of the chat template; several flags add up."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        *_: object,
    ) -> None:
        try:
            given = json.loads(values)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            parser.error(
                f"{self.option_strings[0]}: expected JSON as '{{\"enable_thinking\": false}}'"
            )
        _join(namespace, given)


def _join(namespace: argparse.Namespace, more: dict[str, Any]) -> None:
    before = getattr(namespace, "chat_template_kwargs", {})
    namespace.chat_template_kwargs = {**before, **more}


def _tools(name: str) -> list[Any]:
    """The tools in a JSON file: a list of descriptions, or one. Raises: as `_json`."""
    value = _json(name, "a list of tools")
    return value if isinstance(value, list) else [value]


def _schema(name: str) -> Any:
    return _json(name, "a schema")


def _json(name: str, expected: str) -> Any:
    """What a JSON file holds. Raises: argparse.ArgumentTypeError, as `_text`, and for no JSON."""
    try:
        return json.loads(_text(name))
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{name} is no JSON; expected {expected}") from None


def _text(name: str) -> str:
    """A file's text. Raises: argparse.ArgumentTypeError for one that cannot be read."""
    try:
        with user_path(name).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read ({error.strerror})") from None
    if len(data) > MAX_FILE_BYTES:
        raise argparse.ArgumentTypeError(f"{name} has more than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{name} is no text in UTF-8") from None


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
    if option.name == "tools":
        described = "what the answer may call: a list of descriptions, as OpenAI's API takes it"
        return {**shared, "type": _tools, "metavar": "FILE.json", "help": described}
    if option.name == "chat_template_kwargs":
        return {**shared, "action": _Variables, "metavar": "JSON"}
    if option.choices:
        return {**shared, "choices": option.choices}
    if option.name == "schema":
        described = "the answer is JSON of the schema in this file"
        return {**shared, "type": _schema, "metavar": "FILE.json", "help": described}
    if option.name == "grammar":
        described = "the answer is of the Lark grammar in this file"
        return {**shared, "type": _text, "metavar": "FILE.lark", "help": described}
    if option.default is not None:
        shared["help"] += f" (default {option.default})"
    return {**shared, "type": option.kind}
