"""What of a device's memory is used: the pool of freed buffers, budgets, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.contexts import ImageMetadata, SamplingParams, TextContext, TokenBuffer
from mlx_vlm_pipes.dtypes import DeviceRef
from mlx_vlm_pipes.engine import memory
from mlx_vlm_pipes.engine.engine import Engine
from mlx_vlm_pipes.engine.plan import default_limits, make_plan, picture_bytes, require_room
from mlx_vlm_pipes.engine.state import EngineConfig, EngineState
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.errors import OutOfBudget
from tests.engine.driving import IDEFICS3, Driven, fixture_requests
from tests.engine.models import Silent, new_scheduler, open_model, prompt_ids, submit, write_llama

MB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("one") / "llama", layers=1, heads=8, kv_heads=8)


@pytest.fixture
def pool_limit() -> Iterator[None]:
    """MLX's limit of the pool, put back afterwards."""
    before = mx.set_cache_limit(1 << 40)
    mx.set_cache_limit(before)
    yield
    mx.set_cache_limit(before)


def fake_device(monkeypatch: pytest.MonkeyPatch, **info: Any) -> None:
    monkeypatch.setattr(mx, "device_info", lambda device=None: {"architecture": "x", **info})


# ---- the pool


def test_the_pool_follows_a_row_that_grows_to_3000_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", MB)
    scheduler = new_scheduler(open_model(folder))
    submit(scheduler, prompt_ids(2600), 400)
    cache, shares = scheduler.state.cache, []
    mx.clear_cache()
    while scheduler.step():
        if cache.nbytes:
            shares.append((mx.get_cache_memory() - MB) / cache.nbytes)
    # for one step the old arrays are there, then half of what is in use may be
    assert max(shares) < 1.25
    assert np.mean(shares) < 0.4


def test_a_prompt_leaves_no_pool_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "KEPT_BYTES", MB)
    scheduler = new_scheduler(open_model(folder))
    submit(scheduler, prompt_ids(1500), 100)
    while not scheduler.running:
        scheduler.step()
    assert mx.get_cache_memory() < MB + scheduler.state.cache.nbytes


@pytest.mark.usefixtures("pool_limit")
def test_the_pool_gets_a_limit_and_a_lower_one_of_the_user_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device(monkeypatch, max_recommended_working_set_size=4000 * MB, memory_size=8000 * MB)
    for own, expected in ((1 << 40, 200 * MB), (50 * MB, 50 * MB)):
        mx.set_cache_limit(own)
        worker = OwnerThread(DeviceRef.CPU().to_device())
        Engine(worker, worker.call(lambda: open_model(folder)), EngineConfig()).close()
        assert mx.set_cache_limit(own) == expected


def test_memory_is_wired_once_on_metal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [0]  # what each call sets, behind what holds before

    def set_wired_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    fake_device(monkeypatch, max_recommended_working_set_size=12 * MB, memory_size=16 * MB)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: limit)
    memory.set_limits(DeviceRef.GPU().to_device())
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    memory.set_limits(DeviceRef.CPU().to_device())
    assert limits == [0]
    for _ in range(2):
        memory.set_limits(DeviceRef.GPU().to_device())
    memory.wire_once.cache_clear()
    assert limits == [0, 12 * MB]


# ---- budgets


def test_budgets_are_of_what_the_device_recommends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(folder)
    fake_device(monkeypatch, max_recommended_working_set_size=2000 * MB, memory_size=3000 * MB)
    limits = default_limits(model)
    step = EngineState(model, limits)
    assert step.memory_bytes == 2000 * MB
    whole = limits.kv_bytes * 4 // 3
    scores = 8 * 2048**2 * 4  # of one layer, a whole slice: 8 heads of 64 are not fused on a CPU
    assert whole < 0.9 * 2000 * MB - model.weight_bytes - scores
    assert whole > 0.9 * 2000 * MB - model.weight_bytes - 2 * scores
    fake_device(monkeypatch, memory_size=3000 * MB)
    assert EngineState(model, limits).memory_bytes == 3000 * MB


