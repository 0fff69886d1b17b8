"""The activations, and the names of them that configurations are checked against."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import (
    ACTIVATIONS,
    LEARNED_ACTIVATIONS,
    HuggingFaceConfig,
    activation_name,
)
from mlx_vlm_pipes.nn.activations import _ACTIVATIONS, activation


def test_both_tables_have_the_same_names() -> None:
    assert set(ACTIVATIONS) == _ACTIVATIONS.keys()


@pytest.mark.parametrize("name", LEARNED_ACTIVATIONS)
def test_those_with_weights_are_refused_for_that(name: str) -> None:
    config = HuggingFaceConfig({"model_type": "llama", "hidden_act": name})
    with pytest.raises(ConfigError, match=f"hidden_act '{name}' has weights of its own"):
        activation_name(config, "hidden_act", default="silu")


@pytest.mark.reference
def test_all_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    table = pytest.importorskip("transformers.activations").ACT2FN
    assert table.keys() - set(ACTIVATIONS) == set(LEARNED_ACTIVATIONS)
    x = np.concatenate([np.linspace(-30, 30, 997), [0.0, -1e-3, 1e-3]]).astype(np.float32)
    for name in ACTIVATIONS:
        wanted = table[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(
            np.array(activation(name)(mx.array(x))), wanted, rtol=2e-6, atol=2e-6, err_msg=name
        )
