"""The families by the name that `reference.json` gives them."""

from .family import Encoded, Family
from .idefics3 import Idefics3, SmolVLM
from .internvl import InternVL
from .internvl_chat import InternVLChat
from .pixtral import Pixtral
from .qwen2_5_vl import Qwen25VL
from .qwen2_vl import Qwen2VL
from .qwen3_vl import Qwen3VL
from .text import CLASSES, Text

FAMILIES: dict[str, type[Family]] = {
    **dict.fromkeys(CLASSES, Text),
    "idefics3": Idefics3,
    "smolvlm": SmolVLM,
    "pixtral": Pixtral,
    "internvl": InternVL,
    "internvl_chat": InternVLChat,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
}

__all__ = ["FAMILIES", "Encoded", "Family", "Qwen25VL"]
