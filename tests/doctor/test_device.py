"""The check of a machine: good ones are trusted, and what is broken on purpose is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import check
from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.doctor.device import (
    DeviceReport,
    Recorder,
    agreement,
    attention,
    figures,
    precision,
    run_part,
    sampling,
)
from mlx_vlm_pipes.doctor.device.parts import FACTS, PARTS, Part
from mlx_vlm_pipes.doctor.device.random_model import Shape
from mlx_vlm_pipes.doctor.device.references import FOLDER, load_cases
from mlx_vlm_pipes.doctor.device.run import run_child
from mlx_vlm_pipes.engine import batch_sampler
from mlx_vlm_pipes.json_files import require_json
from mlx_vlm_pipes.loading import BUNDLED
from mlx_vlm_pipes.nn import decode_step
from tests.device import on_cpu_only

SILENT = Part(lambda *_: None, remedy="report it")


def report_of(run: Callable[[Recorder], None]) -> DeviceReport:
    """What a part reports, through JSON as between processes."""
    report = DeviceReport({})
    run(Recorder("part", lambda m: report.take(json.loads(json.dumps(m, allow_nan=False)))))
    return report


def failed_names(report: DeviceReport) -> set[str]:
    """The first words of what failed: "8 bits, float32: answers" -> "8 bits, float32"."""
    assert not report.is_trusted
    assert report.verdict.startswith("not trusted")
    return {check.name.partition(":")[0] for check in report.failed}


# ---- the report


def test_verdict_and_json() -> None:
    def run(record: Recorder) -> None:
        record.at_most("near", 1e-6, 1e-5)
        record.all_of("answers", 3, 3)
        record.figures("speed", {"tokens": 12.345678, "lost": float("nan")})

    report = report_of(run)
    assert report.is_trusted
    assert report.lines()[-1] == "verdict: trusted: all 2 comparisons hold on this machine"
    pasted = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert pasted["checks"]["part"][0] == ["near", True, 1e-6, 1e-5, "1e-06 (at most 1e-05)"]
    assert pasted["figures"] == {"speed": {"tokens": 12.35, "lost": None}}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda record: record.at_most("far", 2.0, 1.0), "far: 2 (at most 1)"),
        (lambda record: record.at_most("broken", float("nan"), 1.0), "broken: nan"),
        (lambda record: record.all_of("answers", 2, 3), "answers: 2 of 3"),
        (lambda record: record.all_of("none", 0, 0), "none: 0 of 0"),
        (lambda record: mx.eval(mx.zeros(2) @ mx.zeros(3)), "raised ValueError"),
    ],
)
def test_one_failure_is_enough(fault: Callable[[Recorder], None], words: str) -> None:
    def run(record: Recorder) -> None:
        record.all_of("right", 1, 1)
        with record.trying("this one", "do that"):
            fault(record)

    verdict = report_of(run).verdict
    assert verdict.startswith("not trusted: 1 of 2 comparisons fail")
    assert words in verdict
    assert verdict.endswith("What to do: do that")


def test_nothing_compared_is_not_trusted() -> None:
    assert DeviceReport({}).verdict == "not trusted: nothing was compared"


# ---- processes


@pytest.mark.parametrize(
    ("code", "limit", "words"),
    [
        ("import os; os.abort()", 60, "died (signal 6) at 'the kernel'"),
        ("import sys; sys.exit('no Metal')", 60, "died (exit status 1) at 'the kernel': no Metal"),
        ("import time; time.sleep(60)", 2, "took more than 2 s at 'the kernel'"),
    ],
)
def test_a_process_that_dies_is_a_line(code: str, limit: float, words: str) -> None:
    report, shown = DeviceReport({}), []
    message = json.dumps({"doing": "the kernel"})
    code = f"print('a library speaks'); print({message!r}, flush=True); {code}"
    run_child(report, "part", SILENT, [sys.executable, "-c", code], shown.append, limit)
    assert words in report.verdict
    assert report.verdict.endswith("What to do: report it")
    assert shown == ["the kernel"]


def test_parity_runs_without_tf32_and_speed_as_the_user_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    value = "{'machine': {'tf32': os.environ['MLX_ENABLE_TF32']}}"
    code = f"import json, os; print(json.dumps({value}))"
    found = []
    for name in ("precision", "speed"):
        report = DeviceReport({})
        words = [sys.executable, "-c", code]
        run_child(report, name, PARTS[name], words, lambda doing: None)
        found.append(report.machine["tf32"])
    assert found == ["0", "1"]


def test_the_machine_is_named() -> None:
    facts: dict[str, Any] = {}
    run_part(FACTS, None, lambda message: facts.update(message["machine"]))
    assert facts["mlx"].startswith("0.")
    assert facts["memory, GB"] > 0
    assert json.dumps(facts, allow_nan=False)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--device", "--run"], ["--device", "--part", "nothing"], []):
        assert check.main(words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ---- what is stored


def test_references_are_of_the_bundled_model() -> None:
    about = require_json(FOLDER / "cases.json")
    weights = (BUNDLED / "model.safetensors").read_bytes()
    assert about["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
    assert len({len(case.ids) for case in load_cases()[:8]}) > 4


@pytest.mark.reference
@pytest.mark.slow
def test_references_are_still_what_transformers_computes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tools.device_references import write_references

    write_references(BUNDLED, tmp_path)
    for old, new in zip(load_cases(), load_cases(tmp_path), strict=True):
        assert (old.messages, old.ids, old.tokens) == (new.messages, new.ids, new.tokens)
        assert (old.picture == new.picture).all()
        if old.logits is not None:
            # stored to 4e-6 of the largest: one more or less where the noise of float32 decides
            assert np.abs(old.logits - new.logits).max() < 1e-5 * np.abs(old.logits).max()


# ---- faults


@pytest.fixture
def float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "VARIANTS", precision.VARIANTS[:1])
    monkeypatch.setattr(precision, "PACKED_VARIANTS", precision.PACKED_VARIANTS[:1])


@pytest.mark.usefixtures("float32_only")
def test_the_bundled_model_is_right_here() -> None:
    report = report_of(lambda record: precision.check_precision(record, BUNDLED))
    assert report.is_trusted, report.verdict
    assert len(report.checks) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("float32_only")
def test_perturbed_weights_are_seen(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "model"))
    arrays = cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))
    mx.eval(arrays)
    name = next(n for n in arrays if n.endswith("layers.2.mlp.down_proj.weight") and "text" in n)
    arrays[name] = arrays[name] * 1.01
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    report = report_of(lambda record: precision.check_precision(record, folder))
    assert "float32" in failed_names(report)
    assert "MLX_ENABLE_TF32=0" in report.verdict


@pytest.mark.slow
@pytest.mark.usefixtures("float32_only")
def test_a_packed_product_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: right(*a, **k) * 1.001)
    report = report_of(lambda record: precision.check_precision(record, BUNDLED))
    assert failed_names(report) == {"4 bits, float32"}
    assert "use the model unquantised" in report.verdict


@pytest.mark.slow
def test_a_wrong_batched_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows' attention, of which each hears a little of its neighbour."""
    right = decode_step.decode_attention

    def leaking(q: mx.array, *args: Any) -> mx.array:
        out = right(q, *args)
        return out + 0.01 * out[::-1] if len(q) > 1 else out

    monkeypatch.setattr(decode_step, "decode_attention", leaking)
    monkeypatch.setattr(agreement, "HALVES", ())
    report = report_of(lambda record: agreement.check_agreement(record, BUNDLED))
    assert "eight rows" in failed_names(report)
    assert not {"cached prefix", "prompt in slices"} & failed_names(report)
    assert "max_batch_size=1" in report.verdict


