"""Class defaults and limits of Qwen2.5-VL. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.llama3.facts import QWEN
from mlx_vlm_pipes.config_limits import INDICES, size
from mlx_vlm_pipes.facts import Composite, Coordinates, RoomFacts

FACTS = RoomFacts(
    class_defaults={
        "qwen2_5_vl_text": {
            **QWEN, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_window_layers": 80,
        },
        "qwen2_5_vl_vision": {
            "hidden_size": 3584, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
            "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "tokens_per_second": 4, "window_size": 112, "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu",
        },
    },
    composites={
        "qwen2_5_vl": Composite(
            "qwen2_5_vl_text", "qwen2_5_vl_vision", ("text_config", "vision_config"),
            {
                "image_token_id": 151655, "video_token_id": 151656,
                "vision_start_token_id": 151652,
            },
            flat=True,
        ),
    },
    # no thousandths: technical report, arXiv 2502.13923; of the resized one: QwenLM/Qwen3-VL #931
    coordinates=Coordinates.PIXELS,
    connectors=("merger.",),
    limits={
        "out_hidden_size": size(2**18), "depth": size(2**10), "num_heads": size(2**14),
        "in_channels": size(2**6), "in_chans": size(2**6), "temporal_patch_size": size(2**6),
        "spatial_merge_size": size(2**6), "window_size": size(2**16),
        "tokens_per_second": size(2**20), "fullatt_block_indexes": INDICES,
    },
)  # fmt: skip
