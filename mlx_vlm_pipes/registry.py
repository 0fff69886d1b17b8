"""Which room serves which checkpoint: a table of strings, imported on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from mlx_vlm_pipes.errors import UnsupportedModel
from mlx_vlm_pipes.facts import NO_FACTS, RoomFacts

_ROOMS = "mlx_vlm_pipes.architectures"
# room: (model class, processor class)
_CLASSES = {
    "llama3": ("Llama3Model", "Llama3Processor"),
    "idefics3": ("Idefics3Model", "Idefics3Processor"),
    "pixtral": ("PixtralModel", "PixtralProcessor"),
    "internvl": ("InternVLModel", "InternVLProcessor"),
    "qwen2_vl": ("Qwen2VLModel", "Qwen2VLProcessor"),
    "qwen2_5vl": ("Qwen2_5VLModel", "Qwen2_5VLProcessor"),
    "qwen3_vl": ("Qwen3VLModel", "Qwen3VLProcessor"),
}
# names whose model class is not the room's own
_MODELS = {"OlmoForCausalLM": "OlmoModel", "olmo": "OlmoModel"}
# name in `architectures` or `model_type` of config.json: room
NAMES = {
    "LlamaForCausalLM": "llama3",
    "MistralForCausalLM": "llama3",
    "GraniteForCausalLM": "llama3",
    "Phi3ForCausalLM": "llama3",
    "OlmoForCausalLM": "llama3",
    "Qwen2ForCausalLM": "llama3",
    "Qwen3ForCausalLM": "llama3",
    "SmolLM3ForCausalLM": "llama3",
    "llama": "llama3",
    "mistral": "llama3",
    "granite": "llama3",
    "phi3": "llama3",
    "olmo": "llama3",
    "qwen2": "llama3",
    "qwen3": "llama3",
    "smollm3": "llama3",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "idefics3",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
    "LlavaForConditionalGeneration": "pixtral",
    "pixtral": "pixtral",
    "llava": "pixtral",
    "InternVLForConditionalGeneration": "internvl",
    "InternVLChatModel": "internvl",
    "internvl": "internvl",
    "internvl_chat": "internvl",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "qwen2_vl": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5vl",
    "qwen2_5_vl": "qwen2_5vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "qwen3_vl": "qwen3_vl",
}


@dataclass(frozen=True)
class Room:
    """One architecture's classes, imported when asked for."""

    name: str
    model_name: str

    def model_config(self) -> Any:
        """The module with the config classes."""
        return import_module(f"{_ROOMS}.{self.name}.model_config")

    def model_class(self) -> Any:
        return getattr(import_module(f"{_ROOMS}.{self.name}.model"), self.model_name)

    def processor_class(self) -> Any:
        return getattr(import_module(f"{_ROOMS}.{self.name}.processing"), _CLASSES[self.name][1])

    def weight_adapters(self) -> Any:
        """The module with the room's layouts."""
        return import_module(f"{_ROOMS}.{self.name}.weight_adapters")

    def facts(self) -> RoomFacts:
        return _facts(self.name)


def find_facts(names: Sequence[Any], model_type: Any) -> RoomFacts:
    """The facts of the room that config.json names; none for a name that we do not know.

    Args: names, what `architectures` lists.
    """
    for name in (*names, model_type):
        if isinstance(name, str) and name in NAMES:
            return _facts(NAMES[name])
    return NO_FACTS


def _facts(room: str) -> RoomFacts:
    return import_module(f"{_ROOMS}.{room}.facts").FACTS


def find_room(huggingface_config: Any) -> Room:
    """The room for a configuration, by `architectures` first, then `model_type`.

    Raises: UnsupportedModel naming what was found and what there is.
    """
    found = getattr(huggingface_config, "architectures", None)
    names = [n for n in found if isinstance(n, str)] if isinstance(found, (list, tuple)) else []
    kind = getattr(huggingface_config, "model_type", None)
    for name in (*names, kind):
        if isinstance(name, str) and name in NAMES:
            room = NAMES[name]
            return Room(room, _MODELS.get(name, _CLASSES[room][0]))
    label = ", ".join(names) or repr(kind)
    near = _nearest(label if names else str(kind))
    raise UnsupportedModel(
        f"architecture {label} is not supported; "
        + (f"nearest: {', '.join(near)}; " if near else "")
        + "`python -m mlx_vlm_pipes.check --families` lists what is"
    )


def families() -> dict[str, list[str]]:
    """The names in `architectures` of config.json that each room serves, by room."""
    served: dict[str, list[str]] = {}
    for name, room in NAMES.items():
        if name[0].isupper():
            served.setdefault(room, []).append(name)
    return served


def _nearest(name: str) -> list[str]:
    """Up to three supported names of its spelling: classes for a class, else model types."""
    is_class = name[:1].isupper()
    known = {_stem(n): n for n in NAMES if n[0].isupper() == is_class}
    return [known[stem] for stem in get_close_matches(_stem(name), known, n=3, cutoff=0.5)]


def _stem(name: str) -> str:
    """A class name without what nearly all of them end in."""
    for ending in ("ForConditionalGeneration", "ForCausalLM", "Model"):
        name = name.removesuffix(ending)
    return name.lower()
