"""Which pictures and clips a request may name."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.errors import clip, shown
from mlx_vlm_pipes.processing.fetch import Access, fetch
from mlx_vlm_pipes.processing.messages import part_kind, part_source
from mlx_vlm_pipes.processing.pages import split_choice, spread
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.settings import ServerSettings


def allowed_messages(
    messages: Sequence[Any], settings: ServerSettings, param: str
) -> list[dict[str, Any]]:
    """The messages, with each source of a picture or clip as what may be read: a data: URL, what
    lies behind an http(s) URL of an allowed host, or a file below the media root; a PDF as its
    pages.

    Raises: ApiError 400 for any other source, and for more of them than a request may have;
    InputError for what is no part of a message.
    """
    out, total = [], 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, Mapping)):
            out.append(message)
            continue
        allowed: list[Any] = []
        for part in [content] if isinstance(content, Mapping) else content:
            kind = part_kind(part)
            found = [part] if kind == "text" else _allowed_parts(part, kind, settings, param)
            total += len(found) if kind != "text" else 0
            if total > settings.max_media:
                raise bad_request(
                    f"{total} or more pictures, clips and pages of documents; this server takes "
                    f"{settings.max_media} in a request (--max-media)",
                    param,
                )
            allowed += found
        out.append({**message, "content": allowed})
    return out


def _allowed_parts(
    part: Mapping[str, Any], kind: str, settings: ServerSettings, param: str
) -> list[dict[str, Any]]:
    """A picture or clip, or the pages of a document, each with a source that may be read."""
    source = part_source(part, kind)
    if source is None:
        raise bad_request(f"a part of type {shown(part.get('type'))} carries no {kind}", param)
    if not isinstance(source, str):
        raise bad_request(f"{kind}: expected a URL, found {shown(source)}", param)
    base, choice = split_choice(source) if kind == "image" else (source, None)
    found = allowed_source(base, settings, param)
    access = Access(local_files=False)
    pages = spread(found, access, choice) if kind == "image" else [found]
    return [{"type": kind, kind: page} for page in pages]


def allowed_source(source: str, settings: ServerSettings, param: str) -> str | bytes | Path:
    """A data: URL itself, what lies behind another URL, or the path of a file.

    Raises: ApiError 400 where it may not be read; MediaError where it cannot be fetched.
    """
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
