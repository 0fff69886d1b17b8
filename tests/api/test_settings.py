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
from mlx_vlm_pipes.contexts import SamplingParams, TextContext
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.engine.scheduler import Scheduler
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.quantization import QuantizationEncoding
from tests.api.driving import STEPS, build, pipeline_config, prefill, relative, save
from tests.api.test_internvl import ROOM as INTERNVL
from tests.api.test_llama3 import ROOM as LLAMA
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
        self.scheduler = Scheduler(self.model, self.config, LLAMA.text_json["vocab_size"])
        self.slices: list[int] = []
        prepare = self.model.prepare_initial_token_inputs

        def noted(batches: Any, *arguments: Any, **named: Any) -> Any:
            self.slices.append(sum(c.tokens.active_length for batch in batches for c in batch))
            return prepare(batches, *arguments, **named)

        self.model.prepare_initial_token_inputs = noted

    def answer(self, prompt: str = PROMPT) -> list[int]:
        context = LLAMA.context(prompt, ignore_eos=True)
        assert isinstance(context, TextContext)
        context.sampling_params = SamplingParams(temperature=0.0, max_new_tokens=STEPS)
        handle = self.scheduler.submit(context, Silent())
        while self.scheduler.step():
            pass
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


def test_enable_chunked_prefill() -> None:
    runtime = RuntimeConfig(max_batch_input_tokens=20, enable_chunked_prefill=False)
    served = Served(runtime=runtime)
    assert served.answer() == LLAMA.greedy(PROMPT)
    assert served.slices == [86]


def test_max_batch_size() -> None:
    served = Served(runtime=RuntimeConfig(max_batch_size=1))
    assert served.config.max_batch_size == 1
    with pytest.raises(ValueError, match="max_batch_size"):
        Served(runtime=RuntimeConfig(max_batch_size=0))


def test_device_memory_utilization() -> None:
    budgets = [
        Served(kv_cache=KVCacheConfig(device_memory_utilization=share)).config.kv_bytes
        for share in (0.8, 0.4)
    ]
    assert budgets[0] > budgets[1] > 0
    assert budgets[0] - budgets[1] == pytest.approx(0.4 * MEMORY, rel=0.01)
    with pytest.raises(ConfigError, match="device_memory_utilization"):
        Served(kv_cache=KVCacheConfig(device_memory_utilization=1.5))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("max_num_steps", lambda: {"runtime": RuntimeConfig(max_num_steps=4)}),
        ("use_subgraphs", lambda: {"use_subgraphs": False}),
        ("draft_model", lambda: {"draft_model": ModelConfig()}),
        ("speculative", lambda: {"speculative": {"num_tokens": 2}}),
    ],
)
def test_what_has_no_reader_refuses_all_but_its_default(name: str, options: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        build(Llama3Model, LLAMA.folder, **options())
    assert "\n" not in str(caught.value)


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
