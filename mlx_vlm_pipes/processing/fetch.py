"""Pictures from http(s) and data: URLs, bounded in size and time."""

from __future__ import annotations

import base64
import binascii
import queue
import threading
import urllib.parse
from dataclasses import dataclass

from mlx_vlm_pipes.errors import MediaError

MAX_BYTES = 20 * 2**20
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Access:
    """What a text that names a picture may reach.

    local_files: the files of this machine. allow_private: http(s) to addresses that are not of the
    open internet: this machine, its network, a cloud's inner services.
    """

    local_files: bool = True
    allow_private: bool = False


def is_url(text: str) -> bool:
    """Whether a text is an http(s) or data: URL, or another scheme that `fetch` will refuse.

    A file: URL is the name of a file (`file_path`).
    """
    head = text[:5].lower()
    return head == "data:" or ("://" in text[:32] and head != "file:")


def file_path(text: str) -> str | None:
    """The path that a file: URL names, percent-decoded; None for any other text.

    Raises: MediaError for a file of another machine.
    """
    if text[:7].lower() != "file://":
        return None
    host, slash, path = text[7:].partition("/")
    if host.lower() not in ("", "localhost"):
        raise MediaError(f"{text[:100]!r}: a file of another machine; expected file:///...")
    return urllib.parse.unquote(slash + path)


def fetch(url: str, *, allow_private: bool = False, hosts: frozenset[str] | None = None) -> bytes:
    """The bytes behind an http(s) or data: URL.

    Args: hosts, the only ones that may be asked, in lower case; None: all.
    Raises: MediaError for another scheme, another host or an address that is not public (redirects
    included), above 20 MiB, after 15 seconds, when the server refuses, or sends less than it
    announced.
    """
    if url[:5].lower() == "data:":
        return _decode(url)
    from mlx_vlm_pipes.processing.web import Download, require_http, short_url

    require_http(url)
    download = Download(url, allow_private, TIMEOUT_S, MAX_BYTES, hosts)
    answers: queue.SimpleQueue[bytes | MediaError] = queue.SimpleQueue()
    # A server may drip its headers byte by byte, each within the socket's own time limit.
    threading.Thread(target=lambda: answers.put(download.outcome()), daemon=True).start()
    try:
        answer = answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        download.abort()
        raise MediaError(f"{short_url(url)} took longer than {TIMEOUT_S:.0f} s") from None
    if isinstance(answer, MediaError):
        raise answer
    return answer


def _decode(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError("data URL without a comma; expected data:image/png;base64,...")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise MediaError(f"data URL of {len(body) * 3 // 4} bytes; the limit is {MAX_BYTES}")
    if not head.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError("data URL is not valid base64") from error
