"""A server under load beside those of mlx-vlm and mlx-lm, on one checkpoint.

    python benchmarks/serve.py [--vision FOLDER] [--text FOLDER] [--only PART] [--rounds 3]
        [--clients 32] [--requests 64] [--tokens 32]

Two parts. Pictures and text on a vision checkpoint (the bundled one), beside mlx-vlm as it comes
and with its prefix cache (APC_ENABLED=1); text alone on a language model (not run without --text),
beside mlx-lm. Half of the requests of either begin with one long system message; every picture is
another one. Each client asks, reads the stream and asks again; nothing is asked twice.

All sides compute in float32 on a copy of the checkpoint in which no answer ends by itself, so
that greedy ones are equally long. Every server is a process of its own, warmed up; rounds are
interleaved, each beginning with another side. Only requests that all sides answered in full count.
Told, as medians of rounds: seconds for a request (the round's, by its requests), time to the first
text (median, 95th percentile), tokens a second, and in how many answers the text is ours.
"""

from __future__ import annotations

import argparse
import base64
import ctypes.util
import http.client
import io
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import mlx.core as mx
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHARED = "You look at pictures of shapes and say what they show, one after another. " * 12
START_S, ANSWER_S, RETRY_S = 120, 300, 0.05
BUNDLED = Path(__file__).parents[1] / "mlx_vlm_pipes" / "assets" / "tiny-idefics3"
OURS = "ours"


@dataclass(frozen=True)
class Side:
    """A server. module: what `python -m` runs; environment: beside the process's own."""

    name: str
    module: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


SIDES = {
    side.name: side
    for side in (
        Side(OURS, ("mlx_vlm_pipes.serve",)),
        Side("mlx_vlm", ("mlx_vlm.server",)),
        Side("mlx_vlm, APC", ("mlx_vlm.server",), {"APC_ENABLED": "1"}),
        Side("mlx_lm", ("mlx_lm", "server")),
    )
}
PEERS = {"vision": ("mlx_vlm", "mlx_vlm, APC"), "text": ("mlx_lm",)}


@dataclass(frozen=True)
class Answer:
    """first_s: seconds until the first text; tokens: as the server counted them."""

    text: str
    tokens: int
    first_s: float


@dataclass
class Round:
    """What one side did in one round: answers by the request's number."""

    seconds: float
    answers: dict[int, Answer]
    failures: Counter[str]


@dataclass(frozen=True)
class Figures:
    """Of one round and one side. Seconds, but for tokens_per_s and same (a share)."""

    per_request: float
    first: float
    first_95: float
    tokens_per_s: float
    same: float


# ---- what is asked


def picture(number: int) -> str:
    """A data URL; each number has a rectangle of its own colour and place."""
    image = Image.new("RGB", (256, 256), (number * 37 % 256, number * 91 % 256, 128))
    left, top = number % 97, number % 89
    ImageDraw.Draw(image).rectangle((left, top, left + 90, top + 60), fill=(number % 256, 200, 20))
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def request_body(number: int, model: str, tokens: int, *, pictures: bool) -> dict[str, Any]:
    """Pictures and texts in turn; two of four begin alike."""
    content: Any = f"Question {number}: what is there?"
    if number % 2 and pictures:
        url = {"type": "image_url", "image_url": {"url": picture(number)}}
        content = [url, {"type": "text", "text": content}]
    messages = [{"role": "user", "content": content}]
    if number % 4 < 2:
        messages.insert(0, {"role": "system", "content": SHARED})
    return {
        "model": model, "messages": messages, "stream": True, "max_tokens": tokens,
        "temperature": 0.0, "stream_options": {"include_usage": True},
    }  # fmt: skip


