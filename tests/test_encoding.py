"""ModelConfig.resolve(): the encoding of the weights, the one asked for, contradictions."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import load as load_pipeline
from mlx_vlm_pipes.architectures.idefics3.model_config import Idefics3Config
from mlx_vlm_pipes.config import KVCacheConfig, ModelConfig, PipelineConfig, weights_format
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.interfaces import InferenceSession
from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs
from mlx_vlm_pipes.quantization import LoRAConfig, QuantizationEncoding
from mlx_vlm_pipes.registry import find_room
from mlx_vlm_pipes.weights import find_weight_files, load_weights
from tests.device import device, device_spec
from tests.fixtures_helper import FIXTURES
from tests.gguf_file import write_case
from tests.test_check import copy_case, edit_json, edit_tensors

LLAMA = FIXTURES / "llama-tied"
IDS = np.arange(5, 25)


def by_hand(
    folder: Path, encoding: str | None = None, lora: LoRAConfig | None = None, **options: Any
) -> Any:
    """A pipeline model made as the documentation makes it."""
    config = ModelConfig(
        model_path=str(folder),
        weight_path=find_weight_files(folder),
        quantization_encoding=encoding,
        device_specs=[device_spec()],
        **options,
    )
    chosen = device()
    return find_room(config.huggingface_config).model_class()(
        PipelineConfig(model=config, lora=lora),
        InferenceSession([chosen]),
        [chosen],
        config.kv_cache,
        load_weights(config.weight_path),
    )


def last_logits(model: Any) -> np.ndarray:
    cache = KVCache(model.kv_params)
    kv = cache_inputs(cache, [cache.new_row()])
    context = TextContext(max_length=256, tokens=TokenBuffer(IDS))
    return np.array(model.execute(model.prepare_initial_token_inputs([[context]], kv)).logits[0])


def loaded_logits(folder: Path, dtype: str) -> np.ndarray:
    pipe = load_pipeline(folder, dtype=dtype)
    context = TextContext(max_length=256, tokens=TokenBuffer(IDS))
    try:
        return pipe.engine.prompt_logits(context)[-1]
    finally:
        pipe.close()


def mlx_folder(tmp_path: Path) -> Path:
    options = ConvertOptions(
        model=LLAMA, out=tmp_path / "mlx", bits=4, group_size=32, dtype="float16", measure=False
    )
    convert(options)
    return tmp_path / "mlx"


def gptq_folder(tmp_path: Path) -> Path:
    folder = copy_case("llama-tied", tmp_path / "gptq")
    declared = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    edit_json(folder, "config.json", lambda c: c.update(quantization_config=declared))
    numbers = np.random.default_rng(0)

    def pack(arrays: dict[str, mx.array]) -> None:
        for name in [n for n in arrays if n.endswith("_proj.weight")]:
            rows, columns = arrays.pop(name).shape
            module, groups = name.removesuffix(".weight"), columns // 32
            codes = numbers.integers(-(2**31), 2**31, (columns // 8, rows)).astype(np.int32)
            arrays |= {
                f"{module}.qweight": mx.array(codes),
                f"{module}.qzeros": mx.zeros((groups, rows // 8), mx.int32),
                f"{module}.scales": mx.full((groups, rows), 0.02, mx.float16),
            }

    edit_tensors(folder, pack)
    return folder


def fp8(folder: Path, inside: str) -> Path:
    """Matrices whose name holds `inside`, as float8 bytes with one scale each."""
    edit_json(
        folder, "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"})
    )

    def scale(arrays: dict[str, mx.array]) -> None:
        for name in [n for n in arrays if inside in n and n.endswith(".weight")]:
            if arrays[name].ndim == 2 and "norm" not in name and "embed" not in name:
                arrays[name] = mx.to_fp8(arrays[name].astype(mx.float32) * 100)
                arrays[f"{name}_scale"] = mx.array([0.01])

    edit_tensors(folder, scale)
    declare_fp8(folder / "model.safetensors", inside)
    return folder


def declare_fp8(path: Path, inside: str) -> None:
    """MLX saves float8 as bytes: say in the header what they are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if inside in name and entry.get("dtype") == "U8":
            entry["dtype"] = "F8_E4M3"
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def test_floats_by_hand_without_a_label() -> None:
    model = by_hand(LLAMA)
    config = model.pipeline_config.model
    assert config.quantization_encoding == "float32"
    assert config.graph_quantization_encoding is None
    assert model.dtype is model.kv_params.dtype is DType.float32
    np.testing.assert_allclose(last_logits(model), loaded_logits(LLAMA, "float32"), atol=1e-5)


