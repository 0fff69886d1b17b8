"""Servers that lie, drip, redirect and flood: the picture, or one line in good time."""

from __future__ import annotations

import contextlib
import gzip
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np

from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.processing import fetch, web
from mlx_vlm_pipes.processing.fetch import Access
from mlx_vlm_pipes.processing.images import load_image
from tests.torture import pictures, section
from tests.torture.section import Case, refused, require

LIMIT_BYTES, LIMIT_S = 200_000, 1.0  # instead of 20 MiB and 15 s
Answer = Callable[[socket.socket], None]
HOSTS = ["127.0.0.1", "localhost", "[::1]", "0", "0.0.0.0", "127.1", "2130706433", "0x7f000001",
         "127.0.0.2", "10.1.2.3", "169.254.169.254", "[::ffff:127.0.0.1]", "192.168.0.1",
         "[fd00::1]", "user:word@127.0.0.1", "LOCALHOST", "127.0.0.1.", "[64:ff9b::7f00:1]",
         "100.64.0.1"]  # fmt: skip
INNER = ["127.0.0.2", "0", "10.1.2.3", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]",
         "192.168.0.1", "[fd00::1]", "100.64.0.1"]  # fmt: skip
TARGETS = ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "gopher://x",
           "javascript:1", "//", "http://", "http://[", "http://127.0.0.1:99999/", "", "\x00",
           "http://nobody.invalid/"]  # fmt: skip
CHUNKED = "Transfer-Encoding: chunked"
STATUSES = [100, 199, 204, 206, 301, 304, 400, 401, 403, 404, 407, 418, 429, 500, 503, 599, 999]


