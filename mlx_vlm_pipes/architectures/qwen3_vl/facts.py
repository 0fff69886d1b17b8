"""Class defaults and limits of Qwen3-VL. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.grid_facts import LIMITS, TOKEN_IDS
from mlx_vlm_pipes.architectures.llama3.facts import QWEN
from mlx_vlm_pipes.config_limits import INDICES, size
from mlx_vlm_pipes.facts import Composite, Coordinates, RoomFacts

FACTS = RoomFacts(
    class_defaults={
        "qwen3_vl_text": {
            **QWEN, "head_dim": 128, "max_position_embeddings": 128000, "rope_theta": 500000.0,
        },
        "qwen3_vl_vision": {
            "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16,
            "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 3584, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24], "hidden_act": "gelu_pytorch_tanh",
        },
    },
    composites={
        "qwen3_vl": Composite(
            "qwen3_vl_text", "qwen3_vl_vision", ("text_config", "vision_config"),
            {**TOKEN_IDS, "vision_end_token_id": 151653},
        ),
    },
    # QwenLM/Qwen3-VL, cookbooks/mobile_agent.ipynb: 0 to 1000 again, unlike Qwen2.5-VL
    coordinates=Coordinates.THOUSANDTHS,
    connectors=("merger.", "deepstack_merger_list."),
    limits={
        **LIMITS, "out_hidden_size": size(2**18), "num_position_embeddings": size(2**24),
        "deepstack_visual_indexes": INDICES,
    },
)  # fmt: skip