def test_resolve_fills_in_the_files_and_says_the_same_twice() -> None:
    config = ModelConfig(model_path=str(LLAMA))
    assert config.resolve() is config
    assert config.weight_path == find_weight_files(LLAMA)
    assert config.resolve().quantization_encoding == "float32"


@pytest.mark.parametrize(
    ("label", "encoding", "dtype"),
    [
        (None, "mlx", DType.float16),
        ("mlx", "mlx", DType.float16),
        ("float32", "mlx:float32", DType.float32),
        ("bfloat16", "mlx:bfloat16", DType.bfloat16),
    ],
)
def test_a_packed_mlx_folder(
    label: str | None, encoding: str, dtype: DType, tmp_path: Path
) -> None:
    folder = mlx_folder(tmp_path)
    model = by_hand(folder, label)
    config = model.model_config
    assert model.pipeline_config.model.quantization_encoding == encoding
    assert config.model_quantization_encoding is QuantizationEncoding.MLX
    assert config.quantization_config.bits == 4
    assert config.dtype is model.kv_params.dtype is dtype
    if label == "float32":
        expected = loaded_logits(folder, "float32")
        np.testing.assert_allclose(last_logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("label", "dtype", "cache"),
    [
        (None, DType.uint8, DType.bfloat16),
        ("gptq", DType.uint8, DType.bfloat16),
        ("float32", DType.float32, DType.float32),
    ],
)
def test_a_gptq_folder(label: str | None, dtype: DType, cache: DType, tmp_path: Path) -> None:
    folder = gptq_folder(tmp_path)
    model = by_hand(folder, label)
    assert model.model_config.model_quantization_encoding is QuantizationEncoding.GPTQ
    assert model.model_config.quantization_config.quant_method == "gptq"
    assert model.model_config.dtype is dtype
    assert model.kv_params.dtype is cache
    expected = loaded_logits(folder, "float32")
    bar = 1e-5 if label == "float32" else 0.05  # a bfloat16 cache
    np.testing.assert_allclose(last_logits(model), expected, atol=bar * np.abs(expected).max())


