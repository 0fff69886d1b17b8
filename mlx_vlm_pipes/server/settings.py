"""What a server is told when it starts, and what it allows its clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_vlm_pipes.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server.

    api_keys: one of them must come with every request but those of `/health`; none: all may ask.
    max_waiting: requests that may wait beside those that run. max_body_bytes: of a request's body.
    max_media: pictures, clips and PDF pages of one request. max_tokens: of answers whose request
    names no limit. media_root: the folder whose files a request may name. url_hosts: the hosts from
    which pictures are fetched. timeout_s: how long a body, a client that does not read, and the
    requests that run at the end are waited for. idle_unload_s: when a model that nobody asks for is
    unloaded; None: never.
    """

    api_keys: tuple[str, ...] = ()
    max_waiting: int = 64
    max_body_bytes: int = 64 << 20
    max_media: int = 64
    max_tokens: int = 1024
    media_root: Path | None = None
    url_hosts: frozenset[str] = frozenset()
    timeout_s: float = 60.0
    idle_unload_s: float | None = None


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those after # are left.

    Raises: ConfigError for a file that cannot be read or holds none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: cannot be read ({error})") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path}: holds no key; expected one a line")
    return keys
