"""A model runs on the device it is given, whatever MLX's default is, and leaves that alone.

The other device here is "cpu:1": MLX takes it as its default, and nothing can be computed on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import load
from mlx_vlm_pipes.architectures.llama3 import Llama3Model
from mlx_vlm_pipes.config import KVCacheConfig, ModelConfig, PipelineConfig
from mlx_vlm_pipes.device_turns import DeviceTurns
from mlx_vlm_pipes.dtypes import Device, DeviceRef, DeviceSpec, default_device
from mlx_vlm_pipes.engine import plan
from mlx_vlm_pipes.engine.plan import make_plan
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.interfaces import InferenceSession
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.loading import select_device
from mlx_vlm_pipes.nn import language_model
from mlx_vlm_pipes.nn.language_model import can_compile
from mlx_vlm_pipes.weights import load_weights
from tests.device import bar, on_cpu_only
from tests.engine.driving import IDEFICS3, LLAMA, Driven, fixture_requests
from tests.fixtures_helper import reference

CPU, NOWHERE = mx.Device(mx.cpu, 0), mx.Device(mx.cpu, 1)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """MLX's default is a device that can compute nothing."""
    before = mx.default_device()
    mx.set_default_device(NOWHERE)
    yield
    assert mx.default_device() == NOWHERE
    mx.set_default_device(before)


def build(
    folder: Path, devices: list[Device], session: list[Device], specs: list[DeviceSpec]
) -> Any:
    driven = Driven(folder)
    config = ModelConfig(str(folder), device_specs=specs)
    return type(driven.model)(
        PipelineConfig(config),
        InferenceSession(session),
        devices,
        KVCacheConfig(),
        load_weights(sorted(folder.glob("*.safetensors"))),
    )


# ---- which device


