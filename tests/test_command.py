"""How every command ends."""

import argparse
import os
import subprocess
import sys

import pytest

from mlx_vlm_pipes.command import new_parser, run_command
from mlx_vlm_pipes.errors import InputError


def parser() -> argparse.ArgumentParser:
    return new_parser("x", description="", epilog="")


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (InputError("first line\n  and second"), 2, "error: first line and second\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_status(
    raised: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise raised

    assert run_command(parser, fail, []) == status
    assert capsys.readouterr() == ("", line)
    assert run_command(fail, lambda args: 0, []) == status  # it takes a while to build
    assert capsys.readouterr() == ("", line)


def test_what_is_no_mistake_of_the_user_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(parser, lambda args: 1 // 0, [])


SCRIPT = """
import sys
from mlx_vlm_pipes.command import new_parser, put, put_json, run_command, say
def run(args):
    say("begun")
    if args.json: put_json({"text": "caf\\u00e9 \\u4e2d"})
    else: [put("caf\\u00e9 \\u4e2d\\n") for i in range(30000)]
    return 0
parser = new_parser("x", description="long", epilog="")
parser.add_argument("--json", action="store_true")
sys.exit(run_command(lambda: parser, run, None))
"""


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command line of bash in which CMD is a command with much to say."""
    environment = {**os.environ, "SCRIPT": SCRIPT, "PYTHONUNBUFFERED": "", **environment}
    return subprocess.run(
        ["bash", "-c", f'CMD() {{ "{sys.executable}" -c "$SCRIPT" "$@"; }}; {line}'],
        env=environment,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("CMD | head -1 > /dev/null; exit ${PIPESTATUS[0]}", 141, "begun\n"),
        ("(sleep 0.3; CMD --help) | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("CMD > /dev/full", 2, "begun\nerror: the output cannot be written: No space left"),
        ("CMD --help > /dev/full", 2, "error: the output cannot be written: No space left"),
        ("CMD >&-", 2, "begun\nerror: the output cannot be written: standard output is closed"),
        ("CMD 2>&-", 0, ""),
        ("CMD 2> /dev/full", 0, ""),
        ("CMD <&-", 0, "begun\n"),
    ],
)
def test_output_that_nobody_takes(line: str, status: int, error: str) -> None:
    done = shell(line)
    assert done.returncode == status
    assert done.stderr.decode().startswith(error)
    assert len(done.stderr.splitlines()) == len(error.splitlines())


@pytest.mark.parametrize(
    ("encoding", "text", "json"),
    [
        ("utf-8", "café 中".encode(), '{"text": "café 中"}'.encode()),
        ("latin-1", b"caf\xe9 ?", b'{"text": "caf\\u00e9 \\u4e2d"}'),
        ("ascii", b"caf? ?", b'{"text": "caf\\u00e9 \\u4e2d"}'),
    ],
)
def test_poor_terminals(encoding: str, text: bytes, json: bytes) -> None:
    done = shell("CMD", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, text)
    done = shell("CMD --json", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, json + b"\n")


def test_descriptors_of_closed_streams_go_to_no_file() -> None:
    script = SCRIPT.replace("return 0", "return open('/dev/null').fileno()")
    assert shell("CMD --json <&- 2>&-", SCRIPT=script).returncode >= 3