def test_one_head_size_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend

    def wrong(q: mx.array, *args: Any, **named: Any) -> mx.array:
        out = right(q, *args, **named)
        return out * 1.02 if q.shape[-1] == 72 and q.dtype == mx.float16 else out

    monkeypatch.setattr(attention, "HEAD_DIMS", (64, 72))
    monkeypatch.setattr(attention, "attend", wrong)
    assert failed_names(report_of(attention.check_attention)) == {"head size 72, float16"}


def test_a_product_of_many_rows_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mx.quantized_matmul

    def wrong(x: mx.array, *args: Any, **named: Any) -> mx.array:
        out = right(x, *args, **named)
        return out * 1.01 if len(x) == 8 and named["bits"] == 8 else out

    bars = {mx.float32: attention.PRODUCT_BARS[mx.float32]}
    monkeypatch.setattr(attention, "PRODUCT_BARS", bars)
    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    report = report_of(attention.check_products)
    assert failed_names(report) == {"products, 8 bits by 64, float32"}


@pytest.mark.parametrize(
    ("change", "ways"),
    [
        ({"top_k": -1}, {"top-k", "top-k and top-p"}),
        ({"top_p": 1.0}, {"top-p", "top-k and top-p"}),
        ({"min_p": 0.0}, {"min-p"}),
        ({"repetition_penalty": 1.0}, {"repetition penalty", "all penalties"}),
        ({"frequency_penalty": 0.0}, {"frequency penalty", "all penalties"}),
    ],
)
def test_a_sampler_that_ignores_a_setting_is_seen(
    change: dict[str, Any], ways: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "VOCABULARY", 700)
    monkeypatch.setattr(
        sampling, "SamplingParams", lambda **given: SamplingParams(**{**given, **change})
    )
    report = report_of(sampling.check_sampling)
    assert {name.rpartition(",")[0] for name in failed_names(report)} == ways


def test_frequencies_that_are_off_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "VOCABULARY", 700)
    right = batch_sampler.choose

    def colder(form: Any, logits: mx.array, arrays: Any) -> Any:
        return right(form, logits * 1.5, arrays)

    monkeypatch.setattr(batch_sampler, "choose", colder)
    failed = {check.name for check in report_of(sampling.check_sampling).failed}
    assert "temperature, stored: frequencies" in failed


# ---- figures, and all of it


@pytest.mark.slow
@on_cpu_only("copies are made at other sizes elsewhere")
def test_figures_are_there() -> None:
    shape = Shape(layers=1, tower_layers=1, vocab_size=512, side=64)
    amount = figures.Amount(shape, prompt_tokens=16, new_tokens=6, copy_bytes=1 << 20)
    report = report_of(lambda record: figures.measure_machine(record, None, amount))
    assert report.failed == []
    own = report.figures[amount.shape.name]
    assert own["tokens a second, one row"] > 0
    assert own["a picture, ms"] > 0
    assert own["steps in turn, overlap"] is False
    assert own["steps overlapping, overlap"] is True
    assert report.figures["machine"]["copy bandwidth, GB/s"] > 0


@pytest.mark.slow
def test_the_whole_of_it_on_this_machine() -> None:
    words = [sys.executable, "-m", "mlx_vlm_pipes.check", "--device", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["trusted"], done.returncode) == (True, 0), found["verdict"]
    assert set(found["checks"]) == set(PARTS) - {"speed"}
    assert found["machine"]["mlx"]
