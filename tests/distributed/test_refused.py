"""Ranks that cannot run one model say so, each in one line, and end."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from mlx_vlm_pipes.command import RANK_LOST, USER_MISTAKE
from tests.distributed.started import Started

SAID = {
    "kv_bits": "kv_bits: rank 1 has 8, rank 0 None",
    "version": "mlx_vlm_pipes: rank 1 has '0.0.1'",
    "config": "config.json: rank 1 has",
    "weights": "weight files: rank 1 has",
    "missing": "rank 1: no model at",
    "secret": "MLX_VLM_PIPES_SECRET",
    "no secret": "MLX_VLM_PIPES_SECRET",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SAID)
def test_one_line_on_every_rank(how: str, tmp_path: Path) -> None:
    with Started(2, ["-m", "tests.distributed.differing", how, str(tmp_path)], tmp_path) as ranks:
        assert ranks.ends(60) == [USER_MISTAKE] * 2, ranks.err(0) + ranks.err(1)
        for rank in range(2):
            (line,) = ranks.err(rank).splitlines()
            assert line.startswith("error: ")
            assert SAID[how] in line or (how == "no secret" and "could not join" in line)
            assert ranks.out(rank) == ""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_lost_while_weights_are_read(how: signal.Signals, tmp_path: Path) -> None:
    arguments = ["-m", "tests.distributed.differing", "loading", str(tmp_path)]
    with Started(2, arguments, tmp_path) as ranks:
        ranks.wait_for("loading")
        begun = time.monotonic()
        ranks.processes[1].send_signal(how)
        assert ranks.processes[0].wait(15) == RANK_LOST
        assert time.monotonic() - begun < 10
        assert "error: rank 1 has " in ranks.err(0)