def ask(port: int, body: bytes) -> Answer:
    """Its time runs from the first try: mlx-lm's server listens with a queue of five, and of a
    burst the others are reset before they are heard.

    Raises: OSError, HTTPException, and RuntimeError with what the server said.
    """
    begun = time.perf_counter()
    while True:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)) as connection:
            try:
                connection.request(
                    "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
                )
                reply = connection.getresponse()
            except (ConnectionResetError, ConnectionRefusedError, BrokenPipeError):
                if time.perf_counter() - begun > ANSWER_S:
                    raise
                time.sleep(RETRY_S)
                continue
            return _read(reply, begun)


def _read(reply: http.client.HTTPResponse, begun: float) -> Answer:
    """A stream to its end. Raises: as `ask`."""
    first, text, used = None, [], 0
    if reply.status != 200:
        raise RuntimeError(f"HTTP {reply.status}: {reply.read(160)!r}")
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(f"in the stream: {str(event['error'])[:160]}")
        for choice in event.get("choices") or ():
            piece = choice.get("delta", {}).get("content") or ""
            first = time.perf_counter() - begun if first is None and piece else first
            text.append(piece)
        used = (event.get("usage") or {}).get("completion_tokens") or used
    if first is None:
        raise RuntimeError("no text came")
    return Answer("".join(text).strip(), used, first)


def ask_all(port: int, bodies: dict[int, bytes], clients: int, tokens: int) -> Round:
    """A round of one side."""
    answers: dict[int, Answer] = {}
    failures: Counter[str] = Counter()
    lock, left = threading.Lock(), iter(list(bodies.items()))

    def ask_on(_: int) -> None:
        while True:
            with lock:
                number, body = next(left, (None, b""))
            if number is None:
                return
            try:
                answer = ask(port, body)
                if answer.tokens != tokens:
                    raise RuntimeError(f"{answer.tokens} tokens instead of {tokens}")
            except (OSError, ValueError, http.client.HTTPException, RuntimeError) as error:
                with lock:
                    failures[f"{type(error).__name__}: {str(error)[:200]}"] += 1
            else:
                with lock:
                    answers[number] = answer

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask_on, range(clients)))
    seconds = time.perf_counter() - begun
    print(f"  {len(answers)} of {len(bodies)} in {seconds:.1f} s", file=sys.stderr, flush=True)
    return Round(seconds, answers, failures)


# ---- who is asked


def endless(source: Path, target: Path) -> Path:
    """A copy of a checkpoint in float32 in which the end tokens' logits are always 0.

    Another end token in its files would not do: mlx-vlm has some of its own by family.
    """
    options = ["--model", str(source), "--out", str(target), "--dtype", "float32"]
    command = [sys.executable, "-m", "mlx_vlm_pipes.convert", *options]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment()})
    tokenizer = AutoTokenizer.from_pretrained(target)
    file = target / "model.safetensors"
    weights: Any = mx.load(str(file))
    head = next((n for n in weights if n.endswith("lm_head.weight")), None)
    head = head or next(n for n in weights if n.endswith("embed_tokens.weight"))  # tied
    weights[head][mx.array(sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}))] = 0.0
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    return target


