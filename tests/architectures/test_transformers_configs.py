"""transformers' own configuration objects go through `initialize` like ours, field by field."""

from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.errors import CheckpointError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig, read_config
from mlx_vlm_pipes.registry import find_room
from tests.fixtures_helper import cases

pytestmark = pytest.mark.reference
TINY = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
# What a saved configuration may leave out, and one key of each room that it must have.
MINIMAL: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral"},
    "granite": {"model_type": "granite"},
    "phi3": {"model_type": "phi3"},
    "olmo": {"model_type": "olmo"},
    "idefics3": {"model_type": "idefics3", "text_config": TINY,
                 "vision_config": {"image_size": 256}},
    "smolvlm": {"model_type": "smolvlm", "text_config": TINY,
                 "vision_config": {"image_size": 256}},
    "internvl": {"model_type": "internvl", "text_config": {}, "vision_config": {}},
    "internvl-qwen3": {"model_type": "internvl", "text_config": {"model_type": "qwen3"},
                       "vision_config": {"image_size": 224}},
    "internvl-window": {"model_type": "internvl", "vision_config": {},
                        "text_config": {"use_sliding_window": True}},
    "pixtral": {"model_type": "llava", "image_token_index": 10, "text_config": {}, **FULL,
                "vision_config": {"model_type": "pixtral"}},
    "pixtral-mistral": {"model_type": "llava", "image_token_index": 10, **FULL,
                        "text_config": {"model_type": "mistral"},
                        "vision_config": {"model_type": "pixtral"}},
    "qwen2_vl": {"model_type": "qwen2_vl", "text_config": {},
                 "vision_config": {"hidden_size": 8192}},
    "qwen2_vl-flat": {"model_type": "qwen2_vl", "hidden_size": 3584, "num_attention_heads": 28,
                      "num_key_value_heads": 4, "vision_config": {"model_type": "qwen2_vl"}},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl", "text_config": {},
                   "vision_config": {"out_hidden_size": 8192}},
    "qwen2_5_vl-flat": {"model_type": "qwen2_5_vl", "hidden_size": 3584, "num_attention_heads": 28,
                        "num_key_value_heads": 4, "vision_config": {"model_type": "qwen2_5_vl"}},
    "qwen3_vl": {"model_type": "qwen3_vl", "text_config": {},
                 "vision_config": {"out_hidden_size": 4096}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def transformers() -> Any:
    return pytest.importorskip("transformers", minversion="5.0")


def initialize(config: Any) -> Any:
    model = ModelConfig("somewhere", huggingface_config=config, quantization_encoding="float32")
    room_class = find_room(config).model_class()
    return room_class.config_class.initialize(PipelineConfig(model))


@pytest.mark.parametrize("path", cases(), ids=lambda path: path.name)
def test_of_every_fixture(path: Path, transformers: Any) -> None:
    own = read_config(path)
    if own.model_type == "internvl_chat":
        pytest.skip("transformers has no class for the original InternVLChatModel")
    assert initialize(transformers.AutoConfig.from_pretrained(path)) == initialize(own)


@pytest.mark.parametrize("name", MINIMAL)
def test_of_a_file_that_leaves_nearly_all_out(name: str, transformers: Any) -> None:
    values = dict(MINIMAL[name])
    theirs = transformers.AutoConfig.for_model(**values)
    assert initialize(theirs) == initialize(HuggingFaceConfig(values))


def test_pixtral_without_a_strategy_is_refused_alike(transformers: Any) -> None:
    """The class default drops a class token; transformers itself fails at the first picture."""
    values = {k: v for k, v in MINIMAL["pixtral"].items() if k not in FULL}
    messages = []
    for config in (transformers.AutoConfig.for_model(**values), HuggingFaceConfig(values)):
        with pytest.raises(CheckpointError, match="must say 'full'") as caught:
            initialize(config)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
