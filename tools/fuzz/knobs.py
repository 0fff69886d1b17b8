"""What can be turned in a checkpoint of each family, and what it can be turned to.

A knob is `section.name`. Sections: `text` and `vision` (fields of those configs), `part` (of the
case, see `plain.py`), `outer` (attributes of the whole config), `options` (`case.Options`),
`image` and `video` (settings of the processors' files), `file` (how the files are spelled),
`convert` (the conversion before the comparison). A name with a star sets several fields at once,
those that have to fit each other.
"""

import copy
import random

from transformers.activations import ACT2FN

from tools.make_fixtures.case import Json

Knobs = dict[str, list]

SHARE = 0.2  # of the knobs of a family that a case turns
# These break, or hide, much else.
RARE = {
    "text.*dynamic": 0.05,
    "image.do_convert_rgb": 0.05,
    "image.max_image_size": 0.05,
    "image.do_resize": 0.08,
    "image.do_rescale": 0.08,
    "video.do_rescale": 0.08,
}
ACTIVATIONS = sorted(ACT2FN)
THETAS = [500.0, 10000.0, 500000.0, 1e6]
LLAMA3: Json = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN: Json = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
ROPES: list[Json] = [
    *({"rope_type": "default", "rope_theta": theta} for theta in THETAS),
    LLAMA3,
    LLAMA3 | {"factor": 32.0, "rope_theta": 500000.0, "original_max_position_embeddings": 16},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "linear", "rope_theta": 500000.0, "factor": 1.5},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    YARN | {"original_max_position_embeddings": 64},
    YARN | {"original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0},
    YARN | {"original_max_position_embeddings": 32, "attention_factor": 1.1},
    YARN | {"original_max_position_embeddings": 512, "mscale": 0.7, "mscale_all_dim": 1.0},
    YARN | {"original_max_position_embeddings": 64, "truncate": False},
]
HEADS: list[Json] = [
    {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv}
    for hidden, heads, kv in (
        (32, 4, 4), (32, 4, 1), (32, 2, 1), (36, 3, 3), (48, 6, 2), (64, 4, 2), (64, 8, 2),
        (96, 4, 4),
    )
]  # fmt: skip
DECODER: Knobs = {
    "text.*heads": HEADS,
    "text.num_hidden_layers": [1, 3, 4],
    "text.intermediate_size": [32, 40, 64, 96],
    "text.rms_norm_eps": [1e-6, 1e-5, 1e-3],
    "text.hidden_act": ACTIVATIONS,
    "text.tie_word_embeddings": [True, False],
    "text.max_position_embeddings": [1024, 4096, 131072],
    "text.initializer_range": [0.02, 0.1],
    "text.rope_parameters": ROPES,
    "text.*dynamic": [
        {"max_position_embeddings": limit,
         "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": factor}}
        for limit, factor in ((16, 64.0), (24, 96.0), (64, 32.0), (16, 2.0))
    ],
}  # fmt: skip
HEAD_DIM: Knobs = {"text.head_dim": [8, 12, 16]}
FILES: Knobs = {
    "options.config_style": ["v5"],
    "options.dtype": ["bfloat16", "float16"],
    "options.shards": [2, 3],
    "options.tokenizer_form": ["v5", "dicts"],
    "options.generation": [None, {"do_sample": True, "temperature": 0.6}, {"max_length": 99}],
    "options.eos_list": [True],
    "options.template_in": ["chat_template.jinja", "tokenizer_config", "tokenizer_config_list"],
    "file.sparse": [True],
    "file.sparse_processor": [True],
}
CONVERT: Knobs = {
    "convert": [
        *({"bits": bits, "group_size": 32} for bits in (8, 8, 4, 4, 6, 3)),
        {"bits": 8, "group_size": 64}, {"mixed": "mixed_4_8", "group_size": 32},
        {"bits": 8, "group_size": 32, "quantize_vision": True}, {"dtype": "float32"},
    ],
}  # fmt: skip
WINDOWS = [None, 4, 12, 64, 4096]
QWEN_WINDOWS: Knobs = {  # the layers from `max_window_layers` on see a window
    "text.*window": [
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": first}
        for first in (0, 1, 28)
    ],
}
STYLES: Knobs = {"options.style": ["llama2", "pixtral", "internvl_chat", "llama3", "qwen"]}


