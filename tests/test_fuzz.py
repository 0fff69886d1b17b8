"""Drawn checkpoints and requests of every family are equal to transformers (tools/fuzz)."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tools.fuzz import __main__ as command
from tools.fuzz import verdict
from tools.fuzz.knobs import FAMILIES
from tools.fuzz.minimise import minimise
from tools.make_fixtures.build import quiet_and_deterministic

pytestmark = pytest.mark.reference
CASES = 3
FIRST_SEED = 70000  # chosen before any of its cases was run
GOOD = ("equal", "refused by both", "within a limit", "not made")
PLAIN: dict[str, Any] = {
    "family": "llama",
    "knobs": {},
    "request": {"raw": False, "fps": 2.0, "turns": [{"role": "user", "parts": ["Who reads?"]}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_cases_equal_transformers(family: str) -> None:
    quiet_and_deterministic()
    kinds = []
    for seed in range(FIRST_SEED, FIRST_SEED + CASES):
        found = verdict.judge(verdict.draw_setting(family, seed))
        assert found.kind in GOOD, (seed, found)
        kinds.append(found.kind)
    assert "equal" in kinds


@pytest.mark.slow
def test_a_difference_is_found_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = ["--case", json.dumps(PLAIN)]
    assert command.main(case) == 0
    assert "equal" in capsys.readouterr().out
    monkeypatch.setattr(verdict, "LOGITS_BAR", 0.0)
    assert command.main([*case, "--minimise"]) == 1
    assert "differs: logits off by" in capsys.readouterr().out


def test_the_smallest_setting_keeps_what_fails() -> None:
    drawn = verdict.draw_setting("qwen2_5_vl", 2)
    drawn["knobs"]["text.hidden_act"] = "relu"
    parts = [{"picture": {**_a_picture(), "mode": "CMYK"}}, "one two three"]
    drawn["request"] = {"raw": True, "fps": 4.0, "turns": [{"role": "user", "parts": parts}] * 2}

    def fails(setting: dict[str, Any]) -> bool:
        turns = setting["request"]["turns"]
        modes = [p["picture"]["mode"] for t in turns for p in t["parts"] if "picture" in p]
        return "text.hidden_act" in setting["knobs"] and "CMYK" in modes

    left = minimise(drawn, fails)
    assert list(left["knobs"]) == ["text.hidden_act"]
    [turn] = left["request"]["turns"]
    assert [p["picture"]["mode"] for p in turn["parts"]] == ["CMYK"]


def _a_picture() -> dict[str, Any]:
    return {"kind": "clouds", "width": 30, "height": 20, "seed": 4, "mode": "RGB", "source": "pil"}
