"""What goes into a processor, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mlx_vlm_pipes.contexts import ImageMetadata
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.media.records import MediaRecord
from mlx_vlm_pipes.options import PROMPT_OPTIONS, default, unfit
from mlx_vlm_pipes.processing.chat_template import OWN_NAMES
from mlx_vlm_pipes.processing.fetch import Access


@dataclass(frozen=True)
class PromptRequest:
    """One request as a user makes it.

    prompt: text, or chat messages in the Hugging Face / OpenAI content-list form. images, videos:
    whatever `images.load_image` and `video.load_clip` take; they fill the `{"type": "image"}`
    parts that carry no picture, in order. raw: take a text prompt verbatim, placeholders included.
    fps: frames a second that a list of frames holds, and that are sampled from a video file.
    min_pixels, max_pixels: limits of one picture or frame, of models that take any size.
    num_frames: how many frames to take from a video file, instead of `fps`. local_files: whether
    text may name files. allow_private: whether URLs may lead to this machine or its network.
    tools, chat_template_kwargs: what else the chat template reads, in plain JSON types.
    Raises: InputError for a prompt that is neither text nor messages, for images or videos that
    are no list or tuple, and for an option out of its bounds.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    raw: bool = default("raw")
    system: str | None = default("system")
    fps: float = default("fps")
    min_pixels: int | None = default("min_pixels")
    max_pixels: int | None = default("max_pixels")
    num_frames: int | None = default("num_frames")
    local_files: bool = default("local_files")
    allow_private: bool = default("allow_private")
    tools: Sequence[Mapping[str, Any]] | None = default("tools")
    chat_template_kwargs: Mapping[str, Any] | None = default("chat_template_kwargs")

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, Sequence) or isinstance(self.prompt, (bytes, bytearray)):
            raise unfit("prompt", self.prompt, "a text or a list of messages")
        for name, value in (("images", self.images), ("videos", self.videos)):
            if not isinstance(value, (list, tuple)):
                raise InputError(f"{name} is a {type(value).__name__}; expected a list")
        for name, option in PROMPT_OPTIONS.items():
            option.read(vars(self)[name])
        for name in self.chat_template_kwargs or ():
            if name in OWN_NAMES:
                message = f"chat_template_kwargs: no {name} there; {OWN_NAMES[name]}"
                raise InputError(message, param="chat_template_kwargs")

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is given besides messages and special tokens."""
        tools = {} if self.tools is None else {"tools": self.tools}
        return {**(self.chat_template_kwargs or {}), **tools}

    @property
    def access(self) -> Access:
        return Access(self.local_files, self.allow_private)


@dataclass
class ProcessedPrompt:
    """Token ids with placeholders expanded, and the pictures that belong to them.

    text: the prompt as the chat template wrote it, before expansion. images: in token order, one
    for each run of placeholders. arrays: makes the Hugging Face layout, called at most once.
    """

    text: str
    input_ids: list[int]
    images: list[ImageMetadata]
    media: list[MediaRecord]
    arrays: Callable[[], dict[str, np.ndarray]] = field(default=dict, repr=False)

    def __repr__(self) -> str:
        return f"ProcessedPrompt({len(self.input_ids)} tokens, {len(self.media)} media)"

    def _repr_html_(self) -> str:
        from mlx_vlm_pipes.display.html import prompt_html

        return prompt_html(self.text, len(self.input_ids), self.media)

    @cached_property
    def hf_arrays(self) -> dict[str, np.ndarray]:
        return self.arrays()

    @property
    def pixel_values(self) -> np.ndarray | None:
        """float32, laid out as the Hugging Face processor does; None without pictures."""
        return self.hf_arrays.get("pixel_values")

    @property
    def pixel_values_videos(self) -> np.ndarray | None:
        """float32 patches of the clips, where they are kept apart; None elsewhere."""
        return self.hf_arrays.get("pixel_values_videos")

    @property
    def extra(self) -> dict[str, np.ndarray]:
        """All other arrays: grids, image sizes, masks."""
        skip = ("pixel_values", "pixel_values_videos")
        return {name: value for name, value in self.hf_arrays.items() if name not in skip}
