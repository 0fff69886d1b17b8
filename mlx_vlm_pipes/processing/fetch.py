"""Pictures from http(s) and data: URLs, bounded in size and time."""

from __future__ import annotations

import base64
import binascii
import queue
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING

from mlx_vlm_pipes.errors import MediaError

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from urllib.request import OpenerDirector, Request

MAX_BYTES = 20 * 2**20
TIMEOUT_S = 15.0
CHUNK_BYTES = 64 * 1024


def is_url(text: str) -> bool:
    """Whether a text is an http(s) or data: URL, or another scheme that `fetch` will refuse."""
    head = text[:5].lower()
    return head == "data:" or "://" in text[:32]


def fetch(url: str) -> bytes:
    """The bytes behind an http(s) or data: URL.

    Raises: MediaError for another scheme (redirects included), above 20 MiB, after 15 seconds, or
    when the server refuses.
    """
    if url[:5].lower() == "data:":
        return _decode(url)
    _require_http(url)
    answers: queue.SimpleQueue[bytes | MediaError] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(_download(url))
        except MediaError as error:
            answers.put(error)

    # A server may drip its headers byte by byte, each within the socket's own time limit.
    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        raise MediaError(f"{_short(url)} took longer than {TIMEOUT_S:.0f} s") from None
    if isinstance(answer, MediaError):
        raise answer
    return answer


def _download(url: str) -> bytes:
    import http.client
    import urllib.error

    deadline = time.monotonic() + TIMEOUT_S
    try:
        with _opener().open(_request(url), timeout=TIMEOUT_S) as answer:
            return _read(answer, url, deadline)
    except MediaError:
        raise
    except urllib.error.HTTPError as error:
        reason = " ".join(str(error.reason).split())[:120]
        raise MediaError(f"{_short(url)}: the server answered {error.code} ({reason})") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:120]
        raise MediaError(f"{_short(url)} cannot be fetched: {reason}") from error


def _read(answer: HTTPResponse, url: str, deadline: float) -> bytes:
    parts, size = [], 0
    while True:
        part = answer.read1(CHUNK_BYTES)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise MediaError(f"{_short(url)} is larger than the limit of {MAX_BYTES} bytes")
        if time.monotonic() > deadline:
            raise MediaError(f"{_short(url)} took longer than {TIMEOUT_S:.0f} s")


def _request(url: str) -> Request:
    from urllib.request import Request

    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    return Request(quoted, headers={"User-Agent": "mlx_vlm_pipes"})


def _opener() -> OpenerDirector:
    """An opener that knows http and https only, so that no redirect leads to file: or ftp:."""
    import urllib.request as web

    class Redirects(web.HTTPRedirectHandler):
        def redirect_request(self, req, fp, code, msg, headers, newurl):
            _require_http(newurl)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    opener = web.OpenerDirector()
    for handler in (
        web.ProxyHandler(), web.HTTPHandler(), web.HTTPSHandler(), Redirects(),
        web.HTTPErrorProcessor(), web.HTTPDefaultErrorHandler(), web.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def _require_http(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        allowed = parts.scheme.lower() in ("http", "https") and bool(parts.hostname)
    except ValueError:
        allowed = False
    if not allowed:
        raise MediaError(f"{_short(url)}: only http, https and data: URLs are fetched")


def _decode(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise MediaError("data URL without a comma; expected data:image/png;base64,...")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise MediaError(f"data URL is larger than the limit of {MAX_BYTES} bytes")
    if not head.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(urllib.parse.unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError("data URL is not valid base64") from error


def _short(url: str) -> str:
    return repr(url if len(url) <= 100 else url[:97] + "...")
