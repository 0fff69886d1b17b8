"""Checkpoints are lazy, and their parts can be addressed."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError, WeightsError
from mlx_vlm_pipes.weights import WeightData, cast_floats, load_state_dict, load_weights

from .conftest import WriteRaw


@pytest.fixture
def checkpoint(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    mlp = {"model.layers.0.mlp.weight": mx.ones((2, 3)), "model.layers.1.mlp.weight": mx.ones((1,))}
    mx.save_safetensors(str(paths[0]), mlp, metadata={"format": "pt"})
    mx.save_safetensors(str(paths[1]), {"ids": mx.array([1, 2])})
    return paths


def test_hierarchical_access(checkpoint: list[Path]) -> None:
    weights = load_weights(checkpoint)
    layer = weights.model.layers[0]
    assert [name for name, _ in layer.items()] == ["model.layers.0.mlp.weight"]
    assert layer.mlp.weight.exists()
    assert not layer.mlp.exists()
    assert layer.mlp.weight.data().shape == (2, 3)
    assert weights["ids"].data().dtype is DType.int32
    assert weights.metadata == {"format": "pt"}
    with pytest.raises(WeightsError, match=r"model\.layers\.7\.mlp"):
        weights.model.layers[7].mlp.data()


def test_nothing_is_read_before_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    mx.save_safetensors(str(path), {"w": mx.zeros((64, 1024, 1024), dtype=mx.uint8)})
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    state = load_state_dict(load_weights(path))
    cast = state["w"].astype(DType.float32)
    assert "zeros" not in repr(cast)
    assert cast.shape == (64, 1024, 1024)
    assert mx.get_peak_memory() - before < 1_000_000


def test_what_cannot_be_loaded_is_refused(checkpoint: list[Path], write_raw: WriteRaw) -> None:
    with pytest.raises(WeightsError, match=r"m\.gguf: cannot be read"):
        load_weights([Path("m.gguf")])
    with pytest.raises(WeightsError, match=r"all be \.safetensors, or one \.gguf"):
        load_weights([*checkpoint, Path("m.bin")])
    with pytest.raises(WeightsError, match=r"in both a\.safetensors and a\.safetensors"):
        load_weights([checkpoint[0], checkpoint[0]])
    double = {"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}
    with pytest.raises(WeightsError, match="'w' is float64"):
        load_weights(write_raw(double, bytes(8)))


def test_weight_data_casts_and_converts() -> None:
    weight = WeightData.from_numpy(np.array([1.5, -2.0], np.float32), "w")
    assert weight.astype(DType.bfloat16).to_buffer().dtype == mx.bfloat16
    with pytest.raises(ConfigError):
        WeightData.from_numpy(np.zeros(1, np.float64), "w")
    fp8 = WeightData(mx.array([0x38, 0xC0], dtype=mx.uint8), "w", DType.float8_e4m3fn, (2,))
    assert fp8.astype(DType.float32).data.tolist() == [1.0, -2.0]
    state = cast_floats({"w": weight, "fp8": fp8}, DType.float16)
    assert [w.dtype for w in state.values()] == [DType.float16, DType.float8_e4m3fn]
