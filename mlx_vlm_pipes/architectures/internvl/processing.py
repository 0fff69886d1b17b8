"""InternVL, in the layout of transformers and in that of the original InternVLChatModel.

A picture is cut into tiles chosen by its aspect ratio; each tile is a run of <IMG_CONTEXT>.
Source: transformers image_processing_pil_got_ocr2.py, processing_internvl.py and
video_processing_internvl.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_vlm_pipes.architectures.internvl.facts import FACTS
from mlx_vlm_pipes.architectures.internvl.sizes import TileSizes, is_original
from mlx_vlm_pipes.errors import ProcessorError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.media.records import Cap, Tiles
from mlx_vlm_pipes.processing.base import (
    EncodedMedia,
    MediaTokens,
    VisionProcessor,
    check_num_tokens,
)
from mlx_vlm_pipes.processing.records import clip_record, picture_record
from mlx_vlm_pipes.processing.settings import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PixelSettings,
    ProcessorFiles,
    Settings,
)
from mlx_vlm_pipes.processing.transforms import (
    cut_tiles,
    join_tiles,
    require_side,
    resize,
    to_array,
)
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import ClipPlan, VideoInfo, arange_indices, load_clip

if TYPE_CHECKING:
    from PIL.Image import Image

BICUBIC = 3
DEFAULT_TILES = 12
DEFAULT_FRAMES = 8  # of a clip, as in the original code's examples
MAX_TILES = 256
MAX_TILE_PX = 2048
NEXT_SQUARE = 4  # times as many tiles hold the next larger grid of any ratio


@dataclass(frozen=True)
class TileSettings:
    """side_px and patch_px of a tile; how many tiles; whether a thumbnail follows several."""

    side_px: int
    patch_px: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    tokens: int


class InternVLProcessor(VisionProcessor):
    """All tiles of a picture are one ImageMetadata; each frame of a clip is one tile."""

    facts = FACTS

    def read_settings(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> MediaTokens:
        outer = HuggingFaceConfig(config)
        original, sizes = is_original(outer), TileSizes.read(outer, overrides)
        files = ProcessorFiles.read(self.folder, required=not original)
        names = self.tokenizer.named_tokens
        self.start_token = names.get("start_image_token", "<img>")
        self.end_token = names.get("end_image_token", "</img>")
        self.image_token = names.get("context_image_token", "<IMG_CONTEXT>")
        keys = ("image_token_id", "img_context_token_id")
        self.image_token_id = self.agreed_token_id(self.image_token, config, *keys)
        for token in (self.start_token, self.end_token):
            self.tokenizer.require_token_id(token)
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if original else (CLIP_MEAN, CLIP_STD)
        image, clip = files.image, files.video
        if original:
            image, clip = without_crop(image), without_crop(clip)
        self.pixels = PixelSettings.read(image, BICUBIC, mean, std)
        self.clip_pixels = PixelSettings.read(clip, BICUBIC, mean, std)
        self.clip_settings = clip
        self.tiles = read_tiles(files, sizes, original=original)
        video = names.get("video_token", "<video>")
        return MediaTokens(
            markers={"image": (self.image_token, "<image>"), "video": (video,)},
            ids=(self.image_token_id,),
            text_markers={"image": "<image>\n", "video": f"{video}\n"} if original else {},
        )

    @property
    def digest(self) -> str:
        return f"internvl|{self.pixels}|{self.clip_pixels}|{self.tiles}"

    def encode_image(self, source: Any, request: PromptRequest) -> EncodedMedia:
        picture = self.load(source, request, self.pixels)
        image = picture.image
        canvas, tiles, cap = cut(image, self.tiles, self.pixels)
        array = np.stack([to_array(tile, self.pixels) for tile in tiles])  # [tiles, 3, S, S]
        run = len(tiles) * self.tiles.tokens
        check_num_tokens(run, image.size)
        side = self.tiles.side_px
        rows, columns = canvas.height // side, canvas.width // side
        cut_as = Tiles(rows, columns, (side, side), self._token_grid, len(tiles) > rows * columns)
        return EncodedMedia(
            replacement=self.run_text(run),
            token_id=self.image_token_id,
            images=[self.new_image(cut_tiles(array, self.tiles.patch_px), run)],
            record=picture_record(picture, canvas, (rows, columns), cut_as, cap),
        )

    @property
    def _token_grid(self) -> tuple[int, int]:
        """Rows and columns of a tile's tokens: tiles are square."""
        side = math.isqrt(self.tiles.tokens)
        return side, side

    def encode_clip(self, source: Any, request: PromptRequest) -> EncodedMedia:
        side, count = self.tiles.side_px, request.num_frames or DEFAULT_FRAMES
        pixels, said = self.clip_pixels, self.clip_settings.edges("size", ("height",))
        if said and said["height"] != side:
            raise self.clip_settings.error("size", said["height"], f"{side}, a tile's side")

        def choose(info: VideoInfo) -> np.ndarray:
            return sample_frames(info, count)

        def prepare(frame: Image, first: tuple[int, int], num_frames: int) -> Image:
            del first, num_frames
            if not pixels.do_resize:
                return require_side(frame, side)
            return resize(frame, side, side, pixels)

        convert = pixels.convert_rgb
        plan = ClipPlan(request.fps, choose, prepare, request.access, convert_rgb=convert)
        clip = load_clip(source, plan)
        array = np.stack([to_array(frame, pixels) for frame in clip.frames])
        patches = cut_tiles(array, self.tiles.patch_px)
        tokens = self.tiles.tokens
        check_num_tokens(tokens * len(array), clip.source_size)
        lines = [f"Frame{i + 1}: {self.run_text(tokens)}" for i in range(len(array))]
        cap = Cap("image_size", side) if max(clip.source_size) > side else None
        return EncodedMedia(
            replacement="\n".join(lines),
            token_id=self.image_token_id,
            images=[self.new_image(tile[None], tokens) for tile in patches],
            record=clip_record(clip, (1, 1), self._token_grid, cap),
        )

    def run_text(self, num_tokens: int) -> str:
        return self.start_token + self.image_token * num_tokens + self.end_token

    def arrays(self, media: Sequence[EncodedMedia]) -> dict[str, np.ndarray]:
        """pixel_values float32 [tiles, 3, S, S]; num_patches int64, tiles of each picture."""
        if not media:
            return {}
        tiles = [[image.pixel_values for image in item.images] for item in media]
        counts = [sum(len(part) for part in parts) for parts in tiles]
        pixels = join_tiles(np.concatenate([part for parts in tiles for part in parts]))
        return {"pixel_values": pixels, "num_patches": np.array(counts, np.int64)}


