"""The checkpoint of each family that knobs are turned on."""

from tools.make_fixtures.case import Json
from tools.make_fixtures.text_cases import SMALL
from tools.make_fixtures.vision_cases import (
    INTERNVL_VISION,
    QWEN2_VISION,
    QWEN3_VISION,
    QWEN_VISION,
    ROPE,
    TEXT,
    VISION,
)

MULTIPLIERS: Json = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.8,
    "logits_scaling": 4.0,
}
_OLMO: Json = {k: v for k, v in SMALL.items() if k != "rms_norm_eps"}
_QWEN_TEXT: Json = TEXT | {"rms_norm_eps": 1e-6}
_SECTIONS: Json = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}

# family: the parts of `Case.config`; a text model has one, its own fields
PLAIN: dict[str, Json] = {
    "llama": {"text": SMALL},
    "mistral": {"text": SMALL | {"sliding_window": None}},
    "granite": {"text": SMALL | MULTIPLIERS},
    "phi3": {"text": SMALL | {"original_max_position_embeddings": 512, "sliding_window": None}},
    "olmo": {"text": _OLMO},
    "qwen2": {"text": SMALL},
    "qwen3": {"text": SMALL},
    "smollm3": {"text": SMALL},
    "idefics3": {
        "text": TEXT,
        "vision": VISION | {"image_size": 32, "patch_size": 8},
        "scale_factor": 2,
    },
    "smolvlm": {
        "text": TEXT,
        "vision": VISION | {"image_size": 32, "patch_size": 8},
        "scale_factor": 2,
    },
    "pixtral": {
        "text": TEXT | {"head_dim": 8, "sliding_window": None},
        "vision": VISION
        | {
            "image_size": 80,
            "patch_size": 8,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
    },
    "internvl": {"text": TEXT, "vision": INTERNVL_VISION, "llm": "Qwen2Config"},
    "internvl_chat": {"text": TEXT, "vision": INTERNVL_VISION, "llm": "Qwen2Config"},
    "qwen2_vl": {
        "text": _QWEN_TEXT | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
        "vision": QWEN2_VISION,
    },
    "qwen2_5_vl": {
        "text": _QWEN_TEXT | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
        "vision": QWEN_VISION,
    },
    "qwen3_vl": {
        "text": _QWEN_TEXT | {"head_dim": 16, "rope_parameters": ROPE | _SECTIONS},
        "vision": QWEN3_VISION,
    },
}
