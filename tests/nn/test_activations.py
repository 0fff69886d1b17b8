"""The activations, and the names of them that configurations are checked against."""

from mlx_vlm_pipes.hf_config import ACTIVATIONS
from mlx_vlm_pipes.nn.activations import activation


def test_every_name_has_a_function() -> None:
    assert all(callable(activation(name)) for name in ACTIVATIONS)
