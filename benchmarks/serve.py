"""A server under load beside the servers of mlx-lm and mlx-vlm, on one checkpoint.

    python benchmarks/serve.py [--model FOLDER] [--clients 32] [--requests 128]
        [--peer mlx_vlm] [--peer mlx_lm] [--text-only]

Each client asks, reads the stream and asks again. Half of the requests carry a picture (none with
--text-only), half begin with one long text that they share. The servers run one after another, each
in its own process, and are warmed by one request of each kind. Told: requests a second, time to the
first token of text (median, 95th percentile), failures.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED = "You look at pictures of shapes and say what they show, one after another. " * 12
COMMANDS = {
    "ours": ["mlx_vlm_pipes.serve"], "mlx_vlm": ["mlx_vlm.server"], "mlx_lm": ["mlx_lm", "server"]
}  # fmt: skip
START_S, ANSWER_S = 90, 300


def picture(number: int) -> str:
    """A data URL; each number has its own colour."""
    data = io.BytesIO()
    Image.new("RGB", (256, 256), (number * 37 % 256, number * 91 % 256, 128)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def request_body(number: int, model: str, tokens: int, *, text_only: bool) -> dict[str, Any]:
    """Pictures and texts in turn; two of four begin alike."""
    text = f"{SHARED if number % 4 < 2 else ''}Question {number}: what is there?"
    content: Any = text
    if number % 2 and not text_only:
        url = {"type": "image_url", "image_url": {"url": picture(number)}}
        content = [url, {"type": "text", "text": text}]
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "stream": True,
        "max_tokens": tokens, "temperature": 0.0,
    }  # fmt: skip


def time_to_first(port: int, body: dict[str, Any]) -> float:
    """Seconds until the first text. Raises: OSError, HTTPException and RuntimeError."""
    begun, first = time.perf_counter(), None
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)) as connection:
        head = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), head)
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {reply.read(200)!r}")
        for line in reply:
            if first is None and _text(line):
                first = time.perf_counter() - begun
    if first is None:
        raise RuntimeError("no text came")
    return first


def _text(line: bytes) -> str:
    if not line.startswith(b"data: {"):
        return ""
    choices = json.loads(line[6:]).get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


@contextmanager
def running(name: str, model: str) -> Iterator[int]:
    """The port of a server. Raises: RuntimeError where it does not start."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *COMMANDS[name], "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--model", model], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + START_S
        while not _is_well(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("it does not start")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _is_well(port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


def measured(port: int, args: argparse.Namespace) -> str:
    """One line of figures."""
    numbers, lock = itertools.count(), threading.Lock()
    times: list[float] = []
    failures: list[str] = []

    def ask_on(_: int) -> None:
        while (number := next(numbers)) < args.requests:
            body = request_body(number, args.model, args.tokens, text_only=args.text_only)
            try:
                took = time_to_first(port, body)
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                with lock:
                    failures.append(str(error)[:80])
            else:
                with lock:
                    times.append(took)

    for number in range(4):
        body = request_body(number, args.model, args.tokens, text_only=args.text_only)
        time_to_first(port, body)
    begun = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(ask_on, range(args.clients)))
    seconds = time.perf_counter() - begun
    if len(times) < 2:
        return f"all failed: {failures[:1]}"
    late = statistics.quantiles(times, n=20)[-1]
    return (
        f"{len(times) / seconds:6.2f} requests/s, first token {statistics.median(times):.2f} s "
        f"(95 %: {late:.2f} s), {len(failures)} failed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--text-only", action="store_true")
    parser.add_argument("--peer", action="append", choices=["mlx_vlm", "mlx_lm"], default=[])
    args = parser.parse_args()
    for name in ["ours", *args.peer]:
        try:
            with running(name, args.model) as port:
                line = measured(port, args)
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            line = f"not measured: {error}"
        print(f"{name:8} {line}", flush=True)


if __name__ == "__main__":
    main()
