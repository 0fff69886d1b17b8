"""The checkpoints that see."""

from .case import IMAGE, VIDEO, Case, Clip, Json, Options, Picture, Prompt, assistant, plain, user

ROPE: Json = {"rope_type": "default", "rope_theta": 10000.0}
VISION: Json = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT: Json = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
}
TEXT_PROMPT = Prompt("text", messages=[user("Which doctor reads?")])


def vision_cases() -> list[Case]:
    return [
        *_idefics3_cases(),
        *_smolvlm_cases(),
        *_pixtral_cases(),
        *_internvl_cases(),
        *_internvl_chat_cases(),
        *_qwen2_vl_cases(),
        *_qwen_cases(),
        *_qwen3_vl_cases(),
    ]


def _asked(name: str, *images: Picture, question: str = "What is it?") -> Prompt:
    """Images first, then one question."""
    return Prompt(name, messages=[user(*[IMAGE] * len(images), question)], images=images)


def _later(*images: Picture) -> Prompt:
    """Text first; the last image arrives in the second turn."""
    turns = [
        user(*[IMAGE] * (len(images) - 1), "Look well."),
        assistant("A red circle."),
        user(IMAGE, "And here?"),
    ]
    return Prompt("turns", messages=turns, images=images)


def _idefics3_cases() -> list[Case]:
    vision = VISION | {"image_size": 32, "patch_size": 8}
    return [
        Case(
            "idefics3", "idefics3", "image splitting with row and column markers",
            {"vision": vision, "text": TEXT, "scale_factor": 2},
            (_asked("one", Picture("shapes", 150, 100, 1)),
             _asked("two", Picture("clouds", 45, 70, 2), Picture("gradient", 200, 60, 3, "L")),
             _later(Picture("checker", 40, 20, 4)), TEXT_PROMPT),
            batch=("one", "text", "two"),
            options=Options(longest_edge=96, sparse={"vision_config": (
                "num_channels", "attention_dropout", "initializer_range", "hidden_act")}),
        ),
        Case(
            "idefics3-whole", "idefics3",
            "no splitting, tied, biases in the decoder, a transparent picture; template in "
            "processor_config.json",
            {"vision": vision | {"image_size": 48},
             "text": TEXT | {"tie_word_embeddings": True, "attention_bias": True},
             "scale_factor": 3},
            (_asked("one", Picture("checker", 33, 21, 5)),
             _asked("alpha", Picture("shapes", 61, 90, 6, "RGBA")),
             _asked("two", Picture("gradient", 1, 1, 7), Picture("clouds", 70, 30, 8)),
             TEXT_PROMPT),
            options=Options(longest_edge=96, split=False, dtype="bfloat16",
                            template_in="processor_config.json", generation={"max_length": 99}),
        ),
    ]  # fmt: skip


def _smolvlm_cases() -> list[Case]:
    raw = "<|im_start|>User:<image>Count the 42 men.<end_of_utterance>\nAssistant:"
    return [
        Case(
            "smolvlm", "smolvlm",
            "SmolVLM classes, config and processor files as transformers 5 writes them",
            {"vision": VISION | {"image_size": 64, "patch_size": 8},
             "text": TEXT | {"hidden_size": 48, "num_attention_heads": 6,
                             "rope_parameters": ROPE | {"rope_theta": 100000.0}},
             "scale_factor": 4},
            (_asked("one", Picture("shapes", 65, 85, 5)),
             _asked("two", Picture("gradient", 48, 16, 6), Picture("checker", 90, 75, 7, "P")),
             Prompt("raw", text=raw, images=(Picture("checker", 33, 111, 8),)), TEXT_PROMPT),
            batch=("one", "text", "raw"),
            options=Options(config_style="v5", nested_processor=True, longest_edge=128,
                            dtype="bfloat16",
                            template_in="chat_template.jinja", tokenizer_form="v5"),
        ),
    ]  # fmt: skip


