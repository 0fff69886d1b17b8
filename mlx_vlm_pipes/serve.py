"""python -m mlx_vlm_pipes.serve: models behind OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.arguments import BUNDLED_NAME
from mlx_vlm_pipes.command import new_parser, run_command, say
from mlx_vlm_pipes.errors import ConfigError, PipesError
from mlx_vlm_pipes.launcher import is_follower, launched_size
from mlx_vlm_pipes.prompt_cache import prefix_files, read_prefixes

if TYPE_CHECKING:
    from mlx_vlm_pipes.pipeline import Pipeline
    from mlx_vlm_pipes.server.app import Server
    from mlx_vlm_pipes.server.settings import ServerSettings

READY = b"r"  # a child tells its parent that it listens
_EPILOG = """\
example:
  python -m mlx_vlm_pipes.serve --model HuggingFaceTB/SmolVLM-256M-Instruct
  then, for any OpenAI client, base_url="http://127.0.0.1:8080/v1" and any api_key
"""


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "serve",
        description="Answer OpenAI's clients over HTTP: /v1/chat/completions and others.",
        epilog=_EPILOG,
        usage="%(prog)s [options]",
    )
    _add_model_options(parser)
    net = parser.add_argument_group("network")
    net.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    net.add_argument("--port", type=int, default=8080, help="0: any (default %(default)s)")
    net.add_argument("--api-key-file", type=Path, help="keys that are let in, one a line")
    net.add_argument(
        "--supervise", action="store_true", help="start the server again where its process dies"
    )
    net.add_argument("--child-fds", help=argparse.SUPPRESS)  # its socket, and its parent's end
    _add_limits(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-waiting", type=int, default=64, help="requests that may wait")
    limits.add_argument(
        "--max-media", type=int, default=64, help="pictures, clips and PDF pages of a request"
    )
    limits.add_argument("--max-body-mb", type=float, default=64, help="of a request")
    limits.add_argument(
        "--max-tokens", type=int, default=1024, help="of answers whose request names no limit"
    )
    limits.add_argument("--timeout", type=float, default=60, help="seconds for a body and a drain")
    limits.add_argument(
        "--idle-unload", type=float, metavar="SECONDS",
        help="unload a model that nobody asks for that long; default: never",
    )  # fmt: skip
    limits.add_argument("--media-root", type=Path, help="folder whose files requests may name")
    limits.add_argument(
        "--allow-url-host", action="append", default=[], metavar="HOST",
        help="host that pictures may be fetched from; may be repeated",
    )  # fmt: skip


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `_openers` reads."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]MODEL",
        help="folder, GGUF file or hub id, and the name that requests give; may be repeated; "
        "default: the small bundled model",
    )
    model.add_argument("--dtype", default="auto", help="as for generate")
    model.add_argument("--device", choices=["cpu", "gpu"], help="default: the GPU if there is one")
    model.add_argument("--adapter", action="append", help="LoRA folder; may be repeated")
    model.add_argument(
        "--draft-model", action="append", default=[], metavar="[NAME=]MODEL",
        help="a smaller model that drafts for the one of this name, or for the first",
    )  # fmt: skip
    model.add_argument("--kv-bits", type=int, choices=[4, 8], help="quantise the KV cache")
    model.add_argument("--max-length", type=int, help="limit on prompt plus answer, in tokens")
    model.add_argument(
        "--prompt-cache", action="append", default=[], metavar="[NAME=]FILE",
        help="prefix that generate, chat or save_prefix wrote, or a folder of them, read when the "
        "model is loaded; may be repeated",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM or Ctrl-C, 2 for a user's mistake."""
    given = sys.argv[1:] if argv is None else argv
    return run_command(build_parser, partial(_run, given), given, is_joint=True)