# The factors are filled in when the size of a head is known.
LONGROPE = [
    {
        "original_max_position_embeddings": limit,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0},
    }
    for limit in (20, 60, 256)
]
TEXT: dict[str, Knobs] = {
    "llama": {
        "text.attention_bias": [True],
        "text.mlp_bias": [True],
        **HEAD_DIM,
    },
    "mistral": {"text.sliding_window": WINDOWS, **HEAD_DIM},
    "granite": {
        "text.attention_bias": [True],
        "text.mlp_bias": [True],
        "text.embedding_multiplier": [1.0, 12.0],
        "text.attention_multiplier": [0.015625, 0.5, 1.0],
        "text.residual_multiplier": [0.22, 1.0],
        "text.logits_scaling": [1.0, 8.0, 0.5],
    },
    "phi3": {
        "text.*longrope": LONGROPE,
        "text.*partial": [
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                 "partial_rotary_factor": share}}
            for share in (0.5, 0.75)
        ],
        "text.sliding_window": WINDOWS,
    },
    "olmo": {"text.clip_qkv": [None, 0.3, 8.0], "text.attention_bias": [True]},
    "qwen2": QWEN_WINDOWS,
    "qwen3": {"text.attention_bias": [True], **HEAD_DIM, **QWEN_WINDOWS},
    "smollm3": {
        "text.attention_bias": [True],
        "text.mlp_bias": [True],
        "text.no_rope_layer_interval": [1, 2, 3],
        "text.*window": [{"use_sliding_window": True, "sliding_window": w} for w in (4, 12, 4096)],
    },
}  # fmt: skip
# For these model types transformers 5 makes tokenizers that normalise text, whatever the file says.
QWEN_TEXT = ("qwen2", "qwen3")
PIXELS: Knobs = {
    "image.*mean": [
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
        {"image_mean": [0.1, 0.2, 0.6], "image_std": [0.3, 0.5, 1.0]},
        {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
    "image.resample": [0, 1, 2, 3, 4, 5],
    "image.do_normalize": [False],
    "image.rescale_factor": [1 / 127.5, 0.01],
    "image.do_rescale": [False],
    "image.do_resize": [False],
    "image.do_convert_rgb": [False],
}
CLIPS: Knobs = {
    "video.*mean": [{"image_mean": [0.2, 0.3, 0.4], "image_std": [0.6, 0.5, 0.4]}],
    "video.resample": [2, 3],
    "video.do_normalize": [False],
    "video.do_rescale": [False],
    "video.rescale_factor": [1 / 127.5, 0.01],
}
TOWER: Knobs = {
    "vision.hidden_act": ACTIVATIONS,
    "vision.num_hidden_layers": [1, 3],
    "vision.intermediate_size": [32, 64],
    "vision.*heads": [
        {"hidden_size": h, "num_attention_heads": n} for h, n in ((32, 4), (48, 2), (32, 1))
    ],
}
IDEFICS: Knobs = {
    "part.scale_factor": [1, 2, 4],
    "vision.*size": [
        {"image_size": size, "patch_size": patch} for size, patch in ((32, 4), (64, 8), (48, 12))
    ],
    "vision.layer_norm_eps": [1e-5, 1e-3],
    "text.attention_bias": [True],
    "text.mlp_bias": [True],
    "options.longest_edge": [48, 64, 100, 160],
    "options.split": [False],
    "image.size": [{"height": 70, "width": 40}, {"height": 64, "width": 96}],
    "image.max_image_size": [{"longest_edge": edge} for edge in (40, 48, 64, 96)],
}
INTERNVL: Knobs = {
    "part.llm": ["Qwen2Config", "Qwen3Config", "LlamaConfig"],
    "text.attention_bias": [True],
    "vision.*norm": [{"norm_type": "rms_norm"}, {"use_qk_norm": True, "attention_bias": False}],
    "vision.attention_bias": [False],
    "vision.layer_norm_eps": [1e-5, 1e-3],
    "vision.*size": [
        {"image_size": [size] * 2, "patch_size": [patch] * 2} for size, patch in ((32, 4), (48, 12))
    ],
    "options.max_patches": [1, 2, 4, 9],
    **HEAD_DIM,
    **QWEN_WINDOWS,
}
MROPE = {"mrope_section": [1, 1, 2]}
QWEN_ROPES = [rope | MROPE for rope in (ROPES[0], ROPES[3], ROPES[6], YARN, ROPES[9])]
QWEN: Knobs = {
    "text.rope_parameters": QWEN_ROPES,
    "file.size": ["edges", "both"],
    "vision.hidden_act": ACTIVATIONS,
    "vision.depth": [1, 2, 4],
    "vision.intermediate_size": [32, 64],
    "vision.*heads": [{"hidden_size": h, "num_heads": n} for h, n in ((32, 4), (48, 2), (32, 1))],
    "vision.patch_size": [4, 6, 10],
    "vision.temporal_patch_size": [1, 3],
    "vision.spatial_merge_size": [1, 3],
    "options.image_tokens": [(1, 12), (16, 60)],
    "options.video_tokens": [(1, 12), (16, 60)],
}
V5_FILES: Knobs = {"options.original_names": [False], "options.nested_processor": [True]}

VISION: dict[str, Knobs] = {
    "idefics3": {**TOWER, **IDEFICS, **V5_FILES},
    "smolvlm": {**TOWER, **IDEFICS, **CLIPS, **V5_FILES},
    "pixtral": {
        **TOWER,
        "vision.patch_size": [4, 6, 16],
        "vision.image_size": [64, 96],
        "vision.rope_parameters": [{"rope_type": "axial", "rope_theta": t} for t in (100.0, 5e4)],
        "part.vision_feature_layer": [-2, 1],
        "part.projector_bias": [False],
        "outer.projector_hidden_act": ACTIVATIONS,
        "text.sliding_window": [None, 12, 4096],
        "options.longest_edge": [24, 60, 100],
        **HEAD_DIM,
        **V5_FILES,
    },
    "internvl": {
        **TOWER, **INTERNVL, **CLIPS, **V5_FILES,
        "outer.projector_hidden_act": ACTIVATIONS,
        "outer.vision_feature_layer": [-2, 1],
        "vision.use_absolute_position_embeddings": [False],
        "image.crop_to_patches": [True],
        "image.min_patches": [2, 3],
    },
    "internvl_chat": {**TOWER, **INTERNVL},
    "qwen2_vl": {
        **QWEN, **CLIPS, **V5_FILES, **QWEN_WINDOWS,
        "vision.mlp_ratio": [1, 3],
        "vision.*heads": [{"embed_dim": e, "num_heads": n} for e, n in ((32, 4), (48, 2), (32, 1))],
    },
    "qwen2_5_vl": {
        **QWEN, **CLIPS, **V5_FILES, **QWEN_WINDOWS,
        "vision.window_size": [16, 48, 112],
        "vision.fullatt_block_indexes": [[], [0], [0, 1, 2]],
        "vision.tokens_per_second": [1, 4, 25],
    },
    "qwen3_vl": {
        **QWEN, **CLIPS, **V5_FILES,
        "text.rope_parameters": [
            {"rope_type": "default", "rope_theta": theta, "mrope_interleaved": True,
             "mrope_section": section}
            for theta in THETAS for section in ([4, 2, 2], [3, 3, 2], [2, 3, 3])
        ],
        "vision.num_position_embeddings": [4, 16, 64],
        "vision.deepstack_visual_indexes": [[], [0], [1], [0, 1]],
        "text.attention_bias": [True],
    },
}  # fmt: skip
FAMILIES = (*TEXT, *VISION)


def knobs_of(family: str) -> Knobs:
    """Every knob of a family. The original InternVL files have one spelling only."""
    if family in TEXT:
        knobs = {**DECODER, **FILES, **CONVERT, **STYLES, **TEXT[family]}
        if family == "olmo":  # its norms have no weights and no setting
            del knobs["text.rms_norm_eps"]
        if family == "phi3":  # transformers writes no other scaling
            knobs["text.rope_parameters"] = [r for r in ROPES if r["rope_type"] == "default"]
            del knobs["text.*dynamic"]
        if family in QWEN_TEXT:
            del knobs["options.style"]
        del knobs["file.sparse_processor"]
        return knobs
    knobs = {**DECODER, **FILES, **CONVERT, **PIXELS, **VISION[family]}
    if family == "internvl_chat":
        knobs["part.llm"] = ["Qwen2Config", "Qwen3Config"]
        # Its tower's queries, keys and values lie in one matrix, which the reference cannot place.
        knobs["convert"] = [c for c in knobs["convert"] if "quantize_vision" not in c]
        one_spelling = ("options.config_style", "options.shards", "options.tokenizer_form",
                        "options.template_in", "file.sparse",
                        "file.sparse_processor", "image.do_convert_rgb", "image.rescale_factor",
                        "image.do_normalize", "image.do_rescale", "image.do_resize",
                        "vision.hidden_act")  # fmt: skip
        for key in one_spelling:
            del knobs[key]
        # its network stands alone in float32, where xIELU's numbers are not rounded to bfloat16
        knobs["text.hidden_act"] = [name for name in ACTIVATIONS if name != "xielu"]
    if family == "qwen2_vl":
        del knobs["vision.intermediate_size"]  # it follows from mlp_ratio
    if family == "qwen3_vl":
        del knobs["text.*heads"]  # the sections belong to a head of 16
        del knobs["text.*dynamic"]
        knobs["text.*heads"] = [h for h in HEADS if h["num_attention_heads"] < 8]
    return knobs


def draw_knobs(family: str, rng: random.Random) -> Json:
    """A few knobs, each turned to one of its values."""
    return {
        name: copy.deepcopy(rng.choice(values))  # transformers writes into dictionaries
        for name, values in knobs_of(family).items()
        if rng.random() < RARE.get(name, SHARE)
    }
