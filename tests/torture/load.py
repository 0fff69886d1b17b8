"""Many clients of all dialects at once, half of them cut off: nothing runs or stays behind.

    python -m tests.torture.load --seconds 300 --clients 64 --seed 0

Requests are drawn: chat, completions, messages, responses that go on from others, plans; streamed
or whole, with pictures or without, one or two answers, some wrong. Every second one is cut off: in
its body, before its answer or within it. Once a while it prints what the server holds.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from mlx_vlm_pipes.command import say
from tests.torture import section
from tests.torture.load_server import Held
from tests.torture.section import Case, require
from tests.torture.worker import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED = "You look at pictures of shapes and say what they show. " * 8
ENDS = {"/v1/messages": (b"message_stop",),
        "/v1/responses": (b"response.completed", b"response.incomplete")}  # fmt: skip
ALLOWED = {200, 400, 404, 429}  # of requests that are not cut off
FLAT_BYTES, RESIDENT_BYTES = 200_000, 40_000_000
SETTLE_S = 20.0


@dataclass(frozen=True)
class Request:
    """cut_s: after how long its client goes; body_share: how much of it is sent before that."""

    path: str
    body: dict[str, Any]
    cut_s: float | None
    body_share: float


def draw_request(rng: random.Random, known: list[str]) -> Request:
    """known: ids of responses that may be gone on from."""
    path = rng.choice(["/v1/chat/completions"] * 4 + [
        "/v1/completions", "/v1/messages", "/v1/responses", "/v1/responses", "/v1/plan",
    ])  # fmt: skip
    body: dict[str, Any] = {"temperature": rng.choice([0, 0, 1])}
    text = f"{SHARED if rng.random() < 0.5 else ''}{rng.choice(WORDS)} {rng.randrange(10**6)}?"
    limit = rng.choice([1, 4, 16, 48, 200])
    if path == "/v1/completions":
        body |= {"prompt": text, "max_tokens": limit, "n": rng.choice([1, 2])}
    elif path == "/v1/responses":
        body |= {"input": text, "max_output_tokens": limit}
        if known and rng.random() < 0.5:
            body["previous_response_id"] = rng.choice(known)
    else:
        body |= {"messages": [{"role": "user", "content": _content(rng, path, text)}],
                 "max_tokens": limit}  # fmt: skip
    if path == "/v1/chat/completions":
        body |= rng.choice([
            {}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}, {"stop": ["a"]},
            {"response_format": {"type": "json_object"}}, {"temperature": "hot"}, {"model": "none"},
        ])  # fmt: skip
    if path != "/v1/plan":
        body["stream"] = rng.random() < 0.5
    cut = rng.expovariate(2.0) if rng.random() < 0.5 else None
    return Request(path, body, cut, rng.choice([0.5, 1.0, 1.0, 1.0]))


WORDS = ("Who", "What is there", "How many", "Say more about number")


def _content(rng: random.Random, path: str, text: str) -> Any:
    if rng.random() < 0.5:
        return text
    colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    image, data = Image.new("RGB", (rng.randint(20, 300), 200), colour), io.BytesIO()
    image.save(data, "PNG")
    coded = base64.b64encode(data.getvalue()).decode()
    if path == "/v1/messages":
        source = {"type": "base64", "media_type": "image/png", "data": coded}
        picture: dict[str, Any] = {"type": "image", "source": source}
    else:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}}
    return [picture, {"type": "text", "text": text}]


@dataclass
class Storm:
    """What the clients met. told: statuses and cut requests; wrong: what must not be."""

    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def client(self, port: int, rng: random.Random, end: float) -> None:
        """Ask until the time is over."""
        while time.monotonic() < end:
            request = draw_request(rng, self.known)
            try:
                if request.cut_s is None:
                    self._ask(port, request)
                else:
                    _ask_and_go(port, request, rng)
                    self.told["cut"] += 1
            except (OSError, http.client.HTTPException) as error:
                if request.cut_s is None:
                    self.wrong.append(f"{request.path}: {type(error).__name__} {error}")

    def _ask(self, port: int, request: Request) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request("POST", request.path, json.dumps(request.body))
            reply = connection.getresponse()
            body = reply.read()
        self.told[str(reply.status)] += 1
        if reply.status not in ALLOWED:
            self.wrong.append(f"{request.path}: {reply.status} {body[:200]!r}")
        elif reply.status == 200 and request.body.get("stream"):
            if not any(end in body for end in ENDS.get(request.path, (b"[DONE]",))):
                self.wrong.append(f"{request.path}: a stream ends with {body[-200:]!r}")
        elif reply.status == 200 and request.path == "/v1/responses":
            self.known[:] = [*self.known[-50:], json.loads(body)["id"]]


def _ask_and_go(port: int, request: Request, rng: random.Random) -> None:
    """Ask, read for a while, and close: politely or with a reset."""
    assert request.cut_s is not None
    body = json.dumps(request.body).encode()
    head = f"POST {request.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=request.cut_s + 1e-3) as connection:
        if rng.random() < 0.5:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        end = time.monotonic() + request.cut_s
        connection.sendall(head.encode() + body[: int(len(body) * request.body_share)])
        while (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            try:
                if not connection.recv(65536):
                    return
            except TimeoutError:
                return


class Child:
    """The server's process. ask: what it holds now."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        require(line, f"the server ended with {self._process.poll()}")
        return line

    def held(self, word: str = "held") -> Held:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        told = json.loads(self._line())
        return Held(**{**told, "requests": tuple(told["requests"])})


