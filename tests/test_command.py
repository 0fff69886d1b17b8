"""How every command ends."""

import argparse

import pytest

from mlx_vlm_pipes.command import new_parser, run_command
from mlx_vlm_pipes.errors import InputError


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
    def run(args: argparse.Namespace) -> int:
        raise raised

    assert run_command(new_parser("x", description="", epilog=""), run, []) == status
    assert capsys.readouterr() == ("", line)


def test_what_is_no_mistake_of_the_user_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(new_parser("x", description="", epilog=""), lambda args: 1 // 0, [])
