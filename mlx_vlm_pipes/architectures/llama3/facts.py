"""Class defaults and limits of the dense text models. Source: transformers 5.23."""

from __future__ import annotations

from mlx_vlm_pipes.config_limits import FACTOR, INDICES, size
from mlx_vlm_pipes.facts import RoomFacts

LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    **LLAMA, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip
QWEN3 = {**QWEN, "head_dim": 128}

FACTS = RoomFacts(
    class_defaults={
        "llama": LLAMA,
        "mistral": {
            **LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "sliding_window": 4096,
        },
        "qwen2": QWEN,
        "qwen3": QWEN3,
        "smollm3": {
            **LLAMA, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "vocab_size": 128256, "max_position_embeddings": 32768,
            "rope_theta": 2e6, "use_sliding_window": False, "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        "granite": {
            **LLAMA, "attention_multiplier": 1.0, "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0, "logits_scaling": 1.0,
        },
        "olmo": {k: v for k, v in {**LLAMA, "vocab_size": 50304}.items() if k != "rms_norm_eps"},
        "phi3": {
            **LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32064,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
        },
    },
    limits={
        **dict.fromkeys(
            (
                "attention_multiplier", "embedding_multiplier", "residual_multiplier",
                "logits_scaling", "clip_qkv",
            ),
            FACTOR,
        ),
        "no_rope_layers": INDICES, "no_rope_layer_interval": size(2**10),
    },
)  # fmt: skip