def test_a_float8_folder(tmp_path: Path) -> None:
    folder = fp8(copy_case("llama-tied", tmp_path / "fp8"), "_proj")
    model = by_hand(folder)
    assert model.pipeline_config.model.quantization_encoding == "float8_e4m3fn"
    assert model.dtype is DType.float8_e4m3fn
    assert model.kv_params.dtype is DType.bfloat16
    assert model.model_config.quantization_config is None
    assert model.model_config.quant_config.format == "compressed-tensors-fp8"
    assert model.model_config.quant_config.mlp_quantized_layers == {0, 1, 2}
    as_float = by_hand(folder, "float32")
    assert as_float.model_config.dtype is DType.float32
    assert as_float.model_config.quant_config is not None
    expected = last_logits(as_float)
    np.testing.assert_allclose(last_logits(model), expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
    "label", ["gptq", "q4_0", "q4_k", "q6_k", "float8_e4m3fn", "float4_e2m1fnx2", "mlx"]
)
def test_a_label_that_float_weights_contradict(label: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{label}'.*float32") as caught:
        by_hand(LLAMA, label)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("label", ["gptq", "float8_e4m3fn", "q4_0"])
def test_a_label_that_packed_weights_contradict(label: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"'{label}'.*mlx"):
        by_hand(mlx_folder(tmp_path), label)


def test_declared_but_not_packed_is_plain_floats(tmp_path: Path) -> None:
    folder = copy_case("llama-tied", tmp_path / "model")
    declared = {"bits": 4, "group_size": 32}
    edit_json(folder, "config.json", lambda c: c.update(quantization=declared))
    model = by_hand(folder)
    assert model.pipeline_config.model.quantization_encoding == "float32"
    assert model.model_config.quantization_config is None


@pytest.mark.parametrize("label", ["nonsense", "mlx:int8", "float32:mlx", "gptq:", "", "FLOAT32"])
def test_nonsense_is_a_config_error_everywhere(label: str) -> None:
    config = ModelConfig(model_path=str(LLAMA), quantization_encoding=label)
    reads = (
        lambda: config.dtype,
        lambda: config.cache_dtype,
        lambda: config.graph_quantization_encoding,
        config.resolve,
    )
    for read in reads:
        with pytest.raises(ConfigError, match="quantization_encoding"):
            read()


def test_an_explicit_cache_format_wins() -> None:
    model = by_hand(LLAMA, kv_cache=KVCacheConfig(kv_cache_format="bfloat16"))
    assert model.kv_params.dtype is DType.bfloat16


@pytest.mark.parametrize(
    ("inside", "vision", "text"), [("visual.", True, False), ("model.layers", False, True)]
)
def test_each_part_has_its_own_record_of_scales(
    inside: str, vision: bool, text: bool, tmp_path: Path
) -> None:
    folder = fp8(copy_case("qwen25vl", tmp_path / "model"), inside)
    config = by_hand(folder, "float32").model_config
    found, depth = config.vision_config.quant_config, config.vision_config.depth
    assert (found is not None) is vision
    assert (config.llm_config.quant_config is not None) is text
    if found is not None:
        assert found.weight_scale.granularity == "tensor"
        assert found.mlp_quantized_layers == found.attn_quantized_layers == set(range(depth))


@pytest.mark.parametrize(
    "case", ["idefics3", "pixtral", "internvl-qwen3", "qwen25vl", "llama-tied"]
)
def test_the_explicit_model_config_reaches_every_dtype(case: str) -> None:
    folder = str(FIXTURES / case)
    draft = ModelConfig(model_path=folder, quantization_encoding="bfloat16")
    pipeline = PipelineConfig(
        ModelConfig(model_path=folder, quantization_encoding="float32"), draft_model=draft
    )
    config_class = find_room(draft.huggingface_config).model_class().config_class
    config = config_class.initialize(pipeline, draft)
    assert config.get_kv_params().dtype is DType.bfloat16
    if isinstance(config, Idefics3Config):
        assert config.vision_config.dtype is config.text_config.dtype is DType.bfloat16


def test_gguf_encodings_name_what_is_stored(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package writes the file")
    file = write_case(tmp_path / "m.gguf", "llama-tied", "Q4_0")
    files = {"model_path": str(file), "weight_path": [file], "device_specs": [device_spec()]}
    assert weights_format([file]) == "gguf"
    config = ModelConfig(quantization_encoding="q4_0", **files).resolve()
    assert config.graph_quantization_encoding is QuantizationEncoding.Q4_0
    assert (config.dtype, config.cache_dtype) == (DType.uint8, DType.float32)
    assert ModelConfig(**files).resolve().quantization_encoding == "mlx"
    np.testing.assert_array_equal(
        last_logits(by_hand(file, "q4_0")), loaded_logits(file, "float32")
    )
    with pytest.raises(ConfigError, match="q6_k"):
        ModelConfig(quantization_encoding="q6_k", **files).resolve()
