"""Loading holds little more than the parameters: joined, cast and packed ones are made in turn."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.registry import find_room
from tests.engine.models import write_llama


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """103 MB of float32 in 14 layers."""
    folder = tmp_path_factory.mktemp("plain") / "llama"
    return write_llama(folder, layers=14, heads=8, kv_heads=2, hidden=512)


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bits: 14.5 MB."""
    folder = tmp_path_factory.mktemp("packed")
    tensors: dict[str, mx.array] = {}
    for name, array in mx.load(str(plain / "model.safetensors")).items():  # pyright: ignore[reportAttributeAccessIssue]  # of safetensors, a dict
        if array.ndim == 2:
            path = name.removesuffix("weight")
            parts = mx.quantize(array, group_size=64, bits=4)
            tensors |= zip([name, path + "scales", path + "biases"], parts, strict=True)
        else:
            tensors[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((plain / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("plain", "float32"), ("plain", "bfloat16"), ("packed", "float32"), ("packed", "bfloat16")],
)
def test_what_loading_takes(kind: str, dtype: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    config = read_config(folder)
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(find_room(config), folder, config, LoadOptions(dtype=dtype))
    active, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    assert model.weight_bytes > 12e6
    assert model.weight_bytes <= active <= 1.02 * model.weight_bytes
    assert peak <= 1.1 * model.weight_bytes
