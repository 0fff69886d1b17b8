"""Several processes answer as one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_vlm_pipes import load
from tests.distributed.answers import answers
from tests.distributed.started import Started
from tests.fixtures_helper import FIXTURES


def test_two_ranks_answer_as_one_process(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with Started(2, ["-m", "tests.distributed.answers", str(report)], tmp_path) as ranks:
        with load(device="cpu") as pipe:
            alone = answers(pipe)
        assert ranks.ends(60) == [0, 0], ranks.err(0) + ranks.err(1)
        assert [ranks.out(rank) + ranks.err(rank) for rank in range(2)] == ["", ""]
    found = json.loads(report.read_text())
    assert found.pop("logits") == pytest.approx(alone.pop("logits"), abs=1e-5)
    assert found.pop("quiet bytes") == 20  # a length, nothing, a tag
    assert "not with several ranks" in found.pop("refused")
    first, second, *cleared = found.pop("digests")
    assert first == second
    assert cleared[0] == cleared[1] != first
    assert found == alone


@pytest.mark.slow
@pytest.mark.parametrize(("size", "model"), [(2, []), (3, [str(FIXTURES / "llama-sharded")])])
def test_schedulers_are_in_the_same_state(size: int, model: list[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ["-m", "tests.distributed.random_requests", str(report), "200", *model]
    with Started(size, arguments, tmp_path) as ranks:
        assert ranks.ends(500) == [0] * size, ranks.err(0) + ranks.err(1)
    found = json.loads(report.read_text())
    assert len(found["ends"]) == 200
    assert {"cancelled", "stop", "length", "of a request's own"} <= set(found["ends"])
    assert found["kept"] > 0
    assert all(len(set(digests)) == 1 for digests in found["digests"])
    assert len({digests[0] for digests in found["digests"]}) > 10