@contextmanager
def server() -> Iterator[Child]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.torture.load_server"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Child(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        finally:
            process.kill()


def run(child: Child, clients: int, seconds: float, seed: str, every_s: float) -> Storm:
    """A storm; what is held is printed now and then."""
    storm, end = Storm(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=storm.client, args=(child.port, random.Random(f"{seed} {i}"), end))
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(every_s, left))
        say(f"{time.monotonic() - begun:5.0f} s {child.held()}")
    for thread in threads:
        thread.join()
    return storm


def settled(child: Child) -> Held:
    """What is held once nothing runs, with empty caches. Raises: Broken where something stays."""
    end = time.monotonic() + SETTLE_S
    while any((held := child.held()).requests):
        require(time.monotonic() < end, f"requests stay inside: {held}")
        time.sleep(0.1)
    time.sleep(0.5)
    later = child.held("forget")
    require(later.steps == held.steps, "decode steps go on although nothing runs")
    return later


def storms(clients: int, seconds: float, seed: str, every_s: float = 60.0) -> None:
    """A storm a fifth as long to warm up, and one whose end is compared with that.

    Raises: Broken where something was answered that must not be, or stays.
    """
    with server() as child:
        run(child, clients, seconds / 5, f"{seed} warm", every_s)
        first = settled(child)
        say(f"   warm {first}")
        storm = run(child, clients, seconds, seed, every_s)
        last = settled(child)
    say(f"at end {last}, {dict(storm.told)}")
    told = f"warm {first}, at the end {last}"
    require(not storm.wrong, f"{len(storm.wrong)} wrong answers: {storm.wrong[:3]}")
    require(storm.told["cut"] > clients / 2, f"hardly any were cut off: {dict(storm.told)}")
    require(last.active < first.active + FLAT_BYTES, f"active memory grows: {told}")
    require(last.tasks <= first.tasks, f"tasks stay: {told}")
    require(last.resident < first.resident + RESIDENT_BYTES, f"the resident set grows: {told}")


class Section(section.Section):
    """Case 0 is a short storm, case 1 a whole one."""

    small: ClassVar[int] = 1
    whole: ClassVar[int] = 2
    limit_s: ClassVar[float] = 600.0

    def draw(self, index: int) -> Case:
        clients, seconds = ((16, 6.0), (64, 300.0))[index]
        about = f"{clients} clients for {seconds:.0f} s"
        return Case(about, lambda: storms(clients, seconds, f"{self.seed} {index}"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--every", type=float, default=30, help="seconds between two lines")
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    storms(args.clients, args.seconds, args.seed, args.every)


if __name__ == "__main__":
    main()
