"""Documented settings: each has its effect, or refuses any value but its default by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import EngineConfig, load
from mlx_vlm_pipes.architectures.internvl.processing import InternVLProcessor
from mlx_vlm_pipes.architectures.llama3 import Llama3Config, Llama3Model
from mlx_vlm_pipes.config import KVCacheConfig, ModelConfig, PipelineConfig, RuntimeConfig
from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.engine.engine import Engine
from mlx_vlm_pipes.engine.memory import machine_memory
from mlx_vlm_pipes.engine.plan import prefill_bytes
from mlx_vlm_pipes.engine.requests import Handle
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.errors import ConfigError, InputError, OutOfBudget
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import Phase, ReturnHiddenStates
from mlx_vlm_pipes.nn.language_model import can_compile
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.quantization import QuantizationEncoding
from tests.api.driving import STEPS, build, pipeline_config, prefill, relative, save
from tests.api.test_internvl import ROOM as INTERNVL
from tests.api.test_llama3 import ROOM as LLAMA
from tests.device import device, device_ref
from tests.fixtures_helper import FIXTURES

MEMORY = 1 << 30
PROMPT = "turns"  # 86 tokens


# ---- the engine's limits come from PipelineConfig


class Silent:
    """A stream decoder for tests that read tokens only."""

    def add(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Served:
    """A model made by hand, its scheduler on this thread, and the slices it prefilled."""

    def __init__(self, **options: Any) -> None:
        self.model = build(Llama3Model, LLAMA.folder, **options)
        self.config = EngineConfig.from_pipeline(self.model.pipeline_config, MEMORY)
        self.scheduler = Scheduler(self.model, self.config)
        self.slices: list[int] = []
        prepare = self.model.prepare_initial_token_inputs

        def noted(batches: Any, *arguments: Any, **named: Any) -> Any:
            inputs = prepare(batches, *arguments, **named)
            if inputs.phase is Phase.PREFILL:
                self.slices.append(inputs.tokens.size)
            return inputs

        self.model.prepare_initial_token_inputs = noted

    def submit(self, prompt: str = PROMPT) -> Handle:
        context = LLAMA.context(prompt, ignore_eos=True)
        context.sampling_params = SamplingParams(temperature=0.0, max_new_tokens=STEPS)
        return self.scheduler.submit(context, Silent())

    def finish(self) -> None:
        while self.scheduler.step():
            pass

    def answer(self, prompt: str = PROMPT) -> list[int]:
        handle = self.submit(prompt)
        self.finish()
        return tokens(handle)


def tokens(handle: Handle) -> list[int]:
    return [chunk.token for chunk in handle if chunk.token is not None]


@pytest.mark.parametrize("enabled", [True, False])
def test_enable_prefix_caching(enabled: bool) -> None:
    served = Served(kv_cache=KVCacheConfig(enable_prefix_caching=enabled))
    assert served.answer() == served.answer() == LLAMA.greedy(PROMPT)
    assert (served.scheduler.stats.cached_tokens > 0) is enabled


def test_max_batch_input_tokens() -> None:
    served = Served(runtime=RuntimeConfig(max_batch_input_tokens=20))
    assert served.answer() == LLAMA.greedy(PROMPT)
    assert served.slices == [20, 20, 20, 20, 6]


def test_without_chunked_prefill_no_prompt_is_cut() -> None:
    """Three prompts of 86 tokens in slices of 200: two go together, the third waits."""
    runtime = RuntimeConfig(max_batch_input_tokens=200, enable_chunked_prefill=False)
    served = Served(runtime=runtime, kv_cache=KVCacheConfig(enable_prefix_caching=False))
    handles = [served.submit() for _ in range(3)]
    served.finish()
    assert [tokens(handle) for handle in handles] == [LLAMA.greedy(PROMPT)] * 3
    assert served.slices == [172, 86]


def test_without_chunked_prefill_a_long_prompt_is_refused() -> None:
    runtime = RuntimeConfig(max_batch_input_tokens=85, enable_chunked_prefill=False)
    served = Served(runtime=runtime)
    with pytest.raises(OutOfBudget, match=r"86 tokens.*at most 85 \(max_batch_input_tokens\)"):
        served.submit()
    pipe = load(LLAMA.folder, dtype="float32", engine=served.config)
    try:
        assert not pipe.plan("word " * 86, max_tokens=1).fits
        with pytest.raises(OutOfBudget, match="max_batch_input_tokens"):
            pipe.logits("word " * 86)
    finally:
        pipe.close()


def test_max_batch_size() -> None:
    served = Served(runtime=RuntimeConfig(max_batch_size=1))
    handles = [served.submit(), served.submit("raw")]
    running = []
    while served.scheduler.step():
        running.append(len(served.scheduler.running))
    assert max(running) == 1
    assert tokens(handles[1]) == LLAMA.greedy("raw")
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        RuntimeConfig(max_batch_size=0)


def test_device_memory_utilization() -> None:
    """The weights are part of the share, and nothing gets what is left of less than them."""
    pipeline = pipeline_config(LLAMA.folder, kv_cache=KVCacheConfig(device_memory_utilization=0.5))
    limits = EngineConfig.from_pipeline(pipeline, 1000, 100)
    assert (limits.kv_bytes, limits.prefix_bytes, limits.image_bytes) == (300, 50, 12)
    limits = EngineConfig.from_pipeline(pipeline, 1000, 600)
    assert (limits.kv_bytes, limits.prefix_bytes, limits.image_bytes) == (0, 0, 0)
    limits = EngineConfig.from_pipeline(pipeline, 1000, 60, step_bytes=40)
    assert (limits.kv_bytes, limits.prefix_bytes, limits.image_bytes) == (300, 50, 12)
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match="device_memory_utilization"):
            KVCacheConfig(device_memory_utilization=share)


def test_a_share_that_holds_no_token_is_out_of_budget() -> None:
    served = Served(kv_cache=KVCacheConfig(device_memory_utilization=1e-9))
    with pytest.raises(OutOfBudget, match="KV cache"):
        served.submit()


def test_engine_and_load_take_the_settings_of_the_model() -> None:
    """Through load() and by hand alike: the default share of this machine, less the weights and
    what a slice of prefill takes."""
    pipe = load(LLAMA.folder, dtype="float32")
    model, limits = pipe.engine.model, pipe.engine.config
    stored = sum(tensor.nbytes for tensor in LLAMA.tensors.values())
    assert model.weight_bytes == stored
    chunk = min(limits.prefill_chunk, model.max_seq_len)
    decoder, itemsize = model.language.decoder.config, model.kv_params.dtype.size_in_bytes
    step = prefill_bytes(decoder, itemsize, chunk, limits, fused=False)
    assert limits.kv_bytes == (int(0.9 * machine_memory()) - stored - step) * 3 // 4
    pipe.close()
    worker = OwnerThread(device())
    own = KVCacheConfig(device_memory_utilization=0.5, enable_prefix_caching=False)
    made = worker.call(lambda: build(Llama3Model, LLAMA.folder, kv_cache=own))
    engine = Engine(worker, made, None)
    assert engine.config.kv_bytes == (int(0.5 * machine_memory()) - stored - step) * 3 // 4
    assert not engine.config.enable_prefix_caching
    engine.close()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_num_steps", lambda: {"runtime": RuntimeConfig(max_num_steps=4)}),
        ("draft_model", lambda: {"draft_model": ModelConfig()}),
        ("speculative", lambda: {"speculative": {"num_tokens": 2}}),
        ("rope_type", lambda: {"rope_type": "normal"}),
    ],
)
def test_what_has_no_reader_refuses_all_but_its_default(name: str, options: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        build(Llama3Model, LLAMA.folder, **options())
    assert "\n" not in str(caught.value)


def test_limits_that_let_nothing_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_page_size is 0"):
        KVCacheConfig(kv_cache_page_size=0)
    with pytest.raises(ConfigError, match="max_batch_input_tokens is 0"):
        RuntimeConfig(max_batch_input_tokens=0)


def test_without_use_subgraphs_the_decode_step_is_not_compiled() -> None:
    served = [Served(use_subgraphs=use) for use in (True, False)]
    assert served[0].answer() == served[1].answer() == LLAMA.greedy(PROMPT)
    traces = [one.scheduler.stats.traces for one in served]
    assert traces[1] == 0
    assert traces[0] > 0 or not can_compile(device_ref())


def test_norm_dtype_is_the_type_of_the_norms_weights() -> None:
    """float32 norms under bfloat16: the same weights, and what they give stays bfloat16."""

    class Wide(Llama3Config):
        def finalize(self, *arguments: Any, **named: Any) -> None:
            super().finalize(*arguments, **named)
            assert self.norm_dtype is DType.bfloat16
            self.norm_dtype = DType.float32

    class WideModel(Llama3Model):
        config_class = Wide

    plain = build(Llama3Model, LLAMA.folder, quantization_encoding="bfloat16")
    wide = build(
        WideModel,
        LLAMA.folder,
        quantization_encoding="bfloat16",
        return_hidden_states=ReturnHiddenStates.ALL_NORMALIZED,
    )
    for name, array in wide.state_dict.items():
        is_norm = name.split(".")[-2].endswith("norm")
        assert array.dtype == (mx.float32 if is_norm else mx.bfloat16), name
        np.testing.assert_array_equal(
            np.array(array.astype(mx.float32)), np.array(plain.state_dict[name].astype(mx.float32))
        )
    _, outputs = prefill(wide, [LLAMA.context("raw")])
    assert outputs.hidden_states.dtype == mx.bfloat16
    got, want = np.array(outputs.logits), LLAMA.logits("raw")
    assert (got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum()) > 0.999


def test_hidden_states_of_another_model_are_refused() -> None:
    model = build(Llama3Model, LLAMA.folder)
    inputs, _ = prefill(model, [LLAMA.context("raw")])
    inputs.update(hidden_states=mx.zeros((1, 4)))
    with pytest.raises(InputError, match="hidden_states"):
        model.execute(inputs)


def test_max_dynamic_patch_of_vision_config_overrides() -> None:
    """Fewer tiles: the estimate follows (test_internvl.py), and so does the processor."""
    picture = np.random.default_rng(0).integers(0, 256, (60, 180, 3), np.uint8)
    counts = []
    for overrides in ({}, {"max_dynamic_patch": 1}):
        config = pipeline_config(INTERNVL.folder, vision_config_overrides=overrides).model
        processor = InternVLProcessor(
            INTERNVL.folder, INTERNVL.config_json, config.vision_config_overrides
        )
        processed = processor.process(PromptRequest("What?", [picture]))
        counts.append(sum(len(image.pixel_values) for image in processed.images))
    assert counts[0] > 1 == counts[1]


def test_one_picture_alone_counts_as_a_list_of_one() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    pipe = load(INTERNVL.folder, dtype="float32")
    try:
        want = pipe.generate("What?", images=[picture], max_tokens=3).tokens
        assert pipe.generate("What?", images=picture, max_tokens=3).tokens == want
        chunks = list(pipe.stream("What?", images=picture, max_tokens=3))
        assert [c.token for c in chunks if c.token is not None] == want
        alone, listed = (pipe.plan("What?", images=i, max_tokens=3) for i in (picture, [picture]))
        assert alone == listed
    finally:
        pipe.close()


# ---- the encoding: what the weights are, not what a label says


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama-tied with 4-bit linears, as MLX stores them."""
    folder = tmp_path_factory.mktemp("packed")
    config = {**LLAMA.config_json, "quantization": {"group_size": 32, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, mx.array] = {}
    for name, values in LLAMA.tensors.items():
        array = mx.array(values)
        if values.ndim == 2 and "layers" in name:
            stem = name.removesuffix("weight")
            parts = mx.quantize(array, group_size=32, bits=4)
            tensors |= dict(zip((name, f"{stem}scales", f"{stem}biases"), parts, strict=True))
        else:
            tensors[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    return folder


def model_config(folder: Path, encoding: str | None) -> ModelConfig:
    return pipeline_config(folder, quantization_encoding=encoding).model


def test_resolve_reads_the_encoding_off_the_weights(packed: Path, tmp_path: Path) -> None:
    assert model_config(LLAMA.folder, None).resolve().quantization_encoding == "float32"
    biased = model_config(FIXTURES / "llama-attn-bias", None).resolve()
    assert (biased.quantization_encoding, biased.dtype) == ("bfloat16", DType.bfloat16)
    resolved = model_config(packed, None).resolve()
    assert resolved.graph_quantization_encoding is QuantizationEncoding.MLX
    shutil.copy(LLAMA.folder / "config.json", tmp_path)
    save(tmp_path, {n: t.astype(np.float16) for n, t in LLAMA.tensors.items()})
    assert model_config(tmp_path, None).resolve().dtype is DType.float16


@pytest.mark.parametrize("encoding", [None, "mlx", "mlx:float32"])
def test_a_packed_folder_opened_by_hand_says_what_it_is(packed: Path, encoding: str | None) -> None:
    model = build(Llama3Model, packed, quantization_encoding=encoding)
    config = model.model_config
    assert isinstance(config, Llama3Config)
    assert config.model_quantization_encoding is QuantizationEncoding.MLX
    assert config.quantization_config is not None
    assert (config.quantization_config.bits, config.quantization_config.group_size) == (4, 32)
    assert config.dtype is DType.float32
    _, outputs = prefill(model, [LLAMA.context("raw")])
    dequantised = {**LLAMA.tensors}
    for name, values in LLAMA.tensors.items():
        if values.ndim == 2 and "layers" in name:
            parts = mx.quantize(mx.array(values), group_size=32, bits=4)
            dequantised[name] = np.array(mx.dequantize(*parts, group_size=32, bits=4))
    folder = packed.with_name("floats")
    folder.mkdir(exist_ok=True)
    shutil.copy(LLAMA.folder / "config.json", folder)
    save(folder, dequantised)
    _, want = prefill(build(Llama3Model, folder), [LLAMA.context("raw")])
    assert relative(outputs.logits, np.array(want.logits)) < 1e-4


@pytest.mark.parametrize("label", ["gptq", "q4_0", "q4_k", "float8_e4m3fn", "mlx", "nonsense"])
def test_a_label_that_contradicts_float_weights_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match=label) as caught:
        build(Llama3Model, LLAMA.folder, quantization_encoding=label)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["gptq", "float8_e4m3fn", "q4_0"])
