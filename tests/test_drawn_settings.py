"""Settings that drawing checkpoints found wrong once, each as a case of its own (tools/fuzz)."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tools.fuzz.requests import QUESTION, plain_picture
from tools.fuzz.verdict import judge
from tools.make_fixtures.build import quiet_and_deterministic

pytestmark = pytest.mark.reference
PICTURE = plain_picture() | {"width": 97, "height": 75}  # of several frames, where those are cut
FOUR_BITS = {"bits": 4, "group_size": 32}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "a tower without a position table": (
        "internvl", {"vision.use_absolute_position_embeddings": False},
    ),
    "more deepstack features than decoder layers": (
        "qwen3_vl",
        {"vision.depth": 2, "vision.deepstack_visual_indexes": [0, 1], "text.num_hidden_layers": 1},
    ),
    "frames larger than the tower's": ("smolvlm", {"image.max_image_size": {"longest_edge": 48}}),
    "frames that do not divide the tower's": (
        "idefics3", {"image.max_image_size": {"longest_edge": 40}, "part.scale_factor": 1},
    ),
    "a slope in every layer": ("llama", {"text.hidden_act": "prelu"}),
    "activations with weights, stacked and packed": (
        "phi3", {"text.hidden_act": "xielu", "convert": FOUR_BITS},
    ),
    "activations with weights in tower and projector": (
        "internvl", {"vision.hidden_act": "xielu", "outer.projector_hidden_act": "prelu"},
    ),
    "a packed tower of Qwen2-VL": (
        "qwen2_vl",
        {"vision.hidden_act": "prelu", "vision.mlp_ratio": 3,
         "convert": {**FOUR_BITS, "quantize_vision": True}},
    ),
    "one of each in Pixtral, converted": (
        "pixtral",
        {"vision.hidden_act": "prelu", "outer.projector_hidden_act": "xielu",
         "text.hidden_act": "prelu", "convert": FOUR_BITS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_transformers(name: str) -> None:
    """Ids, pixels, logits, and greedy tokens alone and in a batch."""
    quiet_and_deterministic()
    family, knobs = SETTINGS[name]
    is_text = family in ("llama", "phi3")
    parts = ["Who reads?"] if is_text else [{"picture": PICTURE}, QUESTION]
    request = {"raw": False, "fps": 2.0, "turns": [{"role": "user", "parts": parts}]}
    found = judge({"family": family, "knobs": knobs, "request": request})
    assert found.kind == "equal", found
