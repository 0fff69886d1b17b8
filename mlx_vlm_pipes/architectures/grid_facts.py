"""What the facts of models share whose pictures are grids of patches. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.architectures.llama3.facts import QWEN
from mlx_vlm_pipes.config_limits import size

# the class defaults of Qwen2-VL's and Qwen2.5-VL's text part: those of 72B
MROPE_TEXT = {
    **QWEN, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152064,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_window_layers": 80,
}  # fmt: skip
TOKEN_IDS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
}  # fmt: skip
LIMITS = {
    "depth": size(2**10), "num_heads": size(2**14), "in_channels": size(2**6),
    "temporal_patch_size": size(2**6), "spatial_merge_size": size(2**6),
}  # fmt: skip
