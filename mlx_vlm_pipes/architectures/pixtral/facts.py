"""Class defaults and limits of LLaVA checkpoints with a Pixtral tower.

`pixtral` as the outer type is mlx-vlm's: its own defaults fit the tower. Source: transformers 5.23
(`llava`), mlx-vlm models/pixtral/config.py.
"""

from __future__ import annotations

from mlx_vlm_pipes.config_limits import FLAG
from mlx_vlm_pipes.facts import Composite, RoomFacts

PROJECTOR = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}

FACTS = RoomFacts(
    class_defaults={
        "pixtral": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 1024, "patch_size": 16, "hidden_act": "gelu",
            "num_channels": 3, "rope_theta": 10000.0,
        },
    },
    composites={
        "llava": Composite(
            "llama", "clip_vision_model",
            defaults={
                **PROJECTOR, "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
            },
        ),
        "pixtral": Composite(
            "mistral", "pixtral",
            defaults={
                **PROJECTOR, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
            },
        ),
    },
    connectors=("multi_modal_projector.",),
    limits={"multimodal_projector_bias": FLAG},
)  # fmt: skip
