"""Live comparison with transformers, for options that the stored checkpoints do not have."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures.driving import relative
from tests.architectures.internvl.driving import IMAGE_TOKEN, context, load, run, tiles
from tests.device import bar

torch = pytest.importorskip("torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
# name: (changes to the vision config, text config class, changes to it, to the whole, tile side)
OPTIONS: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, Any], int]] = {
    "llama, rms norm, no mean pooling": (
        {"norm_type": "rms_norm", "use_mean_pooling": False}, "LlamaConfig",
        {"attention_bias": True}, {}, 16,
    ),
    "ratio 0.25, query norm": (
        {"use_qk_norm": True, "attention_bias": False, "layer_norm_eps": 1e-2}, "Qwen3Config",
        {"head_dim": 16}, {"downsample_ratio": 0.25}, 16,
    ),
    "larger tiles, tied head": (
        {}, "Qwen2Config", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}, 24,
    ),
    "smaller tiles, layer -2": (
        {"use_mean_pooling": False, "hidden_act": "gelu_pytorch_tanh"}, "Qwen2Config", {},
        {"vision_feature_layer": -2}, 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OPTIONS))
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    vision, kind, text, outer, side = OPTIONS[name]
    torch.manual_seed(0)
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**{**VISION, **vision}),
        text_config=getattr(transformers, kind)(**TEXT, **text),
        image_token_id=IMAGE_TOKEN,
        **{"tie_word_embeddings": False, **outer},
    )
    theirs = transformers.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    factor = round(1 / config.downsample_ratio)
    per_tile = (side // 4 // factor) ** 2
    ids = np.array([5, *[IMAGE_TOKEN] * (2 * per_tile), 6, *[IMAGE_TOKEN] * per_tile, 7])
    pixels = tiles(3, side=side)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(ids)[None], pixel_values=torch.tensor(pixels)
        ).logits[0]
    (logits,), _ = run(load(tmp_path), [context(ids, pixels, IMAGE_TOKEN)], 1)
    assert relative(logits, expected.numpy()) < bar(1e-5)
