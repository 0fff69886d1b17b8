"""The processor of models that take pictures and clips of any size as grids of patches.

Source: transformers image_processing_pil_qwen2_vl.py and processing_qwen2_vl.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.errors import ProcessorError
from mlx_vlm_pipes.hf_config import AutoConfig, HuggingFaceConfig, require_vision_config
from mlx_vlm_pipes.media.records import Cap, Tiles
from mlx_vlm_pipes.processing.base import (
    ContextFields,
    EncodedMedia,
    MediaTokens,
    VisionProcessor,
    check_num_tokens,
)
from mlx_vlm_pipes.processing.grids import Grid, GridImage, UntimedContext
from mlx_vlm_pipes.processing.patches import (
    ClipSettings,
    PatchDefaults,
    PatchSettings,
    cap_of,
    fit,
)
from mlx_vlm_pipes.processing.records import clip_record, picture_record
from mlx_vlm_pipes.processing.settings import ProcessorFiles
from mlx_vlm_pipes.processing.transforms import cut_clip, image_hash, to_array
from mlx_vlm_pipes.processing.types import ProcessedPrompt, PromptRequest
from mlx_vlm_pipes.processing.video import Clip

IMAGE, VIDEO, START = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"


class GridProcessor(VisionProcessor):
    """A picture is one ImageMetadata, a clip one or several, as the family has it.

    image_defaults, video_defaults: what the family takes where its files say nothing;
    max_video_tokens: as for ClipSettings; context_class: of the contexts that `make_context` makes.
    """

    accepted_options = ("min_pixels", "max_pixels")
    image_defaults: ClassVar[PatchDefaults]
    video_defaults: ClassVar[PatchDefaults]
    max_video_tokens: ClassVar[int]
    context_class: ClassVar[type[UntimedContext]] = UntimedContext

    @abstractmethod
    def read_sizes(self, vision_config: AutoConfig) -> tuple[int, int, int]:
        """As the model is configured: pixels of a patch, patches merged, frames in a patch."""

    def read_settings(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> MediaTokens:
        del overrides  # there are none
        files, names = ProcessorFiles.read(self.folder), self.tokenizer.named_tokens
        self.image_token = names.get("image_token", IMAGE)
        self.video_token = names.get("video_token", VIDEO)
        self.image_token_id = self.agreed_token_id(self.image_token, config, "image_token_id")
        self.video_token_id = self.agreed_token_id(self.video_token, config, "video_token_id")
        self.start_token_id = self.agreed_token_id(START, config, "vision_start_token_id")
        self.image_settings = PatchSettings.read(files.image, self.image_defaults)
        self.video_settings = PatchSettings.read(files.video, self.video_defaults)
        self.clip_settings = ClipSettings.read(files.video, self.max_video_tokens)
        self._check_patches(*self.read_sizes(require_vision_config(HuggingFaceConfig(config))))
        return MediaTokens(
            {"image": (self.image_token,), "video": (self.video_token,)},
            (self.image_token_id, self.video_token_id),
        )

    @property
    def digest(self) -> str:
        return type(self).__name__

    def _check_patches(self, patch: int, merge: int, step: int) -> None:
        """Raises: ProcessorError unless pictures and clips are cut as the model's config says."""
        for settings in (self.image_settings, self.video_settings):
            own = (settings.patch, settings.merge, settings.step)
            if own != (patch, merge, step):
                raise ProcessorError(
                    f"{self.folder}: patches of {own[0]} pixels merged by {own[1]}, {own[2]} frames"
                    f" each, in the processor; of {patch}, by {merge}, {step} frames in config.json"
                )

    def check(self, request: PromptRequest, num_videos: int) -> None:
        super().check(request, num_videos)
        self.image_settings.limited(request)
        self.video_settings.limited(request)

    def grid_image(self, patches: np.ndarray, grid: Grid, *, is_video: bool = False) -> GridImage:
        """A picture, clip or frame, hashed; its range is [0, rows that it becomes)."""
        identity = self.grid_hash(patches, grid)
        return GridImage(0, self.num_rows(patches), patches, identity, grid, is_video)

    def num_rows(self, patches: np.ndarray) -> int:
        """Rows of the decoder that the patches become."""
        return len(patches) // self.image_settings.merge**2

    def encode_image(self, source: Any, request: PromptRequest) -> EncodedMedia:
        settings = self.image_settings.limited(request)
        picture = self.load(source, request, settings.pixels)
        image = picture.image
        resized = fit(image, image.size, settings)
        frames = np.repeat(to_array(resized, settings.pixels)[None], settings.step, axis=0)
        made = self.grid_image(*cut(frames, settings, image.size))
        cap = cap_of(image.size, settings)
        tiles = Tiles(1, 1, resized.size, self._token_grid(made.grid_thw))
        return EncodedMedia(
            replacement=self.image_token * made.end_idx,
            token_id=self.image_token_id,
            images=[made],
            record=picture_record(picture, resized, made.grid_thw, tiles, cap),
        )

    def _token_grid(self, grid: Grid) -> tuple[int, int]:
        """Rows and columns of tokens of each step of a grid in patches."""
        merge = self.image_settings.merge
        return grid[1] // merge, grid[2] // merge

    def cut_clip(self, clip: Clip, settings: PatchSettings) -> tuple[np.ndarray, Grid]:
        """Patches of prepared frames, and their grid."""
        frames = np.stack([to_array(frame, settings.pixels) for frame in clip.frames])
        return cut(frames, settings, clip.source_size)

    def encoded_clip(
        self,
        clip: Clip,
        images: Sequence[GridImage],
        grid: Grid,
        replacement: str,
        cap: Cap | None,
    ) -> EncodedMedia:
        """grid: of the whole clip, which may be several images, one behind the other.

        cap: the limit that decided the size of its frames.
        """
        return EncodedMedia(
            replacement=replacement,
            token_id=self.video_token_id,
            images=images,
            record=clip_record(clip, grid, self._token_grid(grid), cap),
        )

    def grid_hash(self, patches: np.ndarray, grid: Grid, more: str = "") -> int:
        """As image_hash: the same patches in another grid are another picture."""
        return image_hash(patches, f"{self.digest}|{grid}|{more}")

    def arrays(self, media: Sequence[EncodedMedia]) -> dict[str, np.ndarray]:
        """Patches float32 [P, C*tp*p*p] and grids int64 [N, 3], of pictures and of clips."""
        out: dict[str, np.ndarray] = {}
        names = {"image": "pixel_values", "video": "pixel_values_videos"}
        for kind, name in names.items():
            items = [item for item in media if item.kind == kind]
            if items:
                images = [image for item in items for image in item.images]
                out[name] = np.concatenate([image.pixel_values for image in images])
                out[f"{kind}_grid_thw"] = np.array([item.grid for item in items], np.int64)
        return out

    def make_context(self, processed: ProcessedPrompt, fields: ContextFields) -> TextContext:
        context = self.context_class(
            **fields,
            vision_token_ids=list(self.tokens.ids),
            images=processed.images,
            spatial_merge_size=self.image_settings.merge,
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
        )
        context.refresh_positions()
        return context


def cut(
    frames: np.ndarray, settings: PatchSettings, source_size: tuple[int, int]
) -> tuple[np.ndarray, Grid]:
    """Frames float32 [T, 3, H, W] as patches [t*h*w, C*tp*p*p] and the grid (t, h, w).

    Raises: InputError for more rows than any model takes; source_size (width, height) is named.
    """
    patches = cut_clip(frames, settings.patch, settings.merge, settings.step)
    rows, columns = frames.shape[2] // settings.patch, frames.shape[3] // settings.patch
    check_num_tokens(len(patches) // settings.merge**2, source_size)
    return patches, (len(patches) // (rows * columns), rows, columns)
