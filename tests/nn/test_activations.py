"""The activations, and the names of them that configurations are checked against."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_pipes import load
from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.hf_config import ACTIVATIONS
from mlx_vlm_pipes.nn.activations import _ACTIVATIONS, _LEARNED, XIELU, PReLU, activation
from tests.fixtures_helper import copy_case

NUMBERS = {"weight": 0.4, "alpha_p": 0.3, "alpha_n": -1.7, "beta": 0.3, "eps": -1e-3}


def test_both_tables_have_the_same_names() -> None:
    assert set(ACTIVATIONS) == _ACTIVATIONS.keys() | _LEARNED.keys()


@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_their_weights_have_to_be_in_the_files(name: str, tmp_path: Path) -> None:
    folder = copy_case("llama-tied", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": name}))
    first = "weight" if name == "prelu" else "alpha_p"
    with pytest.raises(WeightsError, match=rf"missing: .*mlp\.act_fn\.{first}"):
        load(folder)


@pytest.mark.reference
@pytest.mark.parametrize("name", ["prelu", "xielu"])
@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-6), ("bfloat16", 8e-3)])
def test_those_with_weights_are_those_of_transformers(name: str, dtype: str, near: float) -> None:
    torch = pytest.importorskip("torch")
    table = pytest.importorskip("transformers.activations").ACT2FN
    ours: Any = activation(name)
    assert isinstance(ours, PReLU | XIELU)
    theirs = table[name]
    if name == "prelu":  # the other one is in bfloat16 from the start
        theirs = theirs.to(getattr(torch, dtype))
    state = theirs.state_dict()
    parameters = dict(tree_flatten(ours.parameters()))
    assert {n: list(a.shape) for n, a in state.items()} == {
        n: list(a.shape) for n, a in parameters.items()
    }
    for key, tensor in state.items():
        tensor.fill_(NUMBERS[key])
        ours[key] = mx.full(parameters[key].shape, NUMBERS[key], getattr(mx, dtype))
    x = np.concatenate([np.linspace(-30, 30, 997), [0.0, -1e-3, -1e-5, 1e-3]]).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(x).to(getattr(torch, dtype)))
    found = ours(mx.array(x).astype(getattr(mx, dtype)))
    assert found.dtype == getattr(mx, dtype)
    assert wanted.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(
        np.array(found.astype(mx.float32)), wanted.float().numpy(), rtol=near, atol=near
    )


@pytest.mark.reference
def test_the_others_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    table = pytest.importorskip("transformers.activations").ACT2FN
    assert table.keys() == set(ACTIVATIONS)
    x = np.concatenate([np.linspace(-30, 30, 997), [0.0, -1e-3, 1e-3]]).astype(np.float32)
    for name in _ACTIVATIONS:
        wanted = table[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(
            np.array(activation(name)(mx.array(x))), wanted, rtol=2e-6, atol=2e-6, err_msg=name
        )
