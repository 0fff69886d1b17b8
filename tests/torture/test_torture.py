"""A small part of each section, and whether the machine tells what fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import __main__ as command
from tests.torture.values import Section


@pytest.mark.slow
@pytest.mark.parametrize("name", command.SECTIONS)
def test_a_small_part_holds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main([name, "--small", "--seed", "0"])
    assert status == 0, capsys.readouterr().out


@pytest.mark.slow
def test_every_kind_of_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "SECTIONS", ("failing",))
    assert command.main(["failing", "--seed", "3"]) == 1
    *failed, summary = capsys.readouterr().out.splitlines()
    assert summary.startswith("failing: 2 of 7 cases held, ")
    for line, words in zip(
        failed,
        ("raises: IndexError", "is taken: Broken: taken", "hangs", "ended with 7", "ended with -9"),
        strict=True,
    ):
        assert words in line
    assert failed[0].endswith("; python -m tests.torture failing --seed 3 --case 1")
    assert command.main(["failing", "--case", "1"]) == 1
    assert command.main(["failing", "--case", "6"]) == 0


def test_a_seed_draws_the_same_cases() -> None:
    sections = [Section(seed, Path()) for seed in (1, 1, 2)]
    drawn = [[each.draw(i).about for i in range(50)] for each in sections]
    assert drawn[0] == drawn[1] != drawn[2]
