"""A hub on this machine: repositories out of dictionaries, and all that a hub may refuse."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "1" * 40


@dataclass
class Repo:
    """A repository's files.

    refusal: (status, headers) of every answer about it; gated: files need the token.
    """

    files: Mapping[str, bytes]
    refusal: tuple[int, dict[str, str]] | None = None
    gated: bool = False
    token: str | None = None
    bytes_per_s: float | None = None


@dataclass
class Hub:
    """repos by name; served: (method, path) of each answer with a file's bytes."""

    repos: dict[str, Repo]
    url: str = ""
    served: list[str] = field(default_factory=list)


@contextmanager
def serving(repos: Mapping[str, Repo]) -> Iterator[Hub]:
    hub = Hub(dict(repos))

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub  # of HTTP/1.0: no connection outlives its answer

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(401, {"X-Error-Code": "RepoNotFound"})
        if repo.refusal is not None:
            return self._refuse(*repo.refusal)
        if parts[0] == "api":
            return self._describe(name, repo, parts[4:])
        return self._file(repo, parts[3], "/".join(parts[4:]), has_body=has_body)

    def _describe(self, name: str, repo: Repo, rest: list[str]) -> None:
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                for path, data in repo.files.items()
            ]
            return self._send(json.dumps(entries).encode(), {"Content-Type": "application/json"})
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", SHA):
            return self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        info = {
            "id": name, "modelId": name, "sha": SHA, "private": False, "tags": [], "downloads": 0,
            "siblings": [{"rfilename": path} for path in repo.files],
        }  # fmt: skip
        return self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: Repo, revision: str, path: str, *, has_body: bool) -> None:
        if repo.gated and self.headers.get("authorization") != f"Bearer {repo.token}":
            return self._refuse(403, {"X-Error-Code": "GatedRepo"})
        data = repo.files.get(path)
        if data is None:
            return self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if has_body:
            self.hub.served.append(f"{revision}/{path}")
        return self._send(data, headers, has_body=has_body, bytes_per_s=repo.bytes_per_s)

    def _refuse(self, status: int, headers: Mapping[str, str]) -> None:
        self._send(b'{"error": "no"}', headers, status)

    def _send(
        self, data: bytes, headers: Mapping[str, str], status: int = 200, *,
        has_body: bool = True, bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not has_body or self.command == "HEAD":
            return
        step = len(data) if bytes_per_s is None else max(1, int(bytes_per_s / 20))
        for begin in range(0, len(data), step or 1):
            self.wfile.write(data[begin : begin + step])
            if bytes_per_s is not None:
                time.sleep(0.05)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
