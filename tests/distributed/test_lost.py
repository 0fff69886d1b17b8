"""A rank that dies or stands still takes the others with it, in time, and nothing stays behind."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from mlx_vlm_pipes.command import RANK_LOST
from tests.distributed.started import Started
from tests.fixtures_helper import FIXTURES

HANDLES = {"idle": 0, "prefill": 3, "answer": 3}


def longer_llama(folder: Path) -> Path:
    """A fixture that takes prompts and answers which last longer than the test."""
    shutil.copytree(FIXTURES / "llama-sharded", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", range(3))
def test_one_of_three_takes_both_others_with_it(
    rank: int, how: signal.Signals, tmp_path: Path
) -> None:
    arguments = ["-m", "tests.distributed.lost", str(longer_llama(tmp_path / "model")), "answer"]
    with Started(3, arguments, tmp_path) as ranks:
        ranks.wait_for("answer")
        ranks.processes[rank].send_signal(how)
        others = [process for i, process in enumerate(ranks.processes) if i != rank]
        assert [other.wait(timeout=15) for other in others] == [RANK_LOST] * 2
        if rank:
            assert ranks.out(0).count(f"rank {rank} has ") == HANDLES["answer"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", HANDLES)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_that_is_asked_fails_in_time(
    rank: int, how: signal.Signals, moment: str, tmp_path: Path
) -> None:
    arguments = ["-m", "tests.distributed.lost", str(longer_llama(tmp_path / "model")), moment]
    with Started(2, arguments, tmp_path) as ranks:
        ranks.wait_for(moment)
        time.sleep(0.3)
        lost, other = ranks.processes[rank], ranks.processes[1 - rank]
        lost.send_signal(how)
        begun = time.monotonic()
        if rank == 1:
            ranks.wait_for("lost:")
            assert time.monotonic() - begun < 10
        assert other.wait(timeout=15) == RANK_LOST
        if rank == 1:
            said = ranks.out(0).split("lost:\n")[1].splitlines()
            assert len(said) == HANDLES[moment] + 1
            assert all(line.startswith("rank 1 has ") for line in said)
