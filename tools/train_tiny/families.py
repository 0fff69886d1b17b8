"""The architectures by name; each module is imported on demand."""

from importlib import import_module

from .family import Family

FAMILIES = {
    "idefics3": ("idefics3", "Idefics3"),
    "qwen2_5vl": ("qwen2_5vl", "Qwen25VL"),
    "internvl": ("internvl", "InternVL"),
    "pixtral": ("pixtral", "Pixtral"),
}


def make_family(name: str) -> Family:
    """The family of that name, its tokenizer trained."""
    module, cls = FAMILIES[name]
    return getattr(import_module(f".{module}", __package__), cls)()
