"""A compiler that cannot compile, and nowhere to put what it makes: decoding goes on without."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tests.fixtures_helper import FIXTURES

pytestmark = pytest.mark.skipif(
    mx.default_device().type == mx.DeviceType.gpu, reason="a GPU needs no compiler of the host"
)
ANSWER = [
    sys.executable, "-m", "mlx_vlm_pipes.generate", "--model", str(FIXTURES / "llama-stop"),
    "--prompt", "hi", "--max-tokens", "3", "--quiet",
]  # fmt: skip
LYING = "#!/bin/sh\ncase $* in *--version*) echo 12;; *) echo 'no cmath' >&2; exit 1;; esac\n"


def answer(**environment: str) -> tuple[str, str]:
    done = subprocess.run(
        ANSWER, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_decoding_goes_on_uncompiled_and_says_so_once(tmp_path: Path) -> None:
    expected, silent = answer()
    assert silent == ""
    lying = tmp_path / "bin" / "g++"
    lying.parent.mkdir()
    lying.write_text(LYING)
    lying.chmod(0o755)
    path = f"{lying.parent}:{os.environ['PATH']}"
    for environment, reason in (
        ({"PATH": path}, "no cmath"),
        ({"TMPDIR": str(tmp_path / "gone")}, "temp_directory_path"),
        ({"TMPDIR": "/proc"}, "cannot create directories"),
    ):
        text, error = answer(**environment)
        assert text == expected
        assert error.startswith("warning: MLX cannot compile on this CPU (")
        assert reason in error
        assert len(error.splitlines()) == 1


def test_without_a_compiler_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert answer(PATH=str(tmp_path)) == answer()
