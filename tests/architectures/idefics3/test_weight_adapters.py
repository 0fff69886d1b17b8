"""Checkpoint names of both layouts become the same canonical ones, once and for all."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.idefics3 import Idefics3Config
from mlx_vlm_pipes.architectures.idefics3.weight_adapters import LAYOUTS, transforms
from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.weights import WeightData, adapt, detect_layout
from tests.architectures.driving import pipeline_config
from tests.architectures.idefics3.test_model_config import V4

NAMES = {  # Hugging Face: mlx-vlm
    "model.text_model.embed_tokens.weight": "language_model.embed_tokens.weight",
    "model.text_model.layers.1.mlp.up_proj.weight": "language_model.layers.1.mlp.up_proj.weight",
    "model.text_model.norm.weight": "language_model.norm.weight",
    "lm_head.weight": "language_model.lm_head.weight",
    "model.vision_model.embeddings.position_embedding.weight":
        "vision_model.embeddings.position_embedding.weight",
    "model.vision_model.encoder.layers.0.self_attn.out_proj.bias":
        "vision_model.encoder.layers.0.self_attn.out_proj.bias",
    "model.vision_model.post_layernorm.bias": "vision_model.post_layernorm.bias",
    "model.connector.modality_projection.proj.weight":
        "connector.modality_projection.proj.weight",
}  # fmt: skip
PATCH = "vision_model.embeddings.patch_embedding.weight"


def data(name: str, array: np.ndarray | None = None) -> WeightData:
    return WeightData.from_numpy(np.zeros(1, np.float32) if array is None else array, name)


def mapped(state: dict[str, WeightData]) -> dict[str, WeightData]:
    config = Idefics3Config.initialize(pipeline_config(V4))
    return adapt(state, detect_layout(state, LAYOUTS), transforms(config.vision_config))


@pytest.mark.parametrize("is_mlx", [False, True], ids=["huggingface", "mlx-vlm"])
def test_names_are_canonical_and_a_second_run_changes_nothing(is_mlx: bool) -> None:
    torch = np.arange(48 * 1 * 14 * 14, dtype=np.float32).reshape(48, 1, 14, 14)
    patch = torch.transpose(0, 2, 3, 1) if is_mlx else torch
    names, prefix = (NAMES.values(), "") if is_mlx else (NAMES.keys(), "model.")
    state = {name: data(name) for name in names} | {prefix + PATCH: data(PATCH, patch)}
    once = mapped(state)
    assert set(once) == {*NAMES.values(), PATCH}
    assert np.array_equal(np.array(once[PATCH].data), torch.reshape(48, -1))  # (channel, y, x)
    twice = mapped(once)
    assert twice.keys() == once.keys()
    assert all(bool(mx.array_equal(twice[k].data, once[k].data)) for k in once)


def test_unknown_names_are_refused() -> None:
    state = {name: data(name) for name in [*NAMES, "model.perceiver.latents"]}
    with pytest.raises(WeightsError, match=r"model\.perceiver\.latents"):
        mapped(state)