def _run(argv: list[str], args: argparse.Namespace) -> int:
    if launched_size() > 1:
        _require_one_pipeline(args)
    if args.supervise and not args.child_fds:
        from mlx_vlm_pipes.server.supervise import Supervisor

        with _listen(args.host, args.port) as listening:
            return asyncio.run(Supervisor(argv, listening).run())
    try:
        from mlx_vlm_pipes.server.app import Server
        from mlx_vlm_pipes.server.models import Models
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is missing; the server needs pip install 'mlx-vlm-pipes[server]'"
        ) from None
    from mlx_vlm_pipes.server.gate import is_loopback

    settings = _settings(args)
    is_local = is_loopback(args.host)
    if not is_local and not settings.api_keys:
        say(f"warning: all who reach {args.host} may ask; --api-key-file lets in only some")
    given = _given_models(args)
    drafts = _given_drafts(args, given)
    if is_follower():
        next(iter(_openers(args, given, drafts).values()))()  # it does not return
    sizes = {name: partial(_weight_bytes, path, drafts.get(name)) for name, path in given.items()}
    server = Server(Models(_openers(args, given, drafts), sizes), settings, is_local=is_local)
    listening, parent = _sockets(args)
    return asyncio.run(_serve(server, listening, parent))


def _require_one_pipeline(args: argparse.Namespace) -> None:
    """Raises: ConfigError for what several ranks cannot do: they end with their pipeline."""
    for flag, is_given, instead in (
        ("--model more than once", len(args.model) > 1, "start a server for each model"),
        ("--supervise", args.supervise, "let what starts mlx.launch start it again"),
        ("--idle-unload", args.idle_unload is not None, "end the server instead"),
    ):
        if is_given:
            raise ConfigError(f"{flag}: not with several ranks; {instead}")


def _settings(args: argparse.Namespace) -> ServerSettings:
    from mlx_vlm_pipes.options import Option
    from mlx_vlm_pipes.server.settings import ServerSettings, read_keys

    for name, kind, low in (
        ("max_waiting", int, 0), ("max_media", int, 0), ("max_tokens", int, 1),
        ("max_body_mb", float, 1e-3), ("timeout", float, 0.1), ("idle_unload", float, 0.1),
    ):  # fmt: skip
        flag = "--" + name.replace("_", "-")
        Option("", name=flag, kind=kind, low=low, takes_none=True).read(getattr(args, name))
    if args.media_root is not None and not args.media_root.is_dir():
        raise ConfigError(f"--media-root {args.media_root}: no such folder")
    return ServerSettings(
        api_keys=() if args.api_key_file is None else read_keys(args.api_key_file),
        max_waiting=args.max_waiting,
        max_body_bytes=int(args.max_body_mb * 2**20),
        max_media=args.max_media,
        max_tokens=args.max_tokens,
        media_root=args.media_root,
        url_hosts=frozenset(host.lower() for host in args.allow_url_host),
        timeout_s=args.timeout,
        idle_unload_s=args.idle_unload,
    )


def _given_models(args: argparse.Namespace) -> dict[str, str | None]:
    """By the names that requests give (NAME, or what stands behind --model): where each lies."""
    given: dict[str, str | None] = {}
    for text in args.model:
        head, equals, path = text.partition("=")
        name = head if equals else text
        if name in given:
            raise ConfigError(f"--model {text}: the name {name!r} is given twice")
        given[name] = path if equals else text
    return given or {BUNDLED_NAME: None}


def _given_drafts(args: argparse.Namespace, given: dict[str, str | None]) -> dict[str, str]:
    """Which model drafts for which, by the latter's name. Raises: ConfigError."""
    drafts: dict[str, str] = {}
    for text in args.draft_model:
        name, path = _for_model(text, given)
        if name in drafts:
            raise ConfigError(f"--draft-model {text}: {name!r} has a draft model already")
        drafts[name] = path
    return drafts


def _for_model(text: str, given: dict[str, str | None]) -> tuple[str, str]:
    """What `[NAME=]VALUE` is for, the first model without a name, and the value."""
    head, _, value = text.partition("=")
    return (head, value) if head in given else (next(iter(given)), text)


