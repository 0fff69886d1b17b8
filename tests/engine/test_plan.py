"""A plan's token counts are exact, and its peak is never below the measured one, nor far above."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vlm_pipes import EngineConfig, load
from tests.device import on_cpu_only
from tests.fixtures_helper import arguments, cases, reference

NAMES = ("idefics3", "pixtral", "internvl-qwen3", "qwen2vl", "qwen25vl-v5", "qwen3vl")
CASES = [c for c in cases() if c.name in NAMES]


@on_cpu_only("the factors of a plan were fitted to its peaks")
@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_plan_against_measured_peak(folder: Path) -> None:
    facts, _ = reference(folder)
    pipe = load(folder, dtype="float32")
    for fact in facts["prompts"]:
        request = arguments(folder, fact)
        pipe.generate(**request, max_tokens=4)  # first uses of kernels allocate once
        pipe.engine.forget()
        plan = pipe.plan(**request, max_tokens=facts["max_new"])
        pipe.engine.worker.call(mx.reset_peak_memory)
        for _ in range(8):  # the largest: how far MLX runs ahead changes from run to run
            pipe.engine.forget()
            answer = pipe.generate(**request, max_tokens=facts["max_new"])
            assert plan.prompt_tokens == answer.usage.prompt_tokens
            assert plan.image_tokens == answer.usage.image_tokens
        measured = pipe.peak_memory_bytes()
        assert measured <= plan.peak_bytes <= 1.35 * measured, fact["name"]
    pipe.close()


def test_what_cannot_fit_is_said() -> None:
    pipe = load(CASES[0], engine=EngineConfig(kv_bytes=10_000))
    plan = pipe.plan("Hello", max_tokens=100)
    assert not plan.fits
    assert "does not fit" in str(plan)
    pipe.close()


@on_cpu_only("elsewhere attention keeps no scores, or keeps them in 16 bits")
def test_a_plan_in_16_bits_counts_scores_in_float32() -> None:
    prompt = "a large red circle above a small blue square " * 110
    with load(dtype="bfloat16") as pipe:
        pipe.generate(prompt, max_tokens=2)
        pipe.engine.forget()
        plan = pipe.plan(prompt, max_tokens=2)
        pipe.engine.worker.call(mx.reset_peak_memory)
        pipe.generate(prompt, max_tokens=2)
        measured = pipe.peak_memory_bytes()
    assert measured <= plan.peak_bytes <= 1.35 * measured
