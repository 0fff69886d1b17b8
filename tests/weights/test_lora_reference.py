"""Adapters that PEFT itself wrote, merged as PEFT merges them. Needs torch and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.weights import merge_into, read_adapter
from mlx_vlm_pipes.weights.layout import TEXT_LAYOUTS

OPTIONS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"layers.0.q_proj": 2}, "alpha_pattern": {"layers.0.v_proj": 5}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_merged_weights_equal_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(2)
    layer = torch.nn.ModuleDict({name: torch.nn.Linear(12, 10) for name in ("q_proj", "v_proj")})
    layers = torch.nn.ModuleDict({"0": layer})
    base = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})
    weights = {name: linear.weight.detach().clone().numpy() for name, linear in layer.items()}
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], **options)
    adapted = peft.get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path))
    merged = adapted.merge_and_unload()["model"]["layers"]["0"]

    adapter = read_adapter(tmp_path, "theirs", TEXT_LAYOUTS)
    assert len(adapter.layers) == 2
    for name, weight in weights.items():
        pair = adapter.layers[f"language_model.layers.0.{name}"]
        expected = merged[name].weight.detach().numpy()
        np.testing.assert_allclose(
            np.array(merge_into(mx.array(weight), pair)), expected, atol=1e-5
        )
