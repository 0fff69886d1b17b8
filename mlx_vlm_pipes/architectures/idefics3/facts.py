"""Class defaults and limits of Idefics3 and SmolVLM. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.config_limits import size
from mlx_vlm_pipes.facts import Composite, RoomFacts

VISION = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "initializer_range": 0.02,
}  # fmt: skip
OUTER = {"scale_factor": 2, "image_token_id": 128257}

FACTS = RoomFacts(
    class_defaults={"idefics3_vision": VISION, "smolvlm_vision": VISION},
    composites={
        "idefics3": Composite("llama", "idefics3_vision", ("vision_config",), OUTER),
        "smolvlm": Composite("llama", "smolvlm_vision", ("vision_config",), OUTER),
    },
    connectors=("connector.",),
    limits={"scale_factor": size(2**6)},
)
