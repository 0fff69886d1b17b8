"""The chat command: typed at a real terminal, and lines from a pipe."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mlx_vlm_pipes import chat

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "examples" / "images" / "shapes.png"
WANTED = "a large red circle above a small blue square"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lines typed are kept."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def piped(text: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return chat.main(["--quiet", *arguments])


def test_each_line_of_a_pipe_is_a_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "talk 1.json"
    lines = [
        f"{SHAPES} Describe the picture.",
        "And \\",
        "now?",
        "/stats",
        "/undo",
        f"/save {saved}",
        '"""Describe',
        'the picture."""',
    ]
    assert piped("\n".join(lines), monkeypatch) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], len(out.splitlines())) == (WANTED, 3)
    said = err.splitlines()
    assert said[0] == "shapes.png: 256x256, 16 tokens"
    assert re.fullmatch(r"prompt: \d+ tokens \(16 image, 40 cached\), .* tokens/s", said[1])
    assert re.fullmatch(r"conversation of 2 turns, 1 picture, \d+ of 2048 tokens", said[3])
    assert said[4:] == [
        "taken back: And now?",
        f"conversation of 1 turn, 1 picture saved in {saved}",
    ]
    stored = json.loads(saved.read_text())["messages"]
    assert stored[0]["content"][0] == {"type": "image", "image": str(SHAPES)}
    assert piped("/retry", monkeypatch, "--load", str(saved)) == 0
    assert capsys.readouterr().out == f"{WANTED}\n"
    assert piped("/system", monkeypatch, "--load", str(saved), "--system", "Be brief.") == 0
    assert capsys.readouterr().err.splitlines()[-1] == "system: Be brief."


def test_what_was_seen_is_written_before_and_after_the_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, then = tmp_path / "first.png", tmp_path / "then.png"
    lines = [f"/image {SHAPES}", f"/show {first}", "Describe it.", f"/show {then}", "/show a.txt"]
    assert piped("\n".join(lines), monkeypatch) == 2  # the last is no picture
    assert Image.open(first).size == Image.open(then).size > (300, 300)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/imgae x.png", "no command /imgae; did you mean /image?"),
        ("/image", "/image needs a path or a URL"),
        ("/image no.png and this", "'no.png': no such file"),
        ("/no/such/cat.png What is it?", "'/no/such/cat.png': no such file"),
        (f"/image {__file__} What?", "cannot be read as a picture"),
        (f"/video {SHAPES}", "not made for video"),
        ("/undo", "nothing to take back"),
        ("/show a.png", "no picture to show; /image PATH gives one"),
        ("/show", "which file? /show FILE.png"),
        ("/retry", "nothing to answer"),
        ("/save", "which file?"),
        ("/load /no/such.json", "cannot be read"),
        ("word " * 100, "longer than the 64 tokens that fit; /undo"),
        (f"{SHAPES} " + "word " * 100, "/reset begins anew, --max-length can be larger"),
    ],
)
def test_a_mistake_is_one_line_and_it_goes_on(
    line: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert piped(f"{line}\nHello", monkeypatch, "--max-length", "64", "--max-tokens", "1") == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1  # the answer to Hello, without the picture
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]


def test_a_conversation_leaves_its_cache_for_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved, cache = tmp_path / "talk.json", tmp_path / "talk.prefix"
    arguments = ["--prompt-cache", str(cache)]
    asked = f"{SHAPES} Describe the picture.\n/save {saved}"
    assert piped("/help", monkeypatch, *arguments) == 0
    assert not cache.exists()  # nothing was said
    assert piped(asked, monkeypatch, *arguments) == 0
    capsys.readouterr()
    lines = "What color is the circle?\n/stats"
    assert piped(lines, monkeypatch, *arguments, "--load", str(saved)) == 0
    out, err = capsys.readouterr()
    assert out.strip() == "red"
    assert "54 tokens (16 image, 41 cached)" in err
    assert piped("Who?", monkeypatch, "--kv-bits", "8", *arguments, "--max-tokens", "2") == 0
    assert piped("Who?\n/stats", monkeypatch, "--kv-bits", "8", *arguments) == 0
    assert "cached)" in capsys.readouterr().err  # it was written anew, for 8 bits
    cache.write_text("mine")
    assert piped("Who?", monkeypatch, *arguments) == 2
    assert cache.read_text() == "mine"


def test_ctrl_c_ends_lines_from_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[str] = []

    def interrupted_at_third(text: str) -> None:
        words.append(text)
        if len(words) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("mlx_vlm_pipes.dialogue.session.put", interrupted_at_third)
    assert piped(f"{SHAPES} Describe the picture.\nAnd now?", monkeypatch) == 130
    assert (words[0], words[3:]) == ("a", ["\n"])
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_wrong_arguments_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--image", "/no.png"], ["--load", __file__], ["--temperature", "-1"]):
        assert piped("Hello", monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)


ENDED = "\0"  # no screen has it


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._screen, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_vlm_pipes.chat", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=ROOT,
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def interrupt(self, words: str) -> None:
        """Ctrl-C, until these words come: between two reads the line editor misses a signal."""
        for _ in range(6):
            self.process.send_signal(signal.SIGINT)
            if self._read(words, 10):
                return
        raise AssertionError(self.text)

    def wait_for(self, words: str) -> str:
        """What came since the last wait, up to these words."""
        assert self._read(words, 60), self.text
        before, _, self.text = self.text.partition(words)
        return before + words

    def _read(self, words: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while words not in self.text:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._screen], [], [], left)[0]:
                return False
            try:
                read = os.read(self._screen, 4096).decode()
            except OSError:  # Linux's way of saying that the other end is closed
                read = ""
            if not read:
                return self.process.wait(60) is not None and words == ENDED
            self.text += read
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        os.close(self._screen)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal("--max-tokens", "1900", "--ignore-eos")
    yield terminal
    terminal.close()


def test_at_a_terminal(terminal: Terminal, state: Path) -> None:
    assert re.search(r"float32, [cg]pu; holds 2048 tokens", terminal.wait_for("> "))
    terminal.type(f"'{SHAPES}' \r")
    terminal.wait_for("[1 picture] > ")
    terminal.type("Describe the picture.\r")
    terminal.wait_for("a large red circle")
    terminal.interrupt("stopped; the answer is kept as far as it came")
    terminal.wait_for("\n> ")
    terminal.type("/hist\t\r")
    terminal.wait_for("> [picture] Describe the picture.\r\na large red circle")
    terminal.wait_for("\n> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    terminal.interrupt("Ctrl-C once more")
    terminal.wait_for("\n> ")
    terminal.type("\x1b[A\r")  # the arrow brings /history back
    terminal.wait_for("a large red circle")
    terminal.wait_for("\n> ")
    terminal.interrupt("Ctrl-C once more")
    terminal.interrupt(ENDED)
    assert terminal.process.returncode == 130
    kept = state / "mlx_vlm_pipes" / "chat_history"
    assert kept.read_text().splitlines()[-2:] == ["Describe the picture.", "/history "]
    assert kept.stat().st_mode & 0o077 == 0


def test_a_python_without_line_editing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_vlm_pipes.dialogue.lines import Lines

    ours, theirs = pty.openpty()
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys, "stdin", open(theirs, encoding="utf-8"))  # noqa: SIM115
    os.write(ours, b"one\n\x04")
    with Lines([]) as lines:
        assert lines.is_terminal
        assert lines.read("> ") == "one"
        assert lines.read("> ") is None
    sys.stdin.close()
    os.close(ours)
