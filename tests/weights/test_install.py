"""Strict installation: one error says all that is wrong."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.weights import install_weights, parameter_shapes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(4, 8, bias=False)


class Tiny(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.vision_model: Block = Block()
        self.language_model = nn.Module()
        self.language_model.layers = [Block() for _ in range(layers)]
        self.mlp1 = [nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)]


def tensors(module: nn.Module) -> dict[str, mx.array]:
    return {name: mx.full(shape, 2.0) for name, shape in parameter_shapes(module).items()}


def message(module: Tiny, weights: dict[str, mx.array]) -> str:
    before = id(module.vision_model.up_proj.weight)
    with pytest.raises(WeightsError) as caught:
        install_weights(module, weights)
    assert before == id(module.vision_model.up_proj.weight)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_parameter_gets_its_tensor_lists_included() -> None:
    module = Tiny()
    install_weights(module, tensors(module))
    installed = dict(tree_flatten(module.parameters()))
    assert installed["mlp1.2.weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert installed["language_model.layers.2.up_proj.weight"][0, 0].item() == 2.0
    assert "mlp1.1" not in " ".join(parameter_shapes(module))


def test_a_70b_model_is_compared_without_being_evaluated() -> None:
    layer = nn.Linear(8192, 1 << 20, bias=False)
    mx.reset_peak_memory()
    before = mx.get_active_memory()  # what earlier tests left
    install_weights(layer, {"weight": mx.zeros((1 << 20, 8192))})
    assert mx.get_peak_memory() - before < 1_000_000


def test_missing_unexpected_and_misshaped_are_named_together() -> None:
    module = Tiny()
    weights = tensors(module)
    del weights["mlp1.0.bias"]
    weights["strange"] = mx.zeros((1,))
    for n in range(3):
        weights[f"language_model.layers.{n}.up_proj.weight"] = mx.zeros((8, 5))
    text = message(module, weights)
    assert "1 missing: mlp1.0.bias" in text
    assert "1 unexpected: strange" in text
    assert "layers.N.up_proj.weight is [8, 5], expected [8, 4] (x3)" in text


def test_likely_causes() -> None:
    module = Tiny()
    full = tensors(module)
    no_vision = {name: w for name, w in full.items() if not name.startswith("vision")}
    assert "the whole vision_model is missing" in message(module, no_vision)
    prefixed = {f"model.inner.{name}": w for name, w in full.items()}
    assert "extra prefix 'model.inner.'" in message(module, prefixed)
    fewer = {name: w for name, w in full.items() if ".layers.2." not in name}
    assert "fewer layers than config.json says, from 2 on" in message(module, fewer)
    assert "more layers" in message(Tiny(2), full)
    scales = full | {"vision_model.up_proj.scales": mx.zeros((8, 1))}
    assert "no fitting quantization entry" in message(module, scales)
    gptq = full | {"vision_model.up_proj.qweight": mx.zeros((8, 1))}
    assert "does not declare" in message(module, gptq)
    packed = full | {"vision_model.up_proj.weight": mx.zeros((8, 4), dtype=mx.uint32)}
    assert "1 tensors are integers" in message(module, packed)
