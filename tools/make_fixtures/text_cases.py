"""The text-only checkpoints."""

from .case import Case, Json, Options, Prompt, plain

RAW = Prompt("raw", text="The small river crosses the")
CHAT = Prompt("chat", messages=[plain("system", "Count."), plain("user", "128 men?")])
TURNS = Prompt(
    "turns",
    messages=[
        plain("user", "Which letter opens?"),
        plain("assistant", "The yellow letter near 7 islands."),
        plain("user", "And who reads it?"),
    ],
)
UNICODE = Prompt("unicode", text="Straße, 東京, naïve — 🙂\n\n  indented\ttabs, 12345")
LONG = Prompt(
    "long",
    text="The narrow engine explains the shadow near 17 men. What is in this image? Describe "
    "the mountain: the careful teacher collects the silver mirror near the warm kitchen.",
)
ROPE: Json = {"rope_type": "default", "rope_theta": 10000.0}
SMALL: Json = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
    "tie_word_embeddings": False,
}


def text_cases() -> list[Case]:
    return [*_llama_cases(), *_mistral_cases(), *_phi3_cases(), *_qwen_cases(), *_other_cases()]


def _llama_cases() -> list[Case]:
    llama3_rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    biased = {"head_dim": 12, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    return [
        Case(
            "llama-tied", "llama", "grouped queries, tied embeddings, more layers",
            SMALL | {"hidden_size": 64, "num_hidden_layers": 3, "tie_word_embeddings": True},
            (RAW, CHAT, TURNS, UNICODE), max_new=24, batch=("raw", "chat", "turns"),
        ),
        Case(
            "llama-stop", "llama",
            "one key head per query head, untied; three stop tokens, one comes up while generating",
            SMALL | {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3},
            (RAW, CHAT, TURNS), max_new=24, batch=("raw", "chat", "turns"),
            options=Options(stop_at=7, tokenizer_form="dicts"),
        ),
        Case(
            "llama-bias-rope", "llama",
            "biases in attention and MLP, head_dim apart from hidden / heads, llama3 rope scaling "
            "in all three bands; version 5 config, a list of eos ids, no generation_config.json",
            SMALL | biased | {"rms_norm_eps": 1e-6, "rope_parameters": llama3_rope},
            (RAW, UNICODE, LONG), max_new=24,
            options=Options(config_style="v5", tokenizer_form="v5", eos_list=True,
                            template_in="chat_template.jinja", generation=None),
        ),
        Case(
            "llama-attn-bias", "llama",
            "biases in attention alone, tied, llama3 rope scaling in version 4 spelling; the chat "
            "template as a list",
            SMALL | {"attention_bias": True, "tie_word_embeddings": True,
                     "rope_parameters": llama3_rope | {"factor": 32.0, "rope_theta": 500000.0}},
            (RAW, CHAT), options=Options(template_in="tokenizer_config_list", dtype="bfloat16"),
        ),
        Case(
            "llama-sharded", "llama",
            "three safetensors shards with an index, weights in bfloat16; template in a file",
            SMALL | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3,
                     "rope_parameters": ROPE | {"rope_theta": 500000.0}},
            (RAW, CHAT), options=Options(shards=3, dtype="bfloat16",
                                         template_in="chat_template.jinja"),
        ),
    ]  # fmt: skip


def _mistral_cases() -> list[Case]:
    return [
        Case(
            "mistral-window", "mistral",
            "a sliding window shorter than the prompts; SentencePiece-like tokenizer",
            SMALL | {"sliding_window": 12}, (RAW, LONG), batch=("raw", "long"),
            options=Options(style="llama2", dtype="bfloat16"),
        ),
        Case(
            "mistral-full", "mistral",
            "sliding_window null, head_dim apart from hidden / heads; version 5 config, bfloat16",
            SMALL | {"sliding_window": None, "head_dim": 16,
                     "rope_parameters": ROPE | {"rope_theta": 1000000.0}},
            (RAW, CHAT), options=Options(style="pixtral", config_style="v5", dtype="bfloat16"),
        ),
    ]  # fmt: skip


def _phi3_cases() -> list[Case]:
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.1, 2.0, 4.5, 12.0],
    }
    partial = ROPE | {"partial_rotary_factor": 0.75}
    return [
        Case(
            "phi3-longrope", "phi3",
            "stacked qkv and gate/up, longrope: 'raw' crosses the original window while it "
            "generates (transformers then computes the cache anew), 'chat' starts beyond it",
            SMALL | {"original_max_position_embeddings": 20, "sliding_window": None,
                     "rope_parameters": longrope},
            (RAW, CHAT, UNICODE), max_new=24,
        ),
        Case(
            "phi3-partial", "phi3",
            "rotary embedding on three quarters of a head, a sliding window, tied; version 5",
            SMALL | {"hidden_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "sliding_window": 24, "original_max_position_embeddings": 512,
                     "rope_parameters": partial, "tie_word_embeddings": True},
            (RAW, LONG), options=Options(config_style="v5", dtype="bfloat16"),
        ),
    ]  # fmt: skip


def _qwen_cases() -> list[Case]:
    yarn = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return [
        Case(
            "qwen2", "qwen2", "biases in q, k, v; a window from the second layer on, yarn",
            SMALL | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1,
                     "rope_parameters": yarn},
            (RAW, CHAT, LONG), batch=("raw", "long"), options=Options(style="qwen"),
        ),
        Case(
            "qwen3", "qwen3", "norms on queries and keys, head_dim apart, tied; version 5",
            SMALL | {"head_dim": 16, "tie_word_embeddings": True,
                     "rope_parameters": ROPE | {"rope_theta": 1000000.0}},
            (RAW, CHAT, TURNS),
            options=Options(style="qwen", config_style="v5", dtype="bfloat16"),
        ),
        Case(
            "smollm3", "smollm3",
            "every second layer without rotary positions, and with a window",
            SMALL | {"num_hidden_layers": 4, "no_rope_layer_interval": 2,
                     "tie_word_embeddings": True, "use_sliding_window": True,
                     "sliding_window": 12},
            (RAW, CHAT, LONG), batch=("raw", "long"), options=Options(style="llama3"),
        ),
    ]  # fmt: skip


def _other_cases() -> list[Case]:
    multipliers = {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.8,
        "logits_scaling": 4.0,
    }
    olmo = {k: v for k, v in SMALL.items() if k != "rms_norm_eps"}
    return [
        Case(
            "granite", "granite", "embedding, attention, residual and logit multipliers, tied",
            SMALL | multipliers | {"tie_word_embeddings": True}, (RAW, CHAT),
            options=Options(dtype="bfloat16"),
        ),
        Case(
            "olmo", "olmo", "layer norms without weights, queries, keys and values clipped",
            olmo | {"clip_qkv": 1.5, "num_key_value_heads": 4}, (RAW, UNICODE),
            options=Options(dtype="bfloat16"),
        ),
    ]  # fmt: skip
