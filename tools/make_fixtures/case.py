"""What a fixture is made from: a case, its prompts, and the media they refer to."""

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

IMAGE: Json = {"type": "image"}
VIDEO: Json = {"type": "video"}


@dataclass(frozen=True)
class Picture:
    """A drawing by `media.draw`; sizes in pixels, `mode` is a PIL mode."""

    kind: str
    width: int
    height: int
    seed: int
    mode: str = "RGB"


@dataclass(frozen=True)
class Clip:
    """A moving disc, as `frames` pictures."""

    frames: int
    width: int
    height: int
    seed: int


@dataclass(frozen=True)
class Prompt:
    """One request: raw text, or chat messages, with its media in order of appearance."""

    name: str
    text: str | None = None
    messages: list[Json] | None = None
    images: tuple[Picture, ...] = ()
    videos: tuple[Clip, ...] = ()
    fps: float = 2.0


@dataclass(frozen=True)
class Options:
    """How the folder is written and spelled; the defaults are what transformers 4 wrote."""

    config_style: str = "hub"  # or "v5"
    original_names: bool = True  # tensor names as transformers 4 wrote them, where they differ
    dtype: str = "float32"  # or "bfloat16", "float16"
    shards: int = 1
    style: str | None = None  # tokenizer style, where it is not the family's own
    template_in: str | None = None  # where the chat template goes, see tokenizer.py
    tokenizer_form: str = "v4"  # "v5", or "dicts": special tokens as AddedToken objects
    nested_processor: bool = False  # one processor_config.json, as transformers 5 writes it
    sparse: dict[str, tuple[str, ...]] = field(default_factory=dict)  # keys left to their defaults
    generation: Json | None = field(default_factory=dict)  # None: no generation_config.json
    eos_list: bool = False  # config.json names every stop token, not one
    stop_at: int | None = None  # this token of the first continuation becomes a stop token
    longest_edge: int | None = None
    split: bool = True  # Idefics3: do_image_splitting
    max_patches: int = 12  # InternVL tiles
    image_tokens: tuple[int, int] = (4, 40)  # Qwen2.5-VL, least and most tokens of an image
    video_tokens: tuple[int, int] = (4, 40)


@dataclass(frozen=True)
class Case:
    """One checkpoint. `config` holds the Hugging Face config's own fields, in version 5 names."""

    name: str
    family: str
    about: str
    config: Json
    prompts: tuple[Prompt, ...]
    max_new: int = 16
    batch: tuple[str, ...] = ()
    options: Options = Options()


def user(*parts: Json | str) -> Json:
    return _turn("user", parts)


def assistant(*parts: Json | str) -> Json:
    return _turn("assistant", parts)


def system(*parts: Json | str) -> Json:
    return _turn("system", parts)


def plain(role: str, text: str) -> Json:
    return {"role": role, "content": text}


def _turn(role: str, parts: tuple[Json | str, ...]) -> Json:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": role, "content": content}
