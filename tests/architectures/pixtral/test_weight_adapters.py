"""Checkpoint names of all layouts become the same canonical ones, once and for all."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.pixtral.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.weights import WeightData, adapt, detect_layout
from tests.architectures.pixtral.test_model_config import V4, initialize

TEXT = ("embed_tokens.weight", "layers.1.self_attn.q_proj.weight", "norm.weight")
TOWER = (
    "patch_conv.weight", "ln_pre.weight", "transformer.layers.0.attention.o_proj.weight",
    "transformer.layers.2.feed_forward.gate_proj.weight", "transformer.layers.2.ffn_norm.weight",
)  # fmt: skip
PROJECTOR = ("linear_1.weight", "linear_1.bias", "linear_2.weight")
# text, head, tower, projector
PREFIXES = {
    "v4": ("language_model.model.", "language_model.", "vision_tower.", "multi_modal_projector."),
    "v5": (
        "model.language_model.", "", "model.vision_tower.", "model.multi_modal_projector.",
    ),
    "v5 other": (
        "model.language_model.", "", "model.vision_encoder.", "model.vision_projection.",
    ),
    "mlx-vlm": (
        "language_model.model.", "language_model.", "vision_tower.vision_model.",
        "multi_modal_projector.",
    ),
    "canonical": (
        "language_model.", "language_model.", "vision_model.", "multi_modal_projector.",
    ),
}  # fmt: skip
CONV = np.arange(48 * 64, dtype=np.float32).reshape(48, 1, 8, 8)


def state(layout: str) -> dict[str, WeightData]:
    text, head, tower, projector = PREFIXES[layout]
    names = (
        [text + n for n in TEXT] + [tower + n for n in TOWER] + [projector + n for n in PROJECTOR]
    )
    arrays: dict[str, np.ndarray] = {n: np.zeros(1, np.float32) for n in names}
    arrays[head + "lm_head.weight"] = np.zeros(1, np.float32)
    is_mlx = layout == "mlx-vlm"
    arrays[tower + "patch_conv.weight"] = CONV.transpose(0, 2, 3, 1) if is_mlx else CONV
    return {name: WeightData.from_numpy(array, name) for name, array in arrays.items()}


def mapped(weights: dict[str, WeightData]) -> dict[str, WeightData]:
    return adapt(weights, detect_layout(weights, LAYOUTS), transforms(initialize(V4)))


@pytest.mark.parametrize("layout", PREFIXES)
def test_names_are_canonical_and_a_second_run_changes_nothing(layout: str) -> None:
    once = mapped(state(layout))
    assert set(once) == set(state("canonical"))
    patch = np.array(once["vision_model.patch_conv.weight"].data)
    assert np.array_equal(patch, CONV.reshape(48, -1))  # (channel, y, x)
    twice = mapped(once)
    assert twice.keys() == once.keys()
    assert all(bool(mx.array_equal(twice[k].data, once[k].data)) for k in once)


def test_mistrals_own_layout_is_refused() -> None:
    names = [
        "layers.0.attention.wq.weight",
        "vision_encoder.ln_pre.weight",
        "tok_embeddings.weight",
    ]
    weights = {name: WeightData.from_numpy(np.zeros(1, np.float32), name) for name in names}
    with pytest.raises(WeightsError):
        mapped(weights)
