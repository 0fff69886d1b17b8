"""One download over http or https, every address judged before it is spoken to.

A name is resolved once, and the connection goes to the very address that was judged: a name server
cannot answer differently in between. Where a proxy is set, the proxy resolves the name, and what
it resolves to here is judged beforehand.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any

from mlx_vlm_pipes.errors import MediaError, one_line

CHUNK_BYTES = 64 * 1024
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses as a gateway shows them
UNICAST_V6 = ipaddress.ip_network("2000::/3")


@dataclass
class Download:
    """One GET: `run` and `outcome` block until it is done; `abort`, on another thread, ends it.

    Args: allow_private, whether loopback, local and otherwise unroutable addresses may be asked;
    hosts, the only ones that may be, in lower case (None: all).
    """

    url: str
    allow_private: bool
    timeout_s: float
    max_bytes: int
    hosts: frozenset[str] | None = None
    sockets: list[socket.socket] = field(default_factory=list)
    proxied: set[urllib.request.Request] = field(default_factory=set)

    def run(self) -> bytes:
        """The body.

        Raises: MediaError for another scheme, an address that is not public, a body that is too
        large, too slow or shorter than announced; OSError, ValueError and HTTPException as the
        standard library does.
        """
        self.judge_url(self.url)
        deadline = time.monotonic() + self.timeout_s
        with self._opener().open(_request(self.url), timeout=self.timeout_s) as answer:
            return self._read(answer, deadline)

    def outcome(self) -> bytes | MediaError:
        """As `run`, with every failure as the one line that a user is told."""
        name = short_url(self.url)
        try:
            return self.run()
        except MediaError as error:
            return error
        except urllib.error.HTTPError as error:
            reason = one_line(error.reason)
            return MediaError(f"{name}: the server answered {error.code} ({reason})")
        except (OSError, ValueError, HTTPException) as error:
            reason = one_line(getattr(error, "reason", error))
            return MediaError(f"{name} cannot be fetched: {reason}")

    def abort(self) -> None:
        """Break the connections; `run` then raises OSError."""
        for connection in list(self.sockets):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has ended by itself

    def connect(self, host: str, port: int) -> socket.socket:
        """A connected socket. Raises: MediaError for a host with an address that is not public."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self._judge(host, found)
        failure = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(self.timeout_s)
            self.sockets.append(connection)
            try:
                connection.connect(address)
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        raise failure

    def judge_url(self, url: str) -> None:
        """Raises: MediaError for another scheme, or a host that is not one of `hosts`."""
        require_http(url)
        host = (urllib.parse.urlsplit(url).hostname or "").lower()
        if self.hosts is not None and host not in self.hosts:
            raise MediaError(f"{short_url(url)}: {host} is not one of the hosts that may be asked")

    def judge_name(self, host: str) -> None:
        """As `connect`, without a connection; a name that only the proxy knows passes."""
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            return
        self._judge(host, found)

    def _judge(self, host: str, found: list[Any]) -> None:
        hidden = [str(address[0]) for *_, address in found if not is_public(str(address[0]))]
        if hidden and not self.allow_private:
            raise MediaError(
                f"{short_url(self.url)} leads to {host}, which is {hidden[0]}, no public address; "
                "allow_private (--allow-private) permits it"
            )

    def _opener(self) -> urllib.request.OpenerDirector:
        """An opener that knows http and https only, so that no redirect leads to file: or ftp:."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            _Proxies(self), _Plain(self), _Secure(self), _Redirects(self),
            urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ):  # fmt: skip
            opener.add_handler(handler)
        return opener

    def _read(self, answer: HTTPResponse, deadline: float) -> bytes:
        parts, size = [], 0
        while part := answer.read1(CHUNK_BYTES):
            parts.append(part)
            size += len(part)
            if size > self.max_bytes:
                raise MediaError(
                    f"{short_url(self.url)} is larger than the limit of {self.max_bytes} bytes"
                )
            if time.monotonic() > deadline:
                raise MediaError(f"{short_url(self.url)} took longer than {self.timeout_s:.0f} s")
        if answer.length:
            raise MediaError(
                f"{short_url(self.url)} ended after {size} bytes, {answer.length} short of what "
                "the server announced; try again"
            )
        return b"".join(parts)


class _Connection(HTTPConnection):
    def __init__(self, download: Download, host: str, timeout: float) -> None:
        super().__init__(host, timeout=timeout)
        self._download = download

    def connect(self) -> None:
        self.sock = self._download.connect(self.host, self.port)


class _SecureConnection(HTTPSConnection):
    def __init__(self, download: Download, host: str, timeout: float) -> None:
        self._tls = ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])
        super().__init__(host, timeout=timeout, context=self._tls)
        self._download = download

    def connect(self) -> None:
        plain = self._download.connect(self.host, self.port)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, download: Download) -> None:
        super().__init__()
        self._download = download

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        if req in self._download.proxied:
            return super().http_open(req)
        kind: Any = partial(_Connection, self._download)  # called with host and timeout
        return self.do_open(kind, req)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, download: Download) -> None:
        super().__init__()
        self._download = download

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        if req in self._download.proxied:
            return super().https_open(req)
        kind: Any = partial(_SecureConnection, self._download)  # called with host and timeout
        return self.do_open(kind, req)


class _Proxies(urllib.request.ProxyHandler):
    def __init__(self, download: Download) -> None:
        super().__init__()
        self._download = download

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        if urllib.request.proxy_bypass(req.host):
            return None
        self._download.judge_name(urllib.parse.urlsplit(f"//{req.host}").hostname or req.host)
        self._download.proxied.add(req)
        return super().proxy_open(req, proxy, type)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, download: Download) -> None:
        self._download = download

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self._download.judge_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_public(text: str) -> bool:
    """Whether an IP address is one of the open internet; an IPv4 address within IPv6 counts."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        return address.is_global and address in UNICAST_V6
    return address.is_global and not address.is_multicast


def require_http(url: str) -> None:
    """Raises: MediaError for a URL of another scheme, or without a host."""
    try:
        parts = urllib.parse.urlsplit(url)
        allowed = parts.scheme.lower() in ("http", "https") and bool(parts.hostname)
    except ValueError:
        allowed = False
    if not allowed:
        raise MediaError(f"{short_url(url)}: only http, https and data: URLs are fetched")


def short_url(url: str) -> str:
    return repr(url if len(url) <= 100 else url[:97] + "...")


def _request(url: str) -> urllib.request.Request:
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    return urllib.request.Request(quoted, headers={"User-Agent": "mlx_vlm_pipes"})
