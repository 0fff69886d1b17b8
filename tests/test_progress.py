"""Bars: what a terminal shows, what is left of them, and who shows none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_pipes import load, progress
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.progress import Work, bar, hidden, is_wanted
from mlx_vlm_pipes.registry import find_room
from tests.engine.driving import IDEFICS3, LLAMA, Driven, fixture_requests

ROOT = Path(__file__).parent.parent
COMMANDS = """
from mlx_vlm_pipes import load, progress
from mlx_vlm_pipes.generate import main
progress.DELAY_S = 0
ask = ["--image", "examples/images/shapes.png", "--prompt", "Describe the picture."]
main(ask)
print("=====", flush=True)
main([*ask, "--json"])
main([*ask, "--quiet"])
print("=====", flush=True)
with load() as pipe:
    pipe.generate_batch(["Hello", "What is this?"], max_tokens=2)
"""


class Recorder:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.is_closed = False

    def note(self, work: Work) -> None:
        assert not self.is_closed
        self.works.append(work)

    def wait(self) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        self.is_closed = True

    def told(self, what: str) -> list[tuple[int, int]]:
        return [(work.done, work.total) for work in self.works if work.what == what]


def on_a_terminal(code: str, **variables: str) -> str:
    """All that a Python program writes to a terminal of 80 columns."""
    main_end, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    read: list[bytes] = []

    def collect() -> None:
        try:
            while data := os.read(main_end, 65536):
                read.append(data)
        except OSError:  # how Linux says that nobody writes any more
            return

    thread = threading.Thread(target=collect)
    thread.start()
    subprocess.run(
        [sys.executable, "-c", code], stdin=end, stdout=end, stderr=end, check=True, cwd=ROOT,
        env={**kept, "TERM": "xterm", **variables},
    )  # fmt: skip
    os.close(end)
    thread.join()
    os.close(main_end)
    return b"".join(read).decode()


def screen(text: str) -> list[str]:
    """The lines that are left on it: a carriage return goes back, what follows writes over."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|[\r\n]|[^\r\n\x1b]+", text):
        line = lines[-1]
        if part == "\n":
            lines.append("")
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            lines[-1] = line[:column]
        else:
            lines[-1] = line[:column].ljust(column) + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_bars_are_shown_on_a_terminal_and_gone_with_the_answer() -> None:
    """And never where programs read: --json, --quiet."""
    plain, read, batch = on_a_terminal(COMMANDS).split("=====")
    assert re.search(r"loading weights: +\d+%.*B/5\.\d+MB", plain)
    assert "reading the prompt:   0%" in plain
    assert not re.search(r"\x1b|%\|", plain.partition("a large")[2])
    left = screen(plain)
    assert [line.partition(" ")[0] for line in left] == ["using", "a", "prompt:", "answer:", ""]
    assert max(len(part) for part in plain.split("\r") if "%|" in part) <= 76
    assert "%|" not in read
    assert [line[:2] for line in screen(read)] == ["", "us", '{"', "a ", ""]
    assert "answering:   0%" in batch
    assert screen(batch) == ["", ""]


def test_no_bar_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert not is_wanted(None)  # the suite's standard error is no terminal
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert is_wanted(None)
    assert not is_wanted(False)
    with hidden():
        assert not is_wanted(None)
        assert is_wanted(True)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not is_wanted(True)


def test_what_is_soon_done_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar is made when work has lasted a while, one at a time, and none behind the end."""
    made: list[Any] = []

    class Line:
        disable = True

        def __init__(self, work: Work) -> None:
            made.append(self)
            self.work, self.n, self.is_closed = work, 0, False

        def refresh(self) -> None:
            assert not self.is_closed

        def close(self) -> None:
            self.is_closed = True

    now = [0.0]
    monkeypatch.setattr(progress, "_new_bar", Line)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with bar(is_on=True) as watch, bar(is_on=True) as other:
        assert watch is not None
        assert other is not None
        watch.note(Work("first", 0, 4, "picture"))
        now[0] += 0.4
        watch.note(Work("first", 1, 4, "picture"))
        assert not made
        watch.note(Work("second", 0, 4, "token"))
        now[0] += 0.4
        watch.wait()
        assert not made
        now[0] += 0.2
        watch.wait()
        watch.note(Work("second", 1, 4, "token"))  # too soon to be drawn again
        assert made[0].n == 0
        now[0] += 0.2
        watch.note(Work("second", 3, 4, "token"))
        assert [(line.work.what, line.n) for line in made] == [("second", 3)]
        other.note(Work("third", 0, 1, "B"))
        now[0] += 9
        other.note(Work("third", 1, 1, "B"))
        assert len(made) == 1
    assert made[0].is_closed
    watch.note(Work("late", 0, 1, "B"))
    now[0] += 9
    watch.wait()
    assert len(made) == 1


def test_the_engine_tells_how_far_a_prompt_has_come() -> None:
    """Slice by slice, and nothing once the first token is out."""
    driven = Driven(LLAMA, EngineConfig(prefill_chunk=64))
    told = Recorder()
    handle = driven.submit("x " * 150, max_tokens=3, ignore_eos=True)
    handle.watch = told
    driven.finish()
    assert handle.next_chunk() is not None
    total = told.works[0].total
    assert total > 150
    assert told.told("reading the prompt") == [(done, total) for done in range(0, total, 64)]
    assert told.is_closed
    assert handle.watch is None


def test_pictures_are_told_of_as_they_are_read_and_encoded() -> None:
    request = next(r for r in fixture_requests(IDEFICS3).values() if len(r["images"]) > 1)
    driven = Driven(IDEFICS3, EngineConfig(image_batch=1))
    told, count = Recorder(), len(request["images"])
    with load(IDEFICS3) as pipe:
        asked = PromptRequest(request["prompt"], tuple(request["images"]))
        processed = pipe.processor.process(asked, told)
    assert told.told("reading pictures") == [(i, count) for i in range(count)]
    handle = driven.submit(request["prompt"], request["images"], max_tokens=1)
    handle.watch = told
    driven.finish()
    assert handle.next_chunk() is not None
    encoded = told.told("encoding pictures")
    assert encoded == [(i, len(processed.images)) for i in range(len(processed.images))]


def test_a_request_that_is_given_up_leaves_no_bar() -> None:
    driven = Driven(LLAMA)
    told = Recorder()
    handle = driven.submit("x " * 20, max_tokens=3)
    handle.watch = told
    handle.close()
    assert told.is_closed


def test_weights_are_told_of_as_they_are_read() -> None:
    told = Recorder()
    with load(LLAMA, dtype="float32") as pipe:
        nbytes = pipe.model.weight_bytes
    config = read_config(LLAMA)
    load_model(find_room(config), LLAMA, config, LoadOptions(dtype="float32"), told)
    steps = told.told("loading weights")
    assert steps[-1] == (nbytes, nbytes)
    assert steps == sorted(steps)
    assert len(steps) > 10
