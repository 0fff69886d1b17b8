"""Class defaults, limits and overrides of InternVL. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.config_limits import FACTOR, FLAG, TEXT, number, sides, size
from mlx_vlm_pipes.facts import Composite, Coordinates, RoomFacts

FACTS = RoomFacts(
    class_defaults={
        "internvl_vision": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
            "norm_type": "layer_norm", "layer_norm_eps": 1e-6, "use_qk_norm": False,
            "attention_bias": False, "hidden_act": "gelu", "use_mean_pooling": True,
        },
    },
    composites={
        "internvl": Composite(
            "qwen2", "internvl_vision", ("vision_config",),
            {
                "downsample_ratio": 0.5, "projector_hidden_act": "gelu",
                "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
            },
        ),
    },
    # boxes are divided by 1000: OpenGVLab/InternVL, eval/refcoco/evaluate_grounding.py
    coordinates=Coordinates.THOUSANDTHS,
    connectors=("multi_modal_projector.",),
    limits={
        "force_image_size": sides(2**14), "max_dynamic_patch": size(2**12),
        "min_dynamic_patch": size(2**12), "downsample_ratio": number(0.01, 1), "ps_version": TEXT,
        "norm_type": TEXT, "use_qk_norm": FLAG, "qk_normalization": FLAG, "qkv_bias": FLAG,
        "use_mean_pooling": FLAG, "layer_scale_init_value": FACTOR,
    },
    overrides={"min_dynamic_patch": size(2**8), "max_dynamic_patch": size(2**8)},
)  # fmt: skip