def test_a_label_that_contradicts_packed_weights_is_refused(packed: Path, label: str) -> None:
    with pytest.raises(ConfigError, match=label):
        build(Llama3Model, packed, quantization_encoding=label)


def test_a_float_encoding_casts_on_load() -> None:
    model = build(Llama3Model, LLAMA.folder, quantization_encoding="bfloat16")
    assert model.model_config.dtype is model.kv_params.dtype is DType.bfloat16
    assert model.state_dict["norm.weight"].dtype == mx.bfloat16
    _, outputs = prefill(model, [LLAMA.context("raw")])
    got, want = np.array(outputs.logits), LLAMA.logits("raw")
    assert (got * want).sum() / np.sqrt((got**2).sum() * (want**2).sum()) > 0.999


def test_an_explicit_model_config_reaches_every_field() -> None:
    pipeline = pipeline_config(LLAMA.folder)
    other = replace(
        pipeline.model,
        quantization_encoding="bfloat16",
        max_length=99,
        huggingface_config=HuggingFaceConfig({**LLAMA.config_json, "rope_theta": 7.0}),
    )
    config = Llama3Config.initialize(pipeline, other)
    assert (config.dtype, config.kv_params.dtype) == (DType.bfloat16, DType.bfloat16)
    assert (config.max_seq_len, config.rope_theta) == (99, 7.0)
    assert Llama3Config.initialize(PipelineConfig(other)) == config