@pytest.mark.parametrize(
    ("devices", "session", "specs", "kind", "words"),
    [
        ([], ["cpu"], ["cpu"], ConfigError, ["devices is empty"]),
        (["cpu", "cpu"], [], ["cpu"], NotImplementedError, ["2 devices"]),
        (["cpu:1"], [], ["cpu:1"], ConfigError, ["cpu:1", "does not have"]),
        (["cpu"], ["gpu"], ["cpu"], ConfigError, ["cpu:0", "session has gpu:0"]),
        (["cpu"], [], ["gpu"], ConfigError, ["cpu:0", "device_specs say gpu:0"]),
        (["cpu"], [], ["cpu", "cpu"], ConfigError, ["device_specs say cpu:0, cpu:0"]),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(
    devices: list[str],
    session: list[str],
    specs: list[str],
    kind: type[Exception],
    words: list[str],
) -> None:
    def ref(name: str) -> DeviceRef:
        label, _, number = name.partition(":")
        return DeviceRef(label, int(number or 0))

    with pytest.raises(kind) as caught:
        build(
            LLAMA,
            [ref(name).to_device() for name in devices],
            [ref(name).to_device() for name in session],
            [DeviceSpec(ref(name).id, ref(name).device_type) for name in specs],
        )
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("devices", [[DeviceRef.CPU()], ["cpu"], DeviceRef.CPU().to_device()])
def test_anything_but_a_list_of_devices_is_refused_by_name(devices: Any) -> None:
    config = ModelConfig(model_path=str(LLAMA), device_specs=[DeviceSpec.cpu()]).resolve()
    session, weights = InferenceSession([]), load_weights(config.weight_path)
    with pytest.raises(TypeError, match="expected a list of one Device"):
        Llama3Model(PipelineConfig(config), session, devices, config.kv_cache, weights)


def test_a_session_without_devices_takes_any() -> None:
    model = build(LLAMA, [Device(CPU)], [], [DeviceSpec.cpu()])
    assert model.device == Device(CPU)
    assert model.kv_params.devices == model.device_refs == [DeviceRef.CPU()]


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_has_a_name_and_no_use() -> None:
    gpu = DeviceRef.GPU().to_device()
    assert (str(gpu), gpu.is_host, gpu.is_available) == ("gpu:0", False, False)
    with pytest.raises(ConfigError, match="gpu:0, which MLX does not have"):
        build(LLAMA, [gpu], [], [DeviceSpec.accelerator()])
    with pytest.raises(ConfigError, match="MLX has no gpu here"):
        select_device("gpu")


# ---- what runs there


@pytest.mark.usefixtures("elsewhere")
def test_every_step_by_hand_runs_on_the_models_device() -> None:
    facts, arrays = reference(IDEFICS3)
    name = next(fact["name"] for fact in facts["prompts"] if fact["images"])
    driven = Driven(IDEFICS3, device=Device(CPU))
    request = fixture_requests(IDEFICS3)[name]
    context, model = driven.context(request["prompt"], request["images"]), driven.model
    kv = cache_inputs(cache := KVCache(model.kv_params), [cache.new_row()])
    with Device(CPU).active():  # ours, not the model's
        rows = mx.concatenate(model.encode_images(context.images))
    inputs = model.prepare_initial_token_inputs([[context]], kv, image_embeddings=rows)
    outputs = model.execute(inputs)
    increment_cache_lengths(kv, [context.tokens.active_length])
    inputs = model.prepare_next_token_inputs(mx.array([3], mx.uint32), inputs)
    model.execute(inputs)
    want = arrays[f"{name}/logits"][-1]
    found = np.array(outputs.next_token_logits)[0]
    assert np.abs(found - want).max() < bar(2e-5) * np.abs(want).max()


@pytest.mark.usefixtures("elsewhere")
def test_a_pipeline_runs_on_its_device_and_leaves_the_default_alone() -> None:
    request = fixture_requests(LLAMA)["turns"]
    pipe = load(LLAMA, device="cpu", dtype="float32")
    assert mx.default_device() == NOWHERE
    first = pipe.generate(request["prompt"], raw=request["raw"], max_tokens=5)
    assert pipe.plan(request["prompt"]).memory_bytes > 0
    pipe.close()
    _, arrays = reference(LLAMA)
    assert first.tokens == arrays["turns/greedy"][:5].tolist()


@on_cpu_only("its attention keeps scores in memory")
def test_compiling_and_plans_ask_for_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "cpu_compiles", lambda: False)
    assert (can_compile(DeviceRef.CPU()), can_compile(DeviceRef.GPU())) == (False, True)
    driven = Driven(LLAMA)
    context = driven.context("word " * 100, max_tokens=4)

    def peak() -> int:
        return make_plan(driven.scheduler.state, context, 0, 1 << 30).prefill_peak_bytes

    with_scores = peak()
    monkeypatch.setattr(plan, "fuses_attention", lambda *_: True)
    assert peak() < with_scores  # fused attention keeps none in memory


# ---- turns


class Visitor(threading.Thread):
    """Goes inside on a device and stays until it is let out."""

    def __init__(self, turns: DeviceTurns, device: mx.Device) -> None:
        super().__init__(daemon=True)
        self.turns, self.device = turns, device
        self.entered, self.let_out = threading.Event(), threading.Event()
        self.saw: mx.Device | None = None
        self.start()

    def run(self) -> None:
        with self.turns.on(self.device):
            self.saw = mx.default_device()
            self.entered.set()
            self.let_out.wait(5)

    def leave(self) -> None:
        self.let_out.set()
        self.join(5)


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(500):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it does not come true")


def test_threads_share_a_device_and_take_turns_for_another() -> None:
    turns, before = DeviceTurns(), mx.default_device()
    first, second = Visitor(turns, NOWHERE), Visitor(turns, NOWHERE)
    assert first.entered.wait(5)
    assert second.entered.wait(5)
    other = Visitor(turns, CPU)
    wait_until(lambda: len(turns._waiting) == 1)
    late = Visitor(turns, NOWHERE)  # behind `other`: nobody waits for ever
    wait_until(lambda: len(turns._waiting) == 2)
    first.leave()
    assert not other.entered.is_set()
    assert mx.default_device() == NOWHERE
    assert turns.default() == before
    second.leave()
    assert other.entered.wait(5)
    assert not late.entered.is_set()
    other.leave()
    assert late.entered.wait(5)
    late.leave()
    assert [v.saw for v in (first, second, other, late)] == [NOWHERE, NOWHERE, CPU, NOWHERE]
    assert mx.default_device() == before == turns.default()


def test_an_error_inside_gives_the_default_back() -> None:
    turns, before = DeviceTurns(), mx.default_device()
    seen = []

    def fail() -> None:
        with turns.on(NOWHERE):
            with turns.on(CPU), turns.on(CPU):
                seen.append(mx.default_device())
            seen.append(mx.default_device())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [CPU, NOWHERE]
    assert mx.default_device() == before == default_device().mx_device