def environment() -> dict[str, str]:
    """What all servers run in; OpenBLAS, where it is installed, in place of MLX's slow own BLAS."""
    root = str(Path(__file__).parents[1])
    common = {"HF_HUB_OFFLINE": "1", "MLX_ENABLE_TF32": "0", "TOKENIZERS_PARALLELISM": "false",
              "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    blas = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    return common | ({"LD_PRELOAD": blas, "OPENBLAS_NUM_THREADS": "1"} if blas else {})


@contextmanager
def running(side: Side, model: Path, log: IO[bytes]) -> Iterator[int]:
    """The port of a server. Raises: RuntimeError where it does not start."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *side.module, "--port", str(port), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--model", str(model)], stdout=log, stderr=log,
        env={**os.environ, **environment(), **side.environment},
    )  # fmt: skip
    try:
        end = time.monotonic() + START_S
        while not _is_well(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{side.name} does not start: {_tail(log)}")
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


def _tail(log: IO[bytes]) -> str:
    return Path(log.name).read_text(errors="replace")[-300:]


# ---- what it comes to


def run_part(kind: str, source: Path, args: argparse.Namespace) -> None:
    """Start all sides of a part, run its rounds and print its table."""
    names = [OURS, *PEERS[kind]]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = endless(source, scratch / source.name)
        ports = {}
        for name in names:
            log = stack.enter_context((scratch / f"{name}.log").open("wb"))
            ports[name] = stack.enter_context(running(SIDES[name], model, log))
        numbers = itertools.count()

        def bodies(count: int) -> dict[int, bytes]:
            chosen = list(itertools.islice(numbers, count))
            made = [request_body(n, str(model), args.tokens, pictures=kind == "vision")
                    for n in chosen]  # fmt: skip
            return {n: json.dumps(body).encode() for n, body in zip(chosen, made, strict=True)}

        warm = bodies(args.clients)
        for port in ports.values():
            ask_all(port, warm, args.clients, args.tokens)
        rounds: list[dict[str, Round]] = []
        for i in range(args.rounds):
            asked, order = bodies(args.requests), names[i % len(names) :] + names
            rounds.append({
                name: ask_all(ports[name], asked, args.clients, args.tokens)
                for name in order[: len(names)]
            })  # fmt: skip
    print(f"{kind}: {source.name}, {args.clients} clients, {args.requests} requests a round, "
          f"{args.tokens} tokens each, {args.rounds} rounds")  # fmt: skip
    print_table(names, rounds)


def print_table(names: Sequence[str], rounds: Sequence[dict[str, Round]]) -> None:
    """A line a side, then ours as a share of the better peer's time."""
    told = {name: [figures(each, name) for each in rounds] for name in names}
    columns = ("per_request", "first", "first_95", "tokens_per_s", "same")
    heads = ("s a request", "first text s", "95 %", "tokens/s", "same text")
    print(f"{'':14}" + "".join(f"{head:>14}" for head in heads) + f"{'failed':>8}")
    median: dict[str, dict[str, float]] = {}
    for name in names:
        median[name] = {c: statistics.median(getattr(f, c) for f in told[name]) for c in columns}
        failed = sum(each[name].failures.total() for each in rounds)
        cells = [f"{median[name][c]:14.3f}" for c in columns[:3]]
        cells += [f"{median[name]['tokens_per_s']:14.0f}", f"{median[name]['same']:14.2f}"]
        print(f"{name:14}" + "".join(cells) + f"{failed:8}")
    ratios = [
        median[OURS][c] / min(median[peer][c] for peer in names[1:]) for c in columns[:3]
    ]  # fmt: skip
    print(f"{'ratio':14}" + "".join(f"{ratio:14.2f}" for ratio in ratios) + "  (bar 0.70)")
    for name in names:
        for reason, count in sum((r[name].failures for r in rounds), Counter()).items():
            print(f"  {name}: {count} x {reason}")


def figures(sides: dict[str, Round], name: str) -> Figures:
    """Of the requests that all sides answered."""
    common = set.intersection(*(set(each.answers) for each in sides.values()))
    if len(common) < 2:
        raise SystemExit(f"nothing to compare: {[each.failures for each in sides.values()]}")
    own = {n: answer for n, answer in sides[name].answers.items() if n in common}
    firsts = [answer.first_s for answer in own.values()]
    same = sum(answer.text == sides[OURS].answers[n].text for n, answer in own.items())
    seconds = sides[name].seconds
    return Figures(
        seconds / len(own),
        statistics.median(firsts),
        statistics.quantiles(firsts, n=20)[-1],
        sum(answer.tokens for answer in own.values()) / seconds,
        same / len(own),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vision", type=Path, default=BUNDLED, help="folder of a checkpoint")
    parser.add_argument("--text", type=Path, help="folder of a language model")
    parser.add_argument("--only", choices=list(PEERS))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for kind, source in (("vision", args.vision), ("text", args.text)):
        if source is not None and args.only in (None, kind):
            run_part(kind, source, args)


if __name__ == "__main__":
    main()
