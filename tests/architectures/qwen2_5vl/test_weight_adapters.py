"""Every layout of Qwen2.5-VL's tensors leads to the same names and numbers."""

import pytest

from mlx_vlm_pipes.architectures.qwen2_5vl.vision_model import VisionModel
from mlx_vlm_pipes.architectures.qwen2_5vl.weight_adapters import LAYOUTS
from tests.architectures.grid_layouts import PREFIXES, check_layout
from tests.architectures.qwen2_5vl.test_vision_model import tiny_config


@pytest.mark.parametrize("name", PREFIXES)
def test_layouts(name: str) -> None:
    check_layout(name, LAYOUTS, VisionModel(tiny_config()), tiny_config())