def _openers(
    args: argparse.Namespace, given: dict[str, str | None], drafts: dict[str, str]
) -> dict[str, Callable[[], Pipeline]]:
    """By name: what opens each. Raises: ConfigError for a --prompt-cache that is not there."""
    cached: dict[str, list[Path]] = {name: [] for name in given}
    for text in args.prompt_cache:
        name, path = _for_model(text, given)
        cached[name] += prefix_files(path)
    options = {
        "dtype": args.dtype, "device": args.device, "adapter": args.adapter,
        "kv_bits": args.kv_bits, "max_length": args.max_length, "progress": False,
        "distributed": "auto",
    }  # fmt: skip
    return {
        name: partial(_open, path, {**options, "draft": drafts.get(name)}, cached[name])
        for name, path in given.items()
    }


def _open(path: str | None, options: Mapping[str, Any], prefixes: Sequence[Path]) -> Pipeline:
    """Raises: as `load` and `read_prefixes`."""
    from mlx_vlm_pipes.loading import load

    pipe = load(path, **options)
    try:
        read_prefixes(pipe, prefixes)
    except PipesError:
        pipe.close()
        raise
    return pipe


def _weight_bytes(path: str | None, draft: str | None) -> int:
    """Of a model's files and its draft model's, which are downloaded for it. Raises: as `load`."""
    from mlx_vlm_pipes.loading import resolve_folder
    from mlx_vlm_pipes.weights import find_weight_files

    folders = [resolve_folder(path), *([] if draft is None else [resolve_folder(draft)])]
    return sum(file.stat().st_size for f in folders for file in find_weight_files(f))


def _sockets(args: argparse.Namespace) -> tuple[socket.socket, socket.socket | None]:
    """The one to listen on, and the one to a supervising parent."""
    if args.child_fds is None:
        return _listen(args.host, args.port), None
    listening, parent = (socket.socket(fileno=int(fd)) for fd in args.child_fds.split(","))
    return listening, parent


def _listen(host: str, port: int) -> socket.socket:
    """Raises: ConfigError where the address is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; try another --port") from None
    return listening


async def _serve(server: Server, listening: socket.socket, parent: socket.socket | None) -> int:
    """Listen at once, load meanwhile; end with 0 once a signal has come, or the parent has gone,
    and all is answered; with 1 where a model's thread has died."""
    from mlx_vlm_pipes.server.app import drain
    from mlx_vlm_pipes.server.wire import web_server

    web = web_server(server.app, server.settings.timeout_s, lifespan="on")
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    serving = asyncio.create_task(web.serve(sockets=[listening]))
    loading = asyncio.create_task(_load_first(server))
    dying = asyncio.create_task(server.models.died())
    stopped = asyncio.create_task(stopping.wait())
    host, port = listening.getsockname()[:2]
    say(f"listening on http://{host}:{port}/v1; Ctrl-C ends it")
    if parent is not None:
        parent.send(READY)
        loop.add_reader(parent, stopping.set)  # it says nothing: its end has come
    waited: set[asyncio.Task[Any]] = {serving, loading, dying, stopped}
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and not loading.exception():
        await asyncio.wait(waited - {loading}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.is_set():
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second one ends it at once
        say("ending: no new requests; waiting for those that run")
        await drain(server)
    web.should_exit = True
    await serving
    if dying.done():
        say(f"error: {dying.result()}")
        return 1
    for task in (dying, stopped):
        task.cancel()
    if loading.done():
        loading.result()
    return 0


async def _load_first(server: Server) -> None:
    """Raises: the package's errors, of a model that cannot be opened."""
    first, server.models.is_starting = server.models.first, True
    try:
        pipe = await asyncio.to_thread(server.models.load, first)
    except PipesError as error:
        first.failure = error
        raise
    finally:
        server.models.is_starting = False
    server.gate.rows = pipe.engine.config.max_batch_size
    say(f"ready: {first.name}, {pipe!r}")


if __name__ == "__main__":
    sys.exit(main())
