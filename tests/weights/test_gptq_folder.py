"""A whole GPTQ folder, with the all-zero biases that AutoGPTQ writes for every packed layer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import check, convert, load
from mlx_vlm_pipes.errors import WeightsError
from tests.fixtures_helper import FIXTURES

from .test_repack import pack_down

PACKED = re.compile(r".*layers\.\d+\.(self_attn|mlp|attention|feed_forward)\.\w+\.weight")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def write_pair(case: str, target: Path) -> tuple[Path, Path]:
    """The fixture with its decoder's matrices in 4 bits, as GPTQ and multiplied out."""
    packed, plain = target / "packed", target / "plain"
    for folder in (packed, plain):
        shutil.copytree(FIXTURES / case, folder, ignore=shutil.ignore_patterns("reference*"))
    arrays = mx.load(str(plain / "model.safetensors"))
    assert isinstance(arrays, dict)
    gptq: dict[str, mx.array] = {}
    rng = np.random.default_rng(0)
    for name, array in list(arrays.items()):
        if "vision" in name or not PACKED.fullmatch(name) or array.ndim != 2 or array.shape[1] % 32:
            gptq[name] = array
            continue
        rows, columns = array.shape
        codes = rng.integers(0, 16, (columns, rows))
        scales = rng.uniform(0.01, 0.02, (columns // 32, rows)).astype(np.float32)
        arrays[name] = mx.array((scales.repeat(32, axis=0) * (codes - 8)).T)
        module = name.removesuffix(".weight")
        gptq[f"{module}.qweight"] = mx.array(pack_down(codes, 4))
        gptq[f"{module}.scales"] = mx.array(scales)
        gptq[f"{module}.bias"] = arrays.get(f"{module}.bias", mx.zeros(rows))
    assert len(gptq) > len(arrays)
    for folder, tensors in ((packed, gptq), (plain, arrays)):
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": GPTQ}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


CASES = ["llama-tied", "idefics3", "pixtral", "internvl-qwen3", "qwen25vl"]


@pytest.mark.parametrize("case", CASES)
def test_dummy_biases_change_nothing(case: str, tmp_path: Path) -> None:
    packed, plain = write_pair(case, tmp_path)
    prompt = "a quick fox"
    ours = load(packed, dtype="float32").logits(prompt)
    expected = load(plain, dtype="float32").logits(prompt)
    np.testing.assert_allclose(np.array(ours), np.array(expected), atol=2e-5)
    assert check.main([str(packed)]) == 0
    written = tmp_path / "written"
    assert convert.main(["--model", str(packed), "--out", str(written), "--no-measure"]) == 0
    again = load(written, dtype="float32").logits(prompt)
    np.testing.assert_allclose(np.array(again), np.array(expected), atol=2e-5)


def test_a_bias_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    packed, _ = write_pair("qwen25vl", tmp_path)
    arrays = mx.load(str(packed / "model.safetensors"))
    assert isinstance(arrays, dict)
    (name,) = (name for name in arrays if name.endswith("layers.1.mlp.up_proj.bias"))
    arrays[name] = mx.ones(arrays[name].shape)
    mx.save_safetensors(str(packed / "model.safetensors"), arrays)
    with pytest.raises(WeightsError, match=r"1 unexpected: .*up_proj\.bias"):
        load(packed)
