"""How long anybody waits for others: bounded slices, by a clock that the model's work turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes.contexts import SamplingParams, TextContext, TokenBuffer
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.engine.state import MIN_SLICE
from mlx_vlm_pipes.errors import InputError, OutOfBudget, UnknownAdapter
from mlx_vlm_pipes.interfaces import Phase, PipelineModelWithKVCache
from tests.engine.driving import IDEFICS3, Driven, fixture_requests
from tests.engine.models import (
    Silent,
    finish,
    new_scheduler,
    open_model,
    prompt_ids,
    submit,
    tokens_of,
    write_llama,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PipelineModelWithKVCache:
    return open_model(write_llama(tmp_path_factory.mktemp("llama"), layers=1, head_dim=32))


class Slow:
    """Seconds pass by as the model reads prompts, and, with fixed, in each slice and decode step;
    sizes: tokens of each slice."""

    def __init__(
        self, model: Any, patch: pytest.MonkeyPatch, seconds_per_token: float, fixed: float = 0.0
    ) -> None:
        self.now, self.cost = 0.0, seconds_per_token
        self.sizes: list[int] = []
        execute = model.execute

        def slow(inputs: Any) -> Any:
            self.now += fixed
            if inputs.phase is Phase.PREFILL:
                self.sizes.append(inputs.tokens.shape[0])
                self.now += self.sizes[-1] * self.cost
            return execute(inputs)

        patch.setattr(model, "execute", slow)

    def drives(self, scheduler: Scheduler) -> Scheduler:
        scheduler.state.clock = lambda: self.now
        return scheduler


def context(ids: list[int], **options: Any) -> TextContext:
    return TextContext(max_length=16384, tokens=TokenBuffer(np.array(ids)), **options)


def test_a_slice_takes_as_long_as_running_requests_may_wait(
    model: PipelineModelWithKVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(model, monkeypatch, 0.010)
    scheduler = slow.drives(new_scheduler(model, running_wait_ms=500))
    runs = submit(scheduler, prompt_ids(300), 200)
    scheduler.step()
    assert slow.sizes == [300]  # nobody waited for it
    long = submit(scheduler, prompt_ids(1000, 1), 2)
    while long not in [job.handle for job in scheduler.running]:
        scheduler.step()
    assert set(slow.sizes[1:]) == {50}
    slow.cost = 0.040  # another load on the machine
    longer = submit(scheduler, prompt_ids(600, 2), 2)
    while longer not in [job.handle for job in scheduler.running]:
        scheduler.step()
    assert slow.sizes[21:23] == [50, MIN_SLICE]  # 12 would be too few to be worth it
    slow.cost = 0.0001
    submit(scheduler, prompt_ids(4000, 3), 2)
    while scheduler.prefilling or scheduler.waiting:
        scheduler.step()
    assert max(slow.sizes[40:]) == 512
    runs.close()
    finish(scheduler)


def test_slices_are_worth_the_weights_that_they_read(
    model: PipelineModelWithKVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(model, monkeypatch, 0.004, fixed=0.150)
    scheduler = slow.drives(new_scheduler(model, running_wait_ms=200))
    runs = submit(scheduler, prompt_ids(30), 200)
    scheduler.step()
    long = submit(scheduler, prompt_ids(600, 1), 2)
    while long not in [job.handle for job in scheduler.running]:
        scheduler.step()
    assert max(slow.sizes) == 36  # two steps' time, 0.3 s, are 37; 12 fit into 0.2 s
    runs.close()
    finish(scheduler)


@pytest.mark.parametrize(("running", "most_slices", "most_steps"), [(16, 4, 2), (1, 12, 0)])
def test_short_prompts_are_read_together_where_many_requests_run(
    model: PipelineModelWithKVCache, running: int, most_slices: int, most_steps: int
) -> None:
    scheduler = new_scheduler(model)
    run = [submit(scheduler, prompt_ids(8, seed), 200) for seed in range(running)]
    while len(scheduler.running) < running:
        scheduler.step()
    slices, waited = 0, dict[Handle, int]()
    for seed in range(12):
        new = submit(scheduler, prompt_ids(8, 50 + seed), 1)
        waited[new] = 0
        before = scheduler.stats.prefill_tokens
        scheduler.step()
        slices += scheduler.stats.prefill_tokens > before
        for job in scheduler.prefilling:
            waited[job.handle] += 1
    assert slices == most_slices
    assert max(waited.values()) == most_steps
    for handle in run:
        handle.close()
    finish(scheduler)


def test_running_requests_get_a_token_after_every_slice_of_a_prompts_logits(
    model: PipelineModelWithKVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt_ids(700, 4)
    scheduler = new_scheduler(model)
    handle, whole = scheduler.submit_logits(context(ids))
    finish(scheduler)
    assert list(handle) == []
    alone = submit(scheduler, prompt_ids(100), 60)
    finish(scheduler)

    slow = Slow(model, monkeypatch, 0.010)
    scheduler = slow.drives(new_scheduler(model, running_wait_ms=300))
    runs = submit(scheduler, prompt_ids(100), 60)
    scheduler.step()
    handle, sliced = scheduler.submit_logits(context(ids))
    while scheduler.prefilling or scheduler.waiting:
        before = scheduler.stats.decode_steps
        scheduler.step()
        assert scheduler.stats.decode_steps == before + 1
    assert len(slow.sizes) > 20
    assert scheduler.stats.longest_slice_s < 0.31
    assert np.abs(sliced.whole() - whole.whole()).max() < 1e-4
    finish(scheduler)
    assert tokens_of(runs) == tokens_of(alone)
    assert not scheduler.state.cache.placed


def test_logits_are_held_to_the_same_limits(model: PipelineModelWithKVCache) -> None:
    token = model.kv_params.bytes_per_token
    scheduler = new_scheduler(model, kv_bytes=256 * token)
    with pytest.raises(OutOfBudget, match="for 301 tokens"):
        scheduler.submit_logits(context(prompt_ids(300)))
    with pytest.raises(UnknownAdapter):
        scheduler.submit_logits(context(prompt_ids(9), model_name="x"))
    assert not scheduler.is_busy
    handle, _ = scheduler.submit_logits(context(prompt_ids(200)))
    waits, _ = scheduler.submit_logits(context(prompt_ids(200)))
    scheduler.state.config = new_scheduler(model, prefill_chunk=50).state.config
    scheduler.step()
    handle.close()
    finish(scheduler)
    assert list(handle) == list(waits) == []


@pytest.mark.parametrize("long_one", ["answer", "scored answer", "logits"])
def test_a_short_prompt_does_not_wait_for_all_of_a_long_one(
    model: PipelineModelWithKVCache, long_one: str
) -> None:
    def submit_long(scheduler: Scheduler) -> Handle:
        own = context(
            prompt_ids(2000, 5),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=4),
            log_probabilities_echo=long_one == "scored answer",
        )
        if long_one == "logits":
            return scheduler.submit_logits(own)[0]
        return scheduler.submit(own, Silent())

    def steps_until_started(short: Handle, scheduler: Scheduler) -> int:
        for count in range(100):
            if short in [job.handle for job in scheduler.running]:
                return count
            scheduler.step()
        raise AssertionError("never")

    scheduler = new_scheduler(model, prefill_chunk=100)
    alone = submit(scheduler, prompt_ids(20), 50)
    finish(scheduler)
    long = submit_long(scheduler)
    scheduler.step()
    short = submit(scheduler, prompt_ids(20), 50)
    assert steps_until_started(short, scheduler) <= 2
    assert [job.handle for job in scheduler.prefilling] == [long]
    finish(scheduler)
    assert tokens_of(short) == tokens_of(alone)
    assert len(tokens_of(long)) == (0 if long_one == "logits" else 4)


def test_a_long_prompt_goes_on_beside_any_number_of_short_ones(
    model: PipelineModelWithKVCache,
) -> None:
    scheduler = new_scheduler(model, prefill_chunk=50, running_chunk=50, max_batch_size=4)
    long = submit(scheduler, prompt_ids(1000, 6), 2)
    scheduler.step()
    steps = 1
    while long in [job.handle for job in scheduler.prefilling]:
        submit(scheduler, prompt_ids(40, steps), 1)
        scheduler.step()
        steps += 1
    assert steps < 60  # every second slice is its own
    finish(scheduler)
    assert len(tokens_of(long)) == 2


def test_what_waits_for_a_prefix_lets_others_pass(model: PipelineModelWithKVCache) -> None:
    scheduler = new_scheduler(model, prefill_chunk=64, enable_prefix_caching=True)
    shared = prompt_ids(640, 7)
    first, second = (submit(scheduler, [*shared, last], 2) for last in (1, 2))
    other = submit(scheduler, prompt_ids(30, 8), 2)
    scheduler.step()
    assert [job.handle for job in scheduler.prefilling] == [first, other]
    assert [job.handle for job in scheduler.waiting] == [second]
    finish(scheduler)
    chunks = {handle: list(handle) for handle in (first, second, other)}
    assert chunks[second][-1].usage.cached_tokens == 640
    assert all(len(own) == 2 for own in chunks.values())


def test_a_prefix_is_shared_with_a_request_that_comes_while_the_first_one_runs(
    model: PipelineModelWithKVCache,
) -> None:
    scheduler = new_scheduler(model, enable_prefix_caching=True)
    shared = prompt_ids(200, 9)
    first = submit(scheduler, [*shared, 1], 30)
    for _ in range(6):
        scheduler.step()
    assert [job.handle for job in scheduler.running] == [first]
    second = submit(scheduler, [*shared, 2], 4)
    finish(scheduler)
    *_, last = second
    assert last.usage.cached_tokens == 200
    assert len(tokens_of(first)) == 30


def test_pictures_do_not_hold_up_a_short_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(IDEFICS3)
    requests = fixture_requests(IDEFICS3).values()
    prompt, images = max(((r["prompt"], r["images"]) for r in requests), key=lambda r: len(r[1]))
    driven.restart(new_scheduler(driven.model, image_batch=1, image_bytes=0).state.config)
    slow = driven.submit(prompt, images, max_tokens=2)
    pictures = len(driven.scheduler.waiting[0].context.next_images)
    assert pictures > 4
    driven.step()
    short = driven.submit("Hi", max_tokens=2, ignore_eos=True)
    driven.step(2)
    assert len(driven.scheduler.waiting) + len(driven.scheduler.prefilling) == 1
    assert driven.scheduler.stats.images_encoded < pictures
    driven.finish()
    assert len(driven.tokens(short)) == 2
    assert driven.tokens(slow)


def test_a_failed_picture_beside_a_good_one_of_the_same_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driven = Driven(IDEFICS3)
    requests = fixture_requests(IDEFICS3).values()
    prompt, images = next((r["prompt"], r["images"]) for r in requests if len(r["images"]) > 1)
    encode, seen = driven.model.encode_images, []

    def failing(images: Any) -> Any:
        seen.extend(images)
        if any(image is seen[0] for image in images):
            raise ValueError("a bad picture")
        return encode(images)

    monkeypatch.setattr(driven.model, "encode_images", failing)
    handle = driven.submit(prompt, images, max_tokens=2)
    driven.finish()
    with pytest.raises(ValueError, match="a bad picture"):
        list(handle)
    assert driven.scheduler.stats.images_encoded == 3


@pytest.mark.parametrize("milliseconds", [0, -1.0, float("nan"), "1", None])
def test_the_target_is_a_number_above_0(model: PipelineModelWithKVCache, milliseconds: Any) -> None:
    with pytest.raises(InputError, match=r"running_wait_ms is .*, expected a finite number"):
        new_scheduler(model, running_wait_ms=milliseconds)