class Server:
    """Answers each connection as told; a context manager. asked: how many came."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked = answer, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []

    def __enter__(self) -> Server:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for connection in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.asked += 1
                self._open.append(connection)
                threading.Thread(target=self._reply, args=(connection,), daemon=True).start()

    def _reply(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(65536)
            self.answer(connection)
        connection.close()


def say(status: int, body: bytes, *headers: str, length: int | None = -1) -> bytes:
    """A whole answer; length: what Content-Length says, -1 for the truth, None for no such line."""
    lines = [f"HTTP/1.1 {status} Something", *headers]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length == -1 else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Section(section.Section):
    small: ClassVar[int] = 30

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed, folder)
        self._patches = contextlib.ExitStack()
        for name, value in (("MAX_BYTES", LIMIT_BYTES), ("TIMEOUT_S", LIMIT_S)):
            self._patches.enter_context(mock.patch.object(fetch, name, value))
        self._patches.enter_context(mock.patch.dict("os.environ", {"no_proxy": "*"}))

    @property
    def whole(self) -> int:
        return 400

    def close(self) -> None:
        self._patches.close()

    def draw(self, index: int) -> Case:
        rng = self.rng(index)
        kinds = [self._sound, self._lying, self._slow, self._status, self._redirect, self._noise,
                 self._private, self._inward, self._spelling, self._gzip]  # fmt: skip
        return rng.choice(kinds)(rng)

    def _sound(self, rng: random.Random) -> Case:
        """Whole pictures, however they come."""
        picture = pictures.draw_picture(rng)
        body, pieces = pictures.stored(picture, "PNG"), rng.choice([1, 7, 50])
        kind = rng.choice(["length", "no length", "chunked", "redirects", "old"])
        hops, moved = rng.randint(1, 6), rng.choice([301, 302, 303, 307, 308])
        answers: Iterator[bytes] = iter([])
        if kind == "redirects":
            moves = [say(moved, b"", f"Location: /{i}") for i in range(hops)]
            answers = iter([*moves, say(200, body)])

        def answer(connection: socket.socket) -> None:
            whole = {
                "length": say(200, body), "no length": say(200, body, length=None),
                "old": say(200, body, length=None).replace(b"HTTP/1.1", b"HTTP/1.0"),
                "chunked": say(200, chunked(body, pieces), CHUNKED, length=None),
            }  # fmt: skip
            connection.sendall(whole[kind] if kind in whole else next(answers))

        def run() -> None:
            with Server(answer) as server:
                found = load_image(f"http://127.0.0.1:{server.port}/a b?é=1#x", Access(True, True))
            require(np.array_equal(np.asarray(found), np.asarray(picture)), "another picture")

        return Case(f"a picture, {kind}", run)

    def _lying(self, rng: random.Random) -> Case:
        """Bodies that are not as long as announced."""
        body = pictures.stored(pictures.draw_picture(rng, [48, 75]), "PNG")
        more = rng.choice([1, 7, 10**6, 10**18])
        pieces = chunked(body, rng.choice([9, 200]))
        cut = pieces[: rng.randrange(len(pieces) - 6)]
        kind, answer = rng.choice([
            ("longer", say(200, body, length=len(body) + more)),
            ("negative", say(200, body[: len(body) // 2], length=-rng.randint(2, 99))),
            ("no number", say(200, body[: len(body) // 2], "Content-Length: x", length=None)),
            ("flood", say(200, bytes(LIMIT_BYTES + rng.randint(1, 10**6)))),
            ("flood without end", say(200, bytes(LIMIT_BYTES * 3), length=None)),
            ("cut chunks", say(200, cut, CHUNKED, length=None)),
            ("chunks of no size", say(200, b"zz\r\n" + body, CHUNKED,
                                      length=None)),
            ("chunk of 2**70", say(200, b"%x\r\n" % 2**70 + body, CHUNKED,
                                   length=None)),
            ("nothing", b""),
            ("empty", say(200, b"")),
            ("shorter", say(200, body, length=rng.randrange(len(body) - 20))),
        ])  # fmt: skip
        return self._refused(f"a body that is {kind}", lambda c: c.sendall(answer))

    def _slow(self, rng: random.Random) -> Case:
        kind, pause = rng.choice(["head", "body", "never", "chunks"]), rng.choice([0.02, 0.3])

        def answer(connection: socket.socket) -> None:
            heads = {
                "head": b"HTTP/1.1 200 OK\r\nX: ", "body": say(200, b"", length=10**5),
                "never": b"", "chunks": say(200, b"", CHUNKED, length=None),
            }  # fmt: skip
            connection.sendall(heads[kind])
            for _ in range(int(6 * LIMIT_S / pause)):
                time.sleep(pause)
                if kind != "never":
                    connection.sendall(b"1\r\nx\r\n" if kind == "chunks" else b"x")

        return self._refused(f"{kind} that drips", answer)

    def _status(self, rng: random.Random) -> Case:
        status = rng.choice(STATUSES)
        body = rng.choice([b"", b"<html>no</html>", bytes(10**6)])
        return self._refused(f"status {status}", lambda c: c.sendall(say(status, body)))

    def _redirect(self, rng: random.Random) -> Case:
        target = rng.choice([*TARGETS, "/"])
        answer = say(rng.choice([301, 302, 303, 307, 308]), b"", f"Location: {target}")
        about = f"a redirect to {target!r}" if target != "/" else "a loop"
        return self._refused(about, lambda c: c.sendall(answer))

    def _noise(self, rng: random.Random) -> Case:
        """Bytes that are no HTTP, or hardly."""
        sound = say(200, pictures.stored(pictures.draw_picture(rng, [9]), "PNG"))
        lines = b"".join(b"X%d: y\r\n" % i for i in range(300))
        kind, answer = rng.choice([
            ("noise", rng.randbytes(rng.choice([1, 100, 70_000]))),
            ("a long line", b"HTTP/1.1 200 " + b"O" * 70_000),
            ("many headers", b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n"),
            ("a long header", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"),
            ("no status", b"HTTP/1.1 x OK\r\n\r\n"),
            ("half a head", sound[: rng.randrange(1, 30)]),
            ("headers without end", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40),
            ("no picture", say(200, rng.randbytes(500))),
            ("broken", say(200, pictures.damaged(sound[-200:], rng)[1])),
        ])  # fmt: skip
        if rng.random() < 0.2:
            return self._refused("a connection that is reset", reset)
        return self._refused(f"{kind}", lambda c: c.sendall(answer))

    def _gzip(self, rng: random.Random) -> Case:
        """Nothing was said of compression: what comes packed is no picture, and not unpacked."""
        packed = gzip.compress(bytes(rng.choice([1000, 10**8])))
        answer = say(200, packed, "Content-Encoding: gzip", "Content-Type: image/png")
        return self._refused("a gzip bomb", lambda c: c.sendall(answer))

    def _private(self, rng: random.Random) -> Case:
        """Nobody is asked where this machine and its network are not to be asked."""
        host, scheme = rng.choice(HOSTS), rng.choice(["http", "HTTP", "https"])

        def run() -> None:
            with Server(lambda c: c.sendall(say(200, b""))) as server:
                url = f"{scheme}://{host}:{server.port}/x.png"
                line = refused(lambda: load_image(url, Access(True, False)), MediaError)
                require(server.asked == 0, f"the server was asked: {line}")

        return Case(f"{scheme} to {host}", run)

    def _inward(self, rng: random.Random) -> Case:
        """A public server that leads inward, at once or after some hops."""
        host, hops = rng.choice(INNER), rng.randint(0, 3)

        def run() -> None:
            with Server(lambda c: c.sendall(say(200, b"inner"))) as inner:
                goal = f"Location: http://{host}:{inner.port}/x.png"
                steps = iter([*(say(302, b"", "Location: /on") for _ in range(hops))])
                last = say(302, b"", goal)
                with Server(lambda c: c.sendall(next(steps, last))) as outer, public("127.0.0.1"):
                    url = f"http://127.0.0.1:{outer.port}/x.png"
                    line = refused(lambda: load_image(url, Access(True, False)), MediaError)
                    require(outer.asked == hops + 1, f"{outer.asked} asked: {line}")
                    require(inner.asked == 0, f"the inner one was asked: {line}")

        return Case(f"a redirect to {host} after {hops}", run)

    def _spelling(self, rng: random.Random) -> Case:
        """URLs as they should not be."""
        url = rng.choice([
            "http://127.0.0.1:{port}:80/", "http://127.0.0.1:x/", "http://127.0.0.1:-1/",
            "http://127.0.0.1:70000/", "http://[::1/", "http:///x.png", "http://\x00/",
            "http://a b/",
            "http://127.0.0.1\r\nX: y/", "http://é.invalid/", "http://" + "a" * 300 + "/",
            "http://" + "a." * 3000 + "/", "https://127.0.0.1:{port}/", "http://nobody.invalid/x",
            "http://127.0.0.1:1/x.png", "http://@/", "http://:80/", "http://\ud800/", "hTTp://?",
            "http://127.0.0.1:{port}/\ud800", "unix:///x", "blob:http://x", "://", "http://%00/",
            "http://[fe80::1%25lo]/", "http://127.0.0.1:{port}/" + "x" * 10**6,
        ])  # fmt: skip

        def run() -> None:
            with Server(lambda c: c.sendall(say(404, b""))) as server:
                given = url.replace("{port}", str(server.port))
                self._in_time(given)

        return Case(f"the URL {url[:60]!r}", run)

    def _refused(self, about: str, answer: Answer) -> Case:
        def run() -> None:
            with Server(answer) as server:
                self._in_time(f"http://127.0.0.1:{server.port}/x.png")

        return Case(about, run)

    def _in_time(self, url: str) -> None:
        started = time.perf_counter()
        refused(lambda: load_image(url, Access(True, True)), MediaError)
        seconds = time.perf_counter() - started
        require(seconds < 3 * LIMIT_S, f"{seconds:.1f} s")


def chunked(body: bytes, pieces: int) -> bytes:
    size = max(1, len(body) // pieces)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextlib.contextmanager
def public(address: str) -> Iterator[None]:
    """This one address passes for a public one, and no other."""
    with mock.patch.object(web, "is_public", lambda text: text == address):
        yield