def without_crop(settings: Settings) -> Settings:
    """The original folders carry a CLIP extractor's file, whose crop and size are not used."""
    unused = ("do_center_crop", "crop_size", "size")
    return Settings(settings.source, {k: v for k, v in settings.values.items() if k not in unused})


def read_tiles(files: ProcessorFiles, sizes: TileSizes, *, original: bool) -> TileSettings:
    """Tile sizes and numbers. Raises: ProcessorError for sizes that do not fit each other."""
    side = sizes.side_px
    if not original:
        side = files.image.edges("size", ("height",)).get("height", side)
    low = sizes.min_tiles or files.image.integer("min_patches", 1)
    high = sizes.max_tiles or files.image.integer("max_patches", DEFAULT_TILES)
    if high == 1:  # pictures are not cut at all
        low = 1
    if side > MAX_TILE_PX or high > MAX_TILES or low > high:
        raise ProcessorError(
            f"{low} to {high} tiles of {side} pixels (min_patches and max_patches of "
            f"{files.image.source}, or vision_config_overrides); expected a range of at most "
            f"{MAX_TILES} tiles of {MAX_TILE_PX} pixels"
        )
    tokens = sizes.tokens(side)
    files.processor.agree("image_seq_length", tokens)
    return TileSettings(side, sizes.patch_px, low, high, sizes.use_thumbnail, tokens)


def cut(
    image: Image, settings: TileSettings, pixels: PixelSettings
) -> tuple[Image, list[Image], Cap | None]:
    """An RGB picture as it is cut, its tiles, and whether the number of tiles made it smaller.

    Tiles lie row by row, the thumbnail is last.
    """
    side, high = settings.side_px, settings.max_tiles
    columns, rows = 1, 1
    if high > 1:
        columns, rows = best_grid(image.size, side, settings.min_tiles, high)
    canvas = resize(image, columns * side, rows * side, pixels)
    tiles = [
        canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
        for y in range(rows)
        for x in range(columns)
    ]
    if settings.use_thumbnail and len(tiles) > 1:
        tiles.append(resize(image, side, side, pixels))
    return canvas, tiles, _cap_of(image.size, (columns, rows), settings)


def _cap_of(size: tuple[int, int], grid: tuple[int, int], settings: TileSettings) -> Cap | None:
    """max_tiles, where a picture was shrunk that more tiles would have shown larger."""
    side, high = settings.side_px, settings.max_tiles
    if grid[0] * grid[1] * side**2 >= size[0] * size[1]:
        return None
    columns, rows = best_grid(size, side, settings.min_tiles, NEXT_SQUARE * high)
    return Cap("max_tiles", high) if columns * rows > grid[0] * grid[1] else None


def best_grid(size: tuple[int, int], side: int, low: int, high: int) -> tuple[int, int]:
    """(columns, rows) closest to the picture's aspect ratio.

    Of equally close grids, a larger one wins while the picture covers more than half of it.
    """
    width, height = size
    best, smallest = (1, 1), float("inf")
    for columns, rows in grids(low, high):
        distance = abs(width / height - columns / rows)
        larger = distance == smallest and width * height > 0.5 * side * side * columns * rows
        if distance < smallest or larger:
            best, smallest = (columns, rows), distance
    return best


@lru_cache(maxsize=16)
def grids(low: int, high: int) -> list[tuple[int, int]]:
    """All (columns, rows) with low to high tiles: by columns, then rows, then stably by number."""
    every = [
        (columns, rows)
        for columns in range(1, high + 1)
        for rows in range(1, high // columns + 1)
        if columns * rows >= low
    ]
    return sorted(every, key=lambda grid: grid[0] * grid[1])


def sample_frames(info: VideoInfo, num_frames: int) -> np.ndarray:
    """Frame numbers at the middle of num_frames equal parts, at most all frames.

    Source: transformers video_processing_internvl.py, sample_frames.
    """
    step = info.num_frames / min(num_frames, info.num_frames)
    return arange_indices(step / 2, info.num_frames, step)
