"""Which quantisation a config.json declares, and which modules become packed ones."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_pipes.errors import CheckpointError, WeightsError
from mlx_vlm_pipes.quantization import QuantizationConfig
from mlx_vlm_pipes.weights import (
    Layout,
    ScaledFormat,
    canonical_overrides,
    decoder,
    install_weights,
    parameter_shapes,
    parse_quantization,
    quantize_modules,
)


def compressed(packing: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": packing, "config_groups": groups}


FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 64]}
PARSED = [
    (None, None),
    ({"group_size": 32, "bits": 6}, QuantizationConfig("mlx", 6, 32)),
    ({"mode": "nvfp4"}, QuantizationConfig("mlx", 4, 16, mode="nvfp4")),
    (
        {"group_size": 64, "bits": 4, "head": {"bits": 8, "group_size": 32}, "tower": False},
        QuantizationConfig(
            "mlx",
            4,
            64,
            overrides={"head": {"group_size": 32, "bits": 8, "mode": "affine"}, "tower": False},
        ),
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False},
        QuantizationConfig("gptq", 4, 128, desc_act=True, sym=False, mode="gptq"),
    ),
    (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"},
        QuantizationConfig("awq", 4, 64, mode="gemm"),
    ),
    (FP8_BLOCKS, ScaledFormat("fp8", "blockscaled-fp8", (128, 64))),
    ({"quant_method": "fbgemm_fp8"}, ScaledFormat("fbgemm_fp8", "fbgemm-fp8")),
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        ScaledFormat("modelopt", "nvfp4"),
    ),
    (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        ScaledFormat("compressed-tensors", "compressed-tensors-fp8"),
    ),
    (
        compressed("pack-quantized", num_bits=4, type="int", group_size=32, symmetric=False),
        QuantizationConfig("compressed-tensors", 4, 32, mode="pack-quantized"),
    ),
]


@pytest.mark.parametrize(("declared", "expected"), PARSED)
def test_declared_settings(declared: Any, expected: Any) -> None:
    key = "quantization_config" if declared and "quant_method" in declared else "quantization"
    assert parse_quantization({key: declared}) == expected
    assert parse_quantization({}) is None


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not read.*mlx-community"),
        ({"quant_method": "quark"}, "'quark' is not read"),
        ({"quant_method": ["gptq"]}, "is not read"),
        ({"bits": 7, "group_size": 64}, "7 bits"),
        ({"bits": -4, "group_size": 64}, "-4 bits"),
        ({"bits": 4, "group_size": "64"}, "groups of 64"),
        ({"bits": 4, "mode": "q4"}, "mode 'q4'"),
        ({"bits": [4]}, "bits"),
        ({"bits": 4, "some_module": "yes"}, "some_module"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "marlin"},
            "marl",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}, "gemv"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "positive"),
        (compressed("marlin-24", num_bits=4, type="int"), "marlin-24"),
        ("4bit", "not an object"),
    ],
)
def test_what_is_not_read_is_refused_by_name(declared: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_quantization({"quantization_config": declared})
    assert "\n" not in str(caught.value)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.embed_tokens = nn.Embedding(20, 64)
        self.language_model.layers = [nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 32)]


def quantised(settings: dict[str, tuple[int, int, str]]) -> tuple[dict[str, mx.array], Toy]:
    """Tensors as mlx-lm would write them, and the module that nn.quantize makes."""
    mx.random.seed(3)
    reference = Toy()

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in settings:
            return False
        return dict(zip(("group_size", "bits", "mode"), settings[path], strict=True))

    nn.quantize(reference, class_predicate=predicate)
    flat: Any = tree_flatten(reference.parameters())
    return dict(flat), reference


MIXED = {
    "language_model.embed_tokens": (32, 8, "affine"),
    "language_model.layers.0": (64, 4, "affine"),
    "language_model.layers.1": (32, 4, "mxfp4"),
}


def test_mixed_modules_become_packed_and_compute_like_mlx() -> None:
    tensors, reference = quantised(MIXED)
    config = {
        "group_size": 64,
        "bits": 4,
        "embed_tokens": {"bits": 8, "group_size": 32},  # without the leading language_model.
        "language_model.layers.1": {"mode": "mxfp4"},
        "language_model.layers.2": False,
    }
    settings = parse_quantization({"quantization": config})
    assert isinstance(settings, QuantizationConfig)
    module = Toy()
    quantize_modules(module, {n: tuple(a.shape) for n, a in tensors.items()}, settings)
    assert parameter_shapes(module) == {n: tuple(a.shape) for n, a in tensors.items()}
    install_weights(module, tensors)
    x, ids = mx.random.normal((3, 64)), mx.array([3, 19])
    ours, theirs = (dict(model.named_modules()) for model in (module, reference))
    for path in ("language_model.layers.0", "language_model.layers.1", "language_model.layers.2"):
        assert isinstance(ours[path], type(theirs[path]))
        assert mx.array_equal(ours[path](x), theirs[path](x))
    path = "language_model.embed_tokens"
    assert mx.array_equal(ours[path](ids), theirs[path](ids))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"group_size": 64, "bits": 8}, "shapes of 4 bits in groups of 64.*says 8 bits"),
        ({"group_size": 32, "bits": 4}, "shapes of 4 bits in groups of 64.*groups of 32"),
        ({"group_size": 64, "bits": 4, "language_model.layers.0": False}, "entry is false"),
    ],
)
def test_shapes_that_contradict_the_settings(config: dict[str, Any], message: str) -> None:
    tensors, _ = quantised({"language_model.layers.0": (64, 4, "affine")})
    settings = parse_quantization({"quantization": config})
    assert isinstance(settings, QuantizationConfig)
    with pytest.raises(WeightsError, match=message):
        quantize_modules(Toy(), {n: tuple(a.shape) for n, a in tensors.items()}, settings)


def test_overrides_follow_the_names_of_the_layout() -> None:
    overrides: dict[str, Any] = {
        "language_model.model.layers.1.mlp.up_proj": {"bits": 8},
        "model.norm": False,
        "model.layers.0.attn.qkv": {"bits": 6},
        "nowhere": True,
    }
    layout = Layout("mlx", decoder("language_model.model.", "language_model.lm_head."))
    renamed = canonical_overrides(QuantizationConfig("mlx", 4, 64, overrides=overrides), layout)
    assert renamed.overrides == {
        "language_model.layers.1.mlp.up_proj": {"bits": 8},
        "language_model.norm": False,
        "language_model.layers.0.attn.qkv": {"bits": 6},
        "nowhere": True,
    }
