"""Who is let in: keys, hosts, and how many requests at once."""

from __future__ import annotations

import base64
import hmac
import ipaddress
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mlx_vlm_pipes.server.errors import ApiError
from mlx_vlm_pipes.server.settings import ServerSettings

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
RETRY_S = "1"
BEARER, PASSWORD = "Bearer", 'Basic realm="mlx_vlm_pipes", charset="UTF-8"'


class Gate:
    """Counts requests from their first byte on, on the event loop alone: nothing is awaited
    between looking and counting, so that no burst slips past the limit.

    rows: how many requests a model runs at once, known when it is loaded. is_local: whether the
    server listens on this machine only.
    """

    def __init__(self, settings: ServerSettings, *, is_local: bool) -> None:
        self._settings, self._is_local = settings, is_local
        self.rows = 1
        self.inside = 0
        self.is_draining = False

    def check_caller(self, headers: Mapping[str, str], challenge: str) -> None:
        """Raises: ApiError 403 for a foreign Host on a local server (a page elsewhere whose name
        was made to lead here), 401 without a right key. challenge: BEARER or PASSWORD."""
        if self._is_local and not _is_local_host(headers.get("host", "localhost")):
            raise ApiError(403, "this server answers to localhost only; start it with --host")
        keys = self._settings.api_keys
        if not keys:
            return
        given = _given_key(headers).strip().encode()
        right = [hmac.compare_digest(given, key.encode()) for key in keys]
        if not any(right):
            raise ApiError(
                401,
                "no right API key; send it as 'Authorization: Bearer KEY', a browser as password",
                code="invalid_api_key",
                headers={"WWW-Authenticate": challenge},
            )

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place for one request. Raises: ApiError 503 while draining, 429 where all are taken."""
        if self.is_draining:
            raise ApiError(
                503, "the server is going down", code="draining", headers={"Retry-After": "5"}
            )
        limit = self.rows + self._settings.max_waiting
        if self.inside >= limit:
            raise ApiError(
                429,
                f"{self.inside} requests are running or waiting, as many as this server takes; "
                "try again",
                code="queue_full",
                headers={"Retry-After": RETRY_S},
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def _given_key(headers: Mapping[str, str]) -> str:
    """The key of a request; a browser sends it as the password that it was told, with any name.

    It sends that again whatever page makes it ask, so a request from another's page has none.
    """
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value
    if kind.lower() != "basic":
        return headers.get("x-api-key", "")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host to listen on is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local_host(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name.strip("[]").lower() in LOCAL_NAMES
