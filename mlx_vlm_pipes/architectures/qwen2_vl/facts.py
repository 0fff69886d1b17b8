"""Class defaults and limits of Qwen2-VL. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.grid_facts import LIMITS, MROPE_TEXT, TOKEN_IDS
from mlx_vlm_pipes.config_limits import number, size
from mlx_vlm_pipes.facts import Composite, Coordinates, RoomFacts

FACTS = RoomFacts(
    class_defaults={
        "qwen2_vl_text": MROPE_TEXT,
        "qwen2_vl_vision": {
            "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "depth": 32, "num_heads": 16,
            "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
        },
    },
    composites={
        "qwen2_vl": Composite(
            "qwen2_vl_text", "qwen2_vl_vision", ("text_config", "vision_config"), TOKEN_IDS,
            flat=True,
        ),
    },
    # 0 to 1000, whatever the size: technical report, arXiv 2409.12191
    coordinates=Coordinates.THOUSANDTHS,
    connectors=("merger.",),
    limits={
        **LIMITS, "in_chans": size(2**6), "embed_dim": size(2**18), "mlp_ratio": number(0, 2**10),
    },
)  # fmt: skip