def test_fused_attention_is_asked_of_mlx_by_device_and_head_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it answers on Metal; the CPU has no such kernel."""

    def attention(q: mx.array, *_: object, **options: Any) -> mx.array:
        if options["force_fused"] and q.shape[-1] not in (64, 72, 80, 96, 128):
            raise ValueError("no fused kernel")
        return q

    assert not memory.fuses_attention(DeviceRef.CPU().to_device(), 64, mx.float16)
    monkeypatch.setattr(mx, "zeros", lambda shape, dtype, stream: np.zeros(shape))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    gpu = DeviceRef.GPU().to_device()
    memory.fuses_attention.cache_clear()
    found = [
        d
        for d in (32, 64, 72, 80, 96, 100, 120, 128, 256)
        if memory.fuses_attention(gpu, d, mx.float16)
    ]
    memory.fuses_attention.cache_clear()
    assert found == [64, 72, 80, 96, 128]


def context(length: int, new: int) -> TextContext:
    params = SamplingParams(temperature=0, max_new_tokens=new)
    return TextContext(
        max_length=16384, tokens=TokenBuffer(np.array(prompt_ids(length))), sampling_params=params
    )


def test_what_the_device_cannot_hold_is_refused_with_what_would_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(folder)
    fake_device(monkeypatch, max_recommended_working_set_size=40 * MB)
    scheduler = new_scheduler(model, prefill_chunk=128)
    with pytest.raises(OutOfBudget, match=r"the device has 41.94 MB; at most \d+ tokens fit") as e:
        scheduler.submit(context(1000, 10_000), Silent())
    plan = make_plan(scheduler.state, context(1000, 10_000), model.weight_bytes, 40 * MB)
    assert not plan.fits
    count = int(str(e.value).split("at most ")[1].split()[0])
    for total, fits in ((count, True), (count + 1, False)):
        asked = context(1000, total - 1000)
        plan = make_plan(scheduler.state, asked, model.weight_bytes, 40 * MB)
        assert plan.fits == fits
    scheduler.submit(context(1000, count - 1000), Silent())
    fake_device(monkeypatch, max_recommended_working_set_size=MB // 8)
    with pytest.raises(OutOfBudget, match="no token fits; use a smaller or a quantised model"):
        new_scheduler(model).submit(context(1, 1), Silent())


def test_a_picture_too_large_for_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(IDEFICS3)
    request = next(r for r in fixture_requests(IDEFICS3).values() if r["images"])
    asked = driven.context(request["prompt"], request["images"], max_tokens=4)
    state = driven.scheduler.state
    require_room(state, asked, 4, scored=False)
    state.memory_bytes = driven.model.weight_bytes + 10_000
    with pytest.raises(OutOfBudget, match=r"one of its pictures alone takes .* give smaller ones"):
        require_room(state, asked, 4, scored=False)


def test_pictures_are_encoded_apart_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(IDEFICS3)
    encode, counts = driven.model.encode_images, []

    def counted(images: Sequence[ImageMetadata]) -> list[mx.array]:
        counts.append(len(images))
        return encode(images)

    monkeypatch.setattr(driven.model, "encode_images", counted)
    request = next(r for r in fixture_requests(IDEFICS3).values() if len(r["images"]) > 1)
    asked = driven.context(request["prompt"], request["images"], max_tokens=6)
    one = picture_bytes(driven.model, asked.images[0])
    answers = []
    for room in (1 << 40, one * 3 // 2):
        driven.restart(
            EngineConfig(kv_bytes=16 * MB, prefix_bytes=0, image_bytes=0, image_batch=16)
        )
        driven.scheduler.state.memory_bytes = driven.model.weight_bytes + 16 * MB + room
        answers.append(driven.generate(request["prompt"], request["images"], max_tokens=6))
    pictures = len(asked.images)
    assert counts == [pictures, *([1] * pictures)]
    assert answers[0] == answers[1]
