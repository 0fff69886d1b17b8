"""Class defaults and limits of Qwen2.5-VL. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.grid_facts import LIMITS, MROPE_TEXT, TOKEN_IDS
from mlx_vlm_pipes.config_limits import INDICES, size
from mlx_vlm_pipes.facts import Composite, Coordinates, RoomFacts

FACTS = RoomFacts(
    class_defaults={
        "qwen2_5_vl_text": MROPE_TEXT,
        "qwen2_5_vl_vision": {
            "hidden_size": 3584, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
            "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "tokens_per_second": 4, "window_size": 112, "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu",
        },
    },
    composites={
        "qwen2_5_vl": Composite(
            "qwen2_5_vl_text", "qwen2_5_vl_vision", ("text_config", "vision_config"), TOKEN_IDS,
            flat=True,
        ),
    },
    # no thousandths: technical report, arXiv 2502.13923; of the resized one: QwenLM/Qwen3-VL #931
    coordinates=Coordinates.PIXELS,
    connectors=("merger.",),
    limits={
        **LIMITS, "out_hidden_size": size(2**18), "in_chans": size(2**6),
        "window_size": size(2**16), "tokens_per_second": size(2**20),
        "fullatt_block_indexes": INDICES,
    },
)  # fmt: skip
