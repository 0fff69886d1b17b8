"""Adapters of mlx-lm, mlx-vlm and PEFT come out as the same pairs and merge to the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_vlm_pipes.errors import CheckpointError, WeightsError
from mlx_vlm_pipes.weights import (
    Layout,
    LoRAAdapter,
    check_against_base,
    decoder,
    dora_factor,
    linear_shapes,
    merge_into,
    read_adapter,
    split_lora_path,
)

LAYOUTS = (
    Layout("v4", decoder()),
    Layout("v5", decoder("model.language_model.")),
    Layout("mlx", decoder("language_model.model.", "language_model.lm_head.")),
)
PATH = "language_model.layers.3.self_attn.q_proj"
RNG = np.random.default_rng(4)
A, B, M = (RNG.normal(size=s).astype(np.float32) for s in ((2, 6), (5, 2), (5,)))
W = RNG.normal(size=(5, 6)).astype(np.float32)
PEFT: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"}
MLX: dict[str, Any] = {
    "fine_tune_type": "lora",
    "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.0},
}


def write(folder: Path, config: Any, tensors: dict[str, np.ndarray]) -> Path:
    file = "adapter_model" if "peft_type" in config else "adapters"
    arrays = {name: mx.array(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / f"{file}.safetensors"), arrays)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft(module: str = "model.layers.3.self_attn.q_proj", m: bool = False) -> dict[str, np.ndarray]:
    root = f"base_model.model.{module}"
    tensors = {f"{root}.lora_A.weight": A, f"{root}.lora_B.weight": B}
    return tensors | ({f"{root}.lora_magnitude_vector": M} if m else {})


def mlx(
    module: str = "language_model.model.layers.3.self_attn.q_proj", m: bool = False
) -> dict[str, np.ndarray]:
    tensors = {f"{module}.lora_a": A.T.copy(), f"{module}.lora_b": B.T.copy()}
    return tensors | ({f"{module}.m": M} if m else {})


LEGACY = {
    "model.layers.3.self_attn.q_proj.A": A.T.copy(),
    "model.layers.3.self_attn.q_proj.B": B.T.copy(),
}
CASES: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], float, bool]] = {
    "mlx-vlm": (MLX, mlx(), 4.0, False),
    "mlx-lm": (MLX, mlx("model.layers.3.self_attn.q_proj"), 4.0, False),
    "mlx dora": (MLX | {"fine_tune_type": "dora"}, mlx(m=True), 4.0, True),
    "mlx-vlm legacy": ({"rank": 2, "alpha": 8, "dropout": 0.1}, LEGACY, 4.0, False),
    "peft": (PEFT, peft(), 4.0, False),
    "peft v5 names": (PEFT, peft("model.language_model.layers.3.self_attn.q_proj"), 4.0, False),
    "peft rslora": (PEFT | {"use_rslora": True}, peft(), 8 / 2**0.5, False),
    "peft dora": (PEFT | {"use_dora": True}, peft(m=True), 4.0, True),
    "peft patterns": (
        PEFT | {"r": 9, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 3}},
        peft(),
        1.5,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_formats_give_the_same_pairs(case: str, tmp_path: Path) -> None:
    config, tensors, scale, dora = CASES[case]
    adapter = read_adapter(write(tmp_path, config, tensors), "mine", LAYOUTS)
    assert (adapter.name, adapter.rank, list(adapter.layers)) == ("mine", 2, [PATH])
    pair = adapter.layers[PATH]
    np.testing.assert_array_equal(np.array(pair.a), A)
    np.testing.assert_array_equal(np.array(pair.b), B)
    assert pair.scale == pytest.approx(scale)

    expected = W + scale * B @ A
    if dora:
        factor = M / np.linalg.norm(expected, axis=1)
        np.testing.assert_allclose(np.array(dora_factor(mx.array(W), pair)), factor, rtol=1e-5)
        expected = factor[:, None] * expected
    else:
        assert dora_factor(mx.array(W), pair) is None
    np.testing.assert_allclose(np.array(merge_into(mx.array(W), pair)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (PEFT | {"bias": "all"}, peft(), "bias=all"),
        (PEFT | {"modules_to_save": ["lm_head"]}, peft(), "modules_to_save"),
        (PEFT | {"peft_type": "IA3"}, peft(), "IA3"),
        (PEFT | {"r": 3}, peft(), "rank 2, declared"),
        (PEFT | {"r": "2"}, peft(), "expected a number"),
        (PEFT | {"alpha_pattern": {"(a+)+$": 1}}, peft(), "regular expression"),
        (PEFT, {}, "no LoRA tensors"),
        (PEFT, peft("strange.q_proj"), "of another model; it adapts strange.q_proj"),
        (PEFT, {**peft(), "other.weight": A}, "1 tensors are no LoRA pairs: other.weight"),
        (PEFT, {"base_model.model.model.layers.3.q.lora_A.weight": A}, "lack a half"),
        (PEFT, {**peft(), **dict.fromkeys(list(peft())[1:], A)}, "no \\[r, in\\]"),
        (MLX, mlx() | {"x.m": M}, "lack a half: x"),
        (MLX | {"fine_tune_type": "full"}, mlx(), "full"),
        (MLX | {"lora_parameters": {"rank": 3, "scale": 1}}, mlx(), "not of the declared rank 3"),
        (MLX | {"lora_parameters": {"rank": 2, "alpha": 1}}, mlx(), "scale"),
        ({"fine_tune_type": "lora"}, mlx(), "neither lora_parameters nor peft_type"),
    ],
)
def test_what_is_wrong_is_named(
    config: dict[str, Any], tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(write(tmp_path, config, tensors), "mine", LAYOUTS)
    assert "\n" not in str(caught.value)


def test_folder_problems_and_rank_limit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        read_adapter(tmp_path / "absent", "mine", LAYOUTS)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path, "mine", LAYOUTS)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    with pytest.raises(WeightsError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path, "mine", LAYOUTS)
    write(tmp_path, PEFT, peft())
    with pytest.raises(WeightsError, match="above max_lora_rank 1"):
        read_adapter(tmp_path, "mine", LAYOUTS, max_rank=1)
    assert split_lora_path("mine=a/b") == ("mine", Path("a/b"))
    assert split_lora_path("a/b") == ("b", Path("a/b"))


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    adapter: LoRAAdapter = read_adapter(write(tmp_path, PEFT, peft()), "mine", LAYOUTS)
    check_against_base(adapter, {PATH: (5, 6)})
    with pytest.raises(WeightsError, match=r"\(5, 6\), the model's \(5, 7\)"):
        check_against_base(adapter, {PATH: (5, 7)})
    with pytest.raises(WeightsError, match="1 linears that the model lacks"):
        check_against_base(adapter, {})
    base = nn.Module()
    base.plain = nn.Linear(64, 5)
    base.packed = [nn.QuantizedLinear(64, 5, bits=3, group_size=32)]
    assert linear_shapes(base) == {"plain": (5, 64), "packed.0": (5, 64)}
