"""Which pictures and clips a request may name."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.errors import clip
from mlx_vlm_pipes.processing.fetch import fetch
from mlx_vlm_pipes.processing.messages import PART_TYPES, SOURCE_KEYS
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.settings import ServerSettings


def allowed_messages(
    messages: Sequence[Any], settings: ServerSettings, param: str
) -> list[dict[str, Any]]:
    """The messages, with each source of a picture or clip as what may be read: a data: URL, an
    http(s) URL of an allowed host, or a file below the media root.

    Raises: ApiError 400 for any other source, and for more of them than a request may have.
    """
    out, total = [], 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, Mapping)):
            out.append(message)
            continue
        parts = [content] if isinstance(content, Mapping) else content
        total += sum(_kind(part) is not None for part in parts)
        if total > settings.max_media:
            raise bad_request(
                f"more than {settings.max_media} pictures and clips, the limit of a request", param
            )
        allowed = [_allowed_part(part, settings, param) for part in parts]
        out.append({**message, "content": allowed})
    return out


def _kind(part: Any) -> str | None:
    """ "image" or "video", of a part that is either."""
    named = part.get("type") if isinstance(part, Mapping) else None
    kind = PART_TYPES.get(named) if isinstance(named, str) else None
    return kind if kind in SOURCE_KEYS else None


def _allowed_part(part: Any, settings: ServerSettings, param: str) -> Any:
    kind = _kind(part)
    if kind is None:
        return part
    for key in SOURCE_KEYS[kind]:
        value = part.get(key)
        if value is None or key == "base64":
            continue
        source = value.get("url") if isinstance(value, Mapping) else value
        return {"type": kind, kind: allowed_source(source, settings, param)}
    if "base64" not in part:
        raise bad_request(f"a part of type {part['type']!r} carries no {kind}", param)
    return part


def allowed_source(source: Any, settings: ServerSettings, param: str) -> str | bytes | Path:
    """A data: URL itself, what lies behind another URL, or the path of a file.

    Raises: ApiError 400 where it may not be read; MediaError where it cannot be fetched.
    """
    if not isinstance(source, str):
        raise bad_request("a picture or clip is named by no text; expected a URL", param)
    scheme = source.partition(":")[0].lower()
    if scheme == "data":
        return source
    if scheme in ("http", "https"):
        return _fetched(source, settings, param)
    return _allowed_file(source, settings, param)


def _fetched(source: str, settings: ServerSettings, param: str) -> bytes:
    """What an allowed host sends; redirects may lead to such hosts only."""
    if not settings.url_hosts:
        raise bad_request(
            f"{clip(source)}: this server fetches nothing; send a data: URL "
            "(--allow-url-host permits a host)",
            param,
        )
    return fetch(source, hosts=settings.url_hosts)


def _allowed_file(source: str, settings: ServerSettings, param: str) -> Path:
    """A file below the media root, all links followed."""
    refused = ApiError(
        400,
        f"{clip(source)} is no data: URL; files are read below --media-root only",
        param,
        "invalid_media",
    )
    root = settings.media_root
    if root is None:
        raise refused
    path = urllib.parse.unquote(source[7:]) if source[:7].lower() == "file://" else source
    try:
        found = (root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not found.is_relative_to(root.resolve()) or not found.is_file():
        raise refused
    return found