def _pixtral_cases() -> list[Case]:
    vision = VISION | {
        "image_size": 160,
        "patch_size": 8,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    }
    text = TEXT | {"head_dim": 12, "sliding_window": None}
    mixed = [user("Compare: ", IMAGE, IMAGE, " and ", IMAGE)]
    three = (
        Picture("clouds", 61, 45, 10),
        Picture("gradient", 190, 90, 11),
        Picture("checker", 23, 77, 12),
    )
    unused = ("attention_dropout", "initializer_range", "use_cache")
    return [
        Case(
            "pixtral", "pixtral",
            "images of odd sizes, over 300 tokens, head_dim apart from hidden / heads",
            {"vision": vision, "text": text | {"rope_parameters": ROPE | {"rope_theta": 1e6}}},
            (_asked("one", Picture("shapes", 51, 67, 9)),
             Prompt("three", messages=mixed, images=three),
             _later(Picture("shapes", 40, 24, 13), Picture("gradient", 17, 33, 14, "L")),
             TEXT_PROMPT),
            batch=("one", "text", "turns"),
            options=Options(sparse={"text_config": unused, "vision_config": (
                "num_channels", "attention_dropout", "initializer_range")}),
        ),
        Case(
            "pixtral-v5", "pixtral",
            "an earlier vision layer, no projector bias, tied, version 5 names and files, bfloat16",
            {"vision": vision | {"num_hidden_layers": 3, "patch_size": 4, "image_size": 32},
             "text": text | {"tie_word_embeddings": True, "head_dim": 8},
             "vision_feature_layer": -2, "projector_bias": False},
            (_asked("one", Picture("clouds", 40, 23, 15)),
             _asked("alpha", Picture("shapes", 30, 18, 16, "RGBA")), TEXT_PROMPT),
            options=Options(config_style="v5", nested_processor=True, original_names=False,
                            dtype="bfloat16", template_in="chat_template.jinja",
                            tokenizer_form="v5"),
        ),
    ]  # fmt: skip


INTERNVL_VISION: Json = VISION | {
    "image_size": [28, 28],
    "patch_size": [7, 7],
    "attention_bias": True,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
}
INTERNVL_RMS: Json = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
INTERNVL_PROMPTS = (
    _asked("one", Picture("shapes", 120, 75, 14)),
    _asked("two", Picture("clouds", 30, 65, 15), Picture("gradient", 29, 28, 16)),
    _later(Picture("checker", 100, 32, 17)),
    _asked("square", Picture("clouds", 43, 43, 28)),
    TEXT_PROMPT,
)


def _internvl_cases() -> list[Case]:
    return [
        Case(
            "internvl-qwen2", "internvl",
            "transformers layout, layer norm tower, Qwen2 language model",
            {"vision": INTERNVL_VISION, "text": TEXT, "llm": "Qwen2Config"},
            INTERNVL_PROMPTS, batch=("one", "text", "turns"), options=Options(max_patches=6),
        ),
        Case(
            "internvl-qwen3", "internvl",
            "rms norm tower with query and key norms, Qwen3 language model, tied, bfloat16",
            {"vision": INTERNVL_VISION | INTERNVL_RMS, "llm": "Qwen3Config",
             "text": TEXT | {"head_dim": 12, "attention_bias": False,
                             "tie_word_embeddings": True}},
            INTERNVL_PROMPTS[::2], options=Options(max_patches=4, dtype="bfloat16"),
        ),
        Case(
            "internvl-llama", "internvl",
            "Llama language model, version 5 config, names and processor files",
            {"vision": INTERNVL_VISION | {"image_size": [32, 32], "patch_size": [4, 4]},
             "text": TEXT, "llm": "LlamaConfig"},
            (_asked("one", Picture("gradient", 70, 31, 29, "RGBA")), TEXT_PROMPT),
            options=Options(config_style="v5", nested_processor=True, original_names=False,
                            max_patches=3, dtype="bfloat16"),
        ),
    ]  # fmt: skip


def _internvl_chat_cases() -> list[Case]:
    ask = "Image-1: <image>\nImage-2: <image>\nCompare them."
    raw = f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n"
    pictures = (Picture("shapes", 31, 45, 18), Picture("clouds", 55, 28, 19))
    return [
        Case(
            "internvl-chat", "internvl_chat",
            "original InternVLChatModel layout: fused qkv, mlp1, llm_config; custom code absent",
            {"vision": INTERNVL_VISION, "text": TEXT, "llm": "Qwen2Config"},
            (INTERNVL_PROMPTS[0], INTERNVL_PROMPTS[2], TEXT_PROMPT,
             Prompt("raw", text=raw, images=pictures)),
            batch=("one", "text", "turns"), options=Options(max_patches=6),
        ),
        Case(
            "internvl-chat-rms", "internvl_chat",
            "original layout with the rms norm tower, query and key norms, Qwen3, tied",
            {"vision": INTERNVL_VISION | INTERNVL_RMS, "llm": "Qwen3Config",
             "text": TEXT | {"head_dim": 8, "tie_word_embeddings": True}},
            (INTERNVL_PROMPTS[1], TEXT_PROMPT),
            options=Options(max_patches=3, dtype="bfloat16"),
        ),
    ]  # fmt: skip


