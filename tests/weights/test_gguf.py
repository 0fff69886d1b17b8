"""GGUF files against the safetensors they were made of, and the `gguf` package's own arithmetic."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import UnsupportedModel, WeightsError
from mlx_vlm_pipes.loading import load
from mlx_vlm_pipes.quantization import QuantizationEncoding
from mlx_vlm_pipes.weights import GGUFWeights, load_state_dict, load_weights
from tests.fixtures_helper import FIXTURES, arguments, reference
from tests.gguf_file import pairs_together, write, write_case

gguf = pytest.importorskip("gguf", reason="the gguf package writes these files")

BLOCKS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q8_0": 8}
EXPANDED = ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
ENTRIES = {
    "general.architecture": "llama", "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}  # fmt: skip


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Blocks of random codes whose scales, the float16 numbers among them, are of a usual size."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2),
          "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,))  # fmt: skip
    for start in at:
        scales = rng.normal(0, 0.02, made.shape[:2]).astype(np.float16)
        made[..., start : start + 2] = scales[..., None].view(np.uint8)
    return made.reshape(rows, -1)


def expected(raw: np.ndarray, kind: str) -> np.ndarray:
    return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("case", ["llama-tied", "llama-stop"])
def test_a_file_gives_the_logits_of_the_folder_that_it_was_made_of(
    tmp_path: Path, case: str
) -> None:
    file = write_case(tmp_path / "model.gguf", case)
    facts, arrays = reference(FIXTURES / case)
    with load(file) as ours, load(FIXTURES / case) as theirs:
        for fact in facts["prompts"]:
            given: dict[str, Any] = arguments(FIXTURES / case, fact)
            ids = ours.encode(**given).input_ids
            assert list(ids) == arrays[f"{fact['name']}/input_ids"].tolist()
            assert np.array_equal(ours.logits(**given), theirs.logits(**given))


@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_blocks_are_repacked_without_loss(tmp_path: Path, kind: str) -> None:
    raw = blocks(kind, 64, 512)
    file = write(tmp_path / "m.gguf", ENTRIES, {"blk.0.ffn_up.weight": (raw, kind)})
    state = load_state_dict(load_weights(file))
    weight, scales, biases = (state[f"blk.0.ffn_up.{p}"] for p in ("weight", "scales", "biases"))
    assert weight.quantization_encoding is QuantizationEncoding.__members__.get(kind)
    assert (weight.dtype, scales.dtype) == (DType.uint32, DType.float16)
    assert all(part.shape == tuple(part.data.shape) for part in (weight, scales, biases))
    wide = [part.astype(DType.float32).data for part in (scales, biases)]
    found = mx.dequantize(weight.data, *wide, group_size=32, bits=BLOCKS[kind])
    # one rounding of a product and a sum, in another order than numpy's
    assert np.allclose(np.array(found), expected(raw, kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", EXPANDED)
def test_other_blocks_are_expanded(tmp_path: Path, kind: str) -> None:
    raw = blocks(kind, 8, 512)
    file = write(tmp_path / "m.gguf", ENTRIES, {"blk.0.ffn_up.weight": (raw, kind)})
    weight = GGUFWeights(file).blk[0].ffn_up.weight.data()
    assert (weight.dtype, weight.shape) == (DType.float16, (8, 512))
    assert weight.data.dtype == mx.float16
    assert np.array_equal(np.array(weight.astype(DType.float32).data), expected(raw, kind))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_floats_are_as_they_are(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    file = write(tmp_path / "m.gguf", ENTRIES, {"blk.0.ffn_up.weight": (values, kind)})
    weight = GGUFWeights(file).blk[0].ffn_up.weight.data()
    dtype = {"F16": DType.float16, "BF16": DType.bfloat16}[kind]
    assert (weight.dtype, weight.data.dtype) == (dtype, dtype.to_mx())
    narrow = mx.array(values).astype(dtype.to_mx())
    assert mx.array_equal(weight.data, narrow)


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q6_K"])
def test_rows_of_queries_and_keys_are_put_back(tmp_path: Path, kind: str) -> None:
    columns = 256
    for name, heads in {"attn_q": 4, "attn_k": 2}.items():
        plain = np.arange(heads * 8, dtype=np.float32)[:, None].repeat(columns, axis=1)
        stored: Any = pairs_together(plain, heads)
        want = plain
        if kind != "F32":
            stored = blocks(kind, heads * 8, columns)
            order = np.argsort(pairs_together(plain, heads)[:, 0])
            want = expected(stored[order], kind)
        file = write(tmp_path / f"{name}.gguf", ENTRIES, {f"blk.3.{name}.weight": (stored, kind)})
        state = load_state_dict(load_weights(file))
        found = state[f"blk.3.{name}.weight"].astype(DType.float32).data
        if kind == "Q4_1":
            parts = [state[f"blk.3.{name}.{p}"].astype(DType.float32).data
                     for p in ("scales", "biases")]  # fmt: skip
            found = mx.dequantize(found, *parts, group_size=32, bits=4)
        assert np.allclose(np.array(found), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_packed_model_answers_as_its_expanded_twin(tmp_path: Path, kind: str) -> None:
    prompt = [{"role": "user", "content": "What is this?"}]
    files = [
        write_case(tmp_path / "packed.gguf", "llama-tied", kind),
        write_case(tmp_path / "plain.gguf", "llama-tied", "F32", rounded=kind),
    ]
    found = []
    for file in files:
        with load(file) as pipe:
            found.append(pipe.logits(prompt))
    assert np.abs(found[0] - found[1]).max() < 1e-4 * np.abs(found[1]).max()


def test_only_one_file_and_only_what_a_model_is(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", ENTRIES, {"blk.0.ffn_up.weight": (np.ones((2, 2)), "F32")})
    with pytest.raises(WeightsError, match="2 GGUF files"):
        load_weights([file, file])
    vision = write(tmp_path / "mmproj.gguf", {"general.architecture": "clip"}, {})
    with pytest.raises(UnsupportedModel, match="vision part"):
        load_weights(vision)


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    values = np.ones((64, 64), np.float32)
    file = write(tmp_path / "m.gguf", ENTRIES, {"blk.0.ffn_up.weight": (values, "F32")})
    (weight,) = load_state_dict(load_weights(file)).values()
    again = weight.renamed("other").astype(DType.float16)
    assert (again.name, again.nbytes, math.prod(again.shape)) == ("other", 8192, 4096)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="changed meanwhile"):
        _ = again.data
