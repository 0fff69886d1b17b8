"""The types that all documented architectures share, by their documentation."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.llama3 import Llama3Inputs, Llama3Model
from mlx_vlm_pipes.config import (
    KVCacheConfig,
    KVCacheParams,
    MAXModelConfig,
    ModelConfig,
    PipelineConfig,
    RuntimeConfig,
    upper_bounded_default,
    weights_format,
)
from mlx_vlm_pipes.contexts import (
    EOSTracker,
    ImageMetadata,
    SamplingParams,
    TextAndVisionContext,
    TextContext,
    TokenBuffer,
)
from mlx_vlm_pipes.dtypes import Device, DeviceRef, DeviceSpec, DType
from mlx_vlm_pipes.errors import ConfigError, ContextTooLong, InputError
from mlx_vlm_pipes.interfaces import (
    Buffer,
    InferenceSession,
    Model,
    ModelInputs,
    ModelOutputs,
    PipelineModel,
    ReturnHiddenStates,
    ReturnLogits,
)
from mlx_vlm_pipes.quantization import QuantizationEncoding
from mlx_vlm_pipes.weights import SafetensorWeights, WeightData, load_weights
from tests.fixtures_helper import FIXTURES

LLAMA = FIXTURES / "llama-tied"


def test_buffers_and_dtypes() -> None:
    assert Buffer is mx.array
    codes = {"bool": 1, "uint8": 134, "int64": 141, "bfloat16": 80, "float8_e4m3fn": 75}
    assert {name: DType[name].value for name in codes} == codes
    assert DType.bfloat16.to_mx() == mx.bfloat16
    assert DType.from_mx(mx.int32) is DType.int32
    assert (DType.float16.size_in_bytes, DType.float8_e5m2.is_float8()) == (2, True)
    assert DType.from_numpy(np.uint16).to_numpy() == np.uint16
    for lacking in (DType.float64, DType.float8_e4m3fn):
        with pytest.raises(ConfigError, match=lacking.name):
            lacking.to_mx()


def test_devices() -> None:
    assert DeviceRef("gpu", -3) == DeviceRef.GPU()
    assert len({DeviceRef.CPU(), DeviceRef("cpu", 0)}) == 1
    assert (str(DeviceRef.GPU(1)), DeviceRef.CPU().is_cpu()) == ("gpu:1", True)
    device = DeviceRef.CPU().to_device()
    assert isinstance(device, Device)
    assert (device.label, device.id, device.is_host) == ("cpu", 0, True)
    device.synchronize()
    assert DeviceRef.from_device(device) == DeviceSpec.cpu().to_ref() == DeviceRef.CPU()
    (default,) = ModelConfig().device_specs
    kind = "gpu" if mx.is_available(mx.gpu) else "cpu"
    assert default.device_type == kind


def test_a_session_loads_a_module() -> None:
    device = DeviceRef.CPU().to_device()
    session = InferenceSession(devices=[device])
    assert list(session.devices) == [device]
    weight = mx.array([[1.0, 2.0], [0.0, 3.0]])
    model = session.load(nn.Linear(2, 2, bias=False), {"weight": weight})
    assert isinstance(model, Model)
    assert model(mx.array([1.0, 1.0])).tolist() == [3.0, 3.0]
    assert [a.tolist() for a in model.execute(mx.array([1.0, 0.0]))] == [[1.0, 0.0]]
    np.testing.assert_array_equal(np.array(model.weights["weight"]), np.array(weight))
    with pytest.raises(ValueError, match="bias"):
        session.load(nn.Linear(2, 2), {"weight": weight})


def test_model_inputs_and_outputs() -> None:
    inputs = ModelInputs(lora_ids=mx.array([1]))
    inputs.update(lora_ids=None, lora_ranks=mx.array([4]), no_such_field=1)
    assert inputs.lora_ids is not None
    assert inputs.lora_ranks is not None
    assert inputs.lora_ranks.tolist() == [4]
    assert (inputs.kv_cache_inputs, inputs.hidden_states) == (None, None)
    assert "no_such_field" not in vars(inputs)
    with pytest.raises(NotImplementedError, match="ModelInputs"):
        _ = inputs.buffers
    with pytest.raises(TypeError):
        ModelInputs(mx.array([1]))  # pyright: ignore[reportCallIssue]  # keyword-only, as documented
    outputs = ModelOutputs(mx.array([[1.0]]))
    assert outputs.next_token_logits is outputs.logit_offsets is outputs.hidden_states is None
    plain = Llama3Inputs(mx.array([3]), mx.array([0, 1]), [mx.array([7])], mx.array([1]))
    assert [buffer.tolist() for buffer in plain.buffers] == [[3], [0, 1], [1], [7]]
    assert ReturnLogits.VARIABLE == "variable"
    assert ReturnHiddenStates.LAST_PER_DEVICE == "last_per_device"
    with pytest.raises(NotImplementedError, match="log-probabilities"):
        PipelineModel.compute_log_probabilities(
            object.__new__(Llama3Model),
            InferenceSession(),
            inputs,
            outputs,
            mx.array([1]),
            [1],
            [False],
        )


def test_kv_cache_parameters() -> None:
    params = KVCacheParams(DType.bfloat16, 8, 128, 32, [DeviceRef.CPU()])
    assert params.shape_per_block == [2, 32, 128, 8, 128]
    assert params.bytes_per_block == 16_777_216
    assert (params.dtype_shorthand, params.n_devices, params.tensor_parallel_degree) == (
        "bf16", 1, 1,
    )  # fmt: skip
    made = KVCacheConfig(kv_cache_page_size=16).to_params(DType.float32, 2, 8, 3, [DeviceRef.CPU()])
    assert (made.page_size, made.enable_prefix_caching) == (16, True)
    two = [DeviceRef.GPU(0), DeviceRef.GPU(1)]
    assert KVCacheParams(DType.float32, 4, 8, 1, two).n_kv_heads_per_device == 2
    with pytest.raises(ConfigError, match="3 KV heads"):
        KVCacheParams(DType.float32, 3, 8, 1, two)
    assert KVCacheConfig(kv_cache_format="float16").cache_dtype is DType.float16
    with pytest.raises(ConfigError, match="float8"):
        _ = KVCacheConfig(kv_cache_format="float8").cache_dtype


@pytest.mark.parametrize(
    ("encoding", "dtype", "cache", "packed"),
    [
        ("float32", DType.float32, DType.float32, None),
        ("bfloat16", DType.bfloat16, DType.bfloat16, None),
        ("q4_0", DType.uint8, DType.float32, QuantizationEncoding.Q4_0),
        ("q6_k", DType.uint8, DType.float32, QuantizationEncoding.Q6_K),
        ("gptq", DType.uint8, DType.bfloat16, QuantizationEncoding.GPTQ),
        ("float8_e4m3fn", DType.float8_e4m3fn, DType.bfloat16, None),
        ("float4_e2m1fnx2", DType.uint8, DType.bfloat16, None),
        ("mlx:float16", DType.float16, DType.float16, QuantizationEncoding.MLX),
    ],
)
def test_what_an_encoding_means(
    encoding: str, dtype: DType, cache: DType, packed: QuantizationEncoding | None
) -> None:
    config = ModelConfig(quantization_encoding=encoding)
    assert (config.dtype, config.cache_dtype) == (dtype, cache)
    assert config.graph_quantization_encoding is packed
    wide = ModelConfig(
        quantization_encoding=encoding, kv_cache=KVCacheConfig(kv_cache_format="float32")
    )
    assert wide.cache_dtype is DType.float32


@pytest.mark.parametrize("encoding", [None, "nonsense"])
def test_an_encoding_that_is_none(encoding: str | None) -> None:
    config = ModelConfig(quantization_encoding=encoding)
    for read in (
        lambda: config.dtype,
        lambda: config.graph_quantization_encoding,
        lambda: config.cache_dtype,
    ):
        with pytest.raises(ConfigError, match=encoding or "quantization_encoding") as caught:
            read()
        assert "\n" not in str(caught.value)
        if encoding is None:
            break  # the cache's default needs no encoding
    blocks = QuantizationEncoding.Q5_K
    assert (blocks.is_gguf, blocks.elements_per_block, blocks.block_size) == (True, 256, 176)


def test_pipeline_and_model_config() -> None:
    assert MAXModelConfig is ModelConfig
    pipeline = PipelineConfig(ModelConfig())
    assert pipeline.runtime == RuntimeConfig(None, 8192, True, -1)
    assert (pipeline.lora, pipeline.draft_model, pipeline.speculative) == (None, None, None)
    assert ModelConfig(model_path="/nowhere").huggingface_config is None
    with pytest.raises(ConfigError, match="/nowhere"):
        ModelConfig(model_path="/nowhere").require_huggingface_config()
    with pytest.raises(ConfigError, match="-1"):
        ModelConfig(max_length=-1)
    assert upper_bounded_default(9, None) == 9
    assert upper_bounded_default(9, 0) == 0
    with pytest.raises(ConfigError, match="10 exceeds the limit 9"):
        upper_bounded_default(9, 10)
    assert weights_format([Path("a.safetensors"), Path("b.safetensors")]) == "safetensors"
    for files in ([], [Path("a.safetensors"), Path("b.gguf")]):
        with pytest.raises(ConfigError, match="weight files"):
            weights_format(files)


def test_weights() -> None:
    files = [LLAMA / "model.safetensors"]
    weights = load_weights(files)
    assert isinstance(weights, SafetensorWeights)
    handles = dict(weights.items())
    data = handles["model.norm.weight"].data()
    assert (data.name, data.dtype, data.shape) == ("model.norm.weight", DType.float32, (64,))
    stored = np.array(mx.load(str(files[0]))["model.norm.weight"])  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]  # a dict
    np.testing.assert_array_equal(np.array(data.to_buffer()), stored)
    assert weights.model.layers[0].mlp.up_proj.weight.exists()
    assert not weights.model.layers[7].mlp.up_proj.weight.exists()
    half = WeightData.from_numpy(np.ones((2, 3), np.float32), "one").astype(DType.float16)
    assert (half.dtype, half.to_buffer().dtype, half.shape) == (DType.float16, mx.float16, (2, 3))
    with pytest.raises(ValueError, match=r"GGUF|gguf"):
        load_weights([Path("a.gguf"), Path("b.gguf")])


def test_token_buffers() -> None:
    tokens = TokenBuffer(np.array([5, 6, 7, 8]))
    assert tokens.all.dtype == np.int64
    assert (tokens.active_length, tokens.processed_length, tokens.current_position) == (4, 0, 4)
    tokens.chunk(3)
    assert (tokens.active.tolist(), tokens.current_position) == ([5, 6, 7], 3)
    tokens.advance_chunk()
    assert (tokens.active.tolist(), tokens.processed_length) == ([8], 3)
    tokens.advance_with_token(9)
    assert (tokens.generated.tolist(), tokens.active.tolist()) == ([9], [9])
    assert (tokens.prompt_length, tokens.generated_length, len(tokens)) == (4, 1, 5)
    tokens.rewind_processing(2)
    assert tokens.active.tolist() == [7, 8, 9]
    tokens.skip_processing(1)
    assert (tokens[-1], tokens[1:3].tolist()) == (9, [6, 7])
    tokens.reset_as_new_prompt()
    assert (tokens.prompt_length, tokens.active_length, tokens.generated_length) == (5, 5, 0)
    with pytest.raises(InputError, match="non-empty"):
        TokenBuffer(np.array([], np.int64))


def context(ids: list[int], **fields: object) -> TextContext:
    return TextContext(max_length=8, tokens=TokenBuffer(np.array(ids)), **fields)  # pyright: ignore[reportArgumentType]  # fields of a dataclass


def test_text_contexts_end_where_they_are_told() -> None:
    ends = context([1, 2], eos_tracker=EOSTracker(frozenset({9}), ((3, 4),)))
    for token, done in ((3, False), (4, True)):
        ends.update(token)
        assert ends.is_done is done
    again = context([1, 2], eos_tracker=EOSTracker(frozenset({9})), ignore_eos=True)
    assert again.is_initial_prompt
    again.update(9)
    assert not again.is_done
    assert not again.is_initial_prompt
    for _ in range(5):
        again.update(9)
    assert again.is_done  # eight tokens in all
    again.reset()
    assert (again.is_initial_prompt, again.tokens.prompt_length) == (True, 8)
    late = context(
        [1],
        eos_tracker=EOSTracker(frozenset({9})),
        sampling_params=SamplingParams(min_new_tokens=2),
    )
    for done in (False, False, True):
        late.update(9)
        assert late.is_done is done
    with pytest.raises(ContextTooLong, match="max_length 8"):
        context([1] * 7, sampling_params=SamplingParams(min_new_tokens=2))


def with_images(*spans: tuple[int, int], ids: list[int]) -> TextAndVisionContext:
    images = [ImageMetadata(a, b, np.zeros((1, 2), np.float32)) for a, b in spans]
    return TextAndVisionContext(
        max_length=64, tokens=TokenBuffer(np.array(ids)), vision_token_ids=[7, 8], images=images
    )


def test_contexts_with_images() -> None:
    made = with_images((1, 3), (4, 7), ids=[1, 7, 7, 2, 7, 8, 7, 3])
    assert (made.image_idx, len(made.next_images), made.needs_vision_encoding) == (0, 2, True)
    assert made.image_token_indices.dtype == np.int32
    assert made.image_token_indices.tolist() == [1, 2, 4, 6]  # 8 parts rows and gets no vision row
    made.tokens.chunk(3)
    made.tokens.advance_chunk()
    assert (made.image_idx, made.next_images) == (1, made.images[1:])
    made.update(5)
    assert not made.needs_vision_encoding
    for spans, message in (
        (((4, 7), (1, 3)), "order"),
        (((1, 9),), "leaves"),
        (((0, 3),), "not among the vision tokens"),
    ):
        with pytest.raises(InputError, match=message):
            with_images(*spans, ids=[1, 7, 7, 2, 7, 8, 7, 3])
    with pytest.raises(InputError, match=r"\[3, 3\)"):
        ImageMetadata(3, 3, np.zeros(1))