QWEN2_VISION: Json = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "mlp_ratio": 2,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _qwen2_vl_cases() -> list[Case]:
    text = TEXT | {"rms_norm_eps": 1e-6, "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
    apart = [user("First ", IMAGE, " then ", IMAGE, " what?")]
    both = [user(IMAGE, VIDEO, "Is it in the clip?")]
    v5_vision = {"embed_dim": 24, "mlp_ratio": 3, "patch_size": 6, "hidden_act": "gelu"}
    v5_text = {"num_attention_heads": 2, "num_key_value_heads": 1,
               "rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}  # fmt: skip
    return [
        Case(
            "qwen2vl", "qwen2_vl",
            "tied, keys left out as in released files, bfloat16; images, clips, text",
            {"vision": QWEN2_VISION, "text": text | {"tie_word_embeddings": True}},
            (_asked("one", Picture("shapes", 67, 49, 60)),
             Prompt("two", messages=apart,
                    images=(Picture("clouds", 24, 60, 61), Picture("gradient", 40, 30, 62, "L"))),
             Prompt("clip", messages=[user(VIDEO, "Why?")], videos=(Clip(5, 61, 36, 63),)),
             Prompt("long-clip", messages=[user(VIDEO, "Why?")], videos=(Clip(12, 40, 30, 64),),
                    fps=0.7),
             Prompt("mixed", messages=both, images=(Picture("checker", 34, 34, 65),),
                    videos=(Clip(4, 50, 34, 66),), fps=1.0),
             TEXT_PROMPT),
            batch=("one", "text", "mixed"),
            options=Options(image_tokens=(4, 16), video_tokens=(4, 16), dtype="bfloat16",
                            sparse={"vision_config": ("hidden_act", "model_type")},
                            generation={"do_sample": True, "temperature": 0.01, "top_k": 1}),
        ),
        Case(
            "qwen2vl-v5", "qwen2_vl",
            "version 5 config, names and files; a tower narrower than its rows, GELU, other axes",
            {"vision": QWEN2_VISION | v5_vision, "text": text | v5_text},
            (_asked("alpha", Picture("shapes", 60, 40, 67, "RGBA")),
             _later(Picture("gradient", 37, 41, 68, "L"), Picture("checker", 40, 26, 69)),
             Prompt("clip", messages=[user(VIDEO, "Why?")], videos=(Clip(2, 35, 25, 70),), fps=4.0),
             TEXT_PROMPT),
            options=Options(config_style="v5", nested_processor=True, original_names=False,
                            image_tokens=(4, 16), video_tokens=(4, 24), dtype="bfloat16",
                            tokenizer_form="v5", template_in="chat_template.jinja"),
        ),
    ]  # fmt: skip


QWEN_VISION: Json = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 64,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 32,
}


def _qwen_cases() -> list[Case]:
    text = TEXT | {"rms_norm_eps": 1e-6, "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
    two = (Picture("clouds", 52, 130, 21), Picture("gradient", 50, 40, 22))
    apart = [user("First ", IMAGE, " then ", IMAGE, " what?")]
    both = [user(IMAGE, VIDEO, "Is it in the clip?")]
    chat = [plain("system", "Be brief."), plain("user", "Which signal?")]
    v5_vision = {"patch_size": 6, "window_size": 48, "fullatt_block_indexes": [0, 2],
                 "tokens_per_second": 4}  # fmt: skip
    v5_text = {"tie_word_embeddings": True, "num_attention_heads": 2, "num_key_value_heads": 1,
               "rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}  # fmt: skip
    return [
        Case(
            "qwen25vl", "qwen2_5_vl",
            "windowed attention, grids that are no multiples of the window; images, clips, text",
            {"vision": QWEN_VISION, "text": text},
            (_asked("one", Picture("shapes", 97, 69, 20)),
             Prompt("two", messages=apart, images=two),
             Prompt("clip", messages=[user(VIDEO, "What happens?")], videos=(Clip(5, 75, 52, 23),)),
             Prompt("long-clip", messages=[user(VIDEO, "Why?")], videos=(Clip(12, 48, 32, 24),)),
             Prompt("slow-clip", messages=[user(VIDEO, "Why?")], videos=(Clip(4, 64, 48, 25),),
                    fps=1.0),
             Prompt("mixed", messages=both, images=(Picture("checker", 34, 34, 26),),
                    videos=(Clip(4, 64, 48, 27),)),
             Prompt("text", messages=chat)),
            batch=("one", "text", "two"),
            options=Options(video_tokens=(4, 20),
                            generation={"do_sample": True, "temperature": 1e-6}),
        ),
        Case(
            "qwen25vl-v5", "qwen2_5_vl",
            "tied, version 5 config, names and files, bfloat16; other patches, windows and axes",
            {"vision": QWEN_VISION | v5_vision, "text": text | v5_text},
            (_asked("alpha", Picture("shapes", 75, 40, 30, "RGBA")),
             _later(Picture("gradient", 37, 61, 31, "L"), Picture("checker", 40, 26, 32)),
             Prompt("clip", messages=[user(VIDEO, "Why?")], videos=(Clip(2, 41, 30, 33),), fps=4.0),
             TEXT_PROMPT),
            options=Options(config_style="v5", nested_processor=True, original_names=False,
                            dtype="bfloat16", tokenizer_form="v5",
                            template_in="chat_template.jinja"),
        ),
    ]  # fmt: skip


QWEN3_VISION: Json = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
    "out_hidden_size": 32,
}


def _qwen3_vl_cases() -> list[Case]:
    sections: Json = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = TEXT | {"rms_norm_eps": 1e-6, "head_dim": 16, "num_hidden_layers": 3,
                   "rope_parameters": ROPE | {"rope_theta": 5000.0} | sections}  # fmt: skip
    apart = [user("First ", IMAGE, " then ", IMAGE, " what?")]
    both = [user(IMAGE, VIDEO, "Is it in the clip?")]
    raw = "<|im_start|>user\n<|video_pad|>Why?<|im_end|>\n<|im_start|>assistant\n"
    chat = [plain("system", "Be brief."), plain("user", "Which signal?")]
    v5_vision = {"patch_size": 6, "depth": 2, "deepstack_visual_indexes": [0, 1],
                 "num_position_embeddings": 16}  # fmt: skip
    v5_text = {"tie_word_embeddings": True, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1,
               "rope_parameters": ROPE | sections | {"mrope_section": [3, 3, 2]}}  # fmt: skip
    return [
        Case(
            "qwen3vl", "qwen3_vl",
            "features added to the first decoder layers, interleaved axes, interpolated places; "
            "images, clips frame by frame behind their times, text",
            {"vision": QWEN3_VISION, "text": text},
            (_asked("one", Picture("shapes", 67, 49, 40)),
             Prompt("two", messages=apart,
                    images=(Picture("clouds", 24, 60, 41), Picture("gradient", 40, 30, 42, "L"))),
             Prompt("clip", messages=[user(VIDEO, "Why?")], videos=(Clip(5, 61, 36, 43),)),
             Prompt("bare", text=raw, videos=(Clip(2, 40, 30, 44),), fps=0.7),
             Prompt("mixed", messages=both, images=(Picture("checker", 34, 34, 45),),
                    videos=(Clip(4, 50, 34, 46),), fps=1.0),
             Prompt("text", messages=chat)),
            batch=("one", "text", "mixed"),
            options=Options(image_tokens=(4, 10), video_tokens=(4, 16), dtype="bfloat16",
                            generation={"do_sample": True, "temperature": 1e-6}),
        ),
        Case(
            "qwen3vl-v5", "qwen3_vl",
            "tied, version 5 config and files, bfloat16; every decoder layer is given features",
            {"vision": QWEN3_VISION | v5_vision, "text": text | v5_text},
            (_asked("alpha", Picture("shapes", 60, 40, 47, "RGBA")),
             _later(Picture("gradient", 37, 41, 48, "L"), Picture("checker", 40, 26, 49)),
             Prompt("clip", messages=[user(VIDEO, "Why?")], videos=(Clip(4, 35, 25, 50),), fps=4.0),
             TEXT_PROMPT),
            options=Options(config_style="v5", nested_processor=True, original_names=False,
                            image_tokens=(4, 16), video_tokens=(4, 24),
                            dtype="bfloat16", tokenizer_form="v5",
                            template_in="chat_template.jinja"),
        ),
    ]  # fmt: skip
