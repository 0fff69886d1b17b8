"""Idefics3 and SmolVLM: pictures cut into frames, each a run of <image> tokens.

Source: transformers image_processing_pil_idefics3.py, processing_idefics3.py,
processing_smolvlm.py and video_processing_smolvlm.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_vlm_pipes.architectures.idefics3.facts import FACTS
from mlx_vlm_pipes.architectures.idefics3.sizes import FrameSizes
from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.media.records import Cap, Tiles
from mlx_vlm_pipes.processing.base import (
    EncodedMedia,
    MediaTokens,
    VisionProcessor,
    check_num_tokens,
)
from mlx_vlm_pipes.processing.messages import Message
from mlx_vlm_pipes.processing.records import clip_record, picture_record
from mlx_vlm_pipes.processing.settings import (
    HALF,
    PixelSettings,
    ProcessorFiles,
    Settings,
)
from mlx_vlm_pipes.processing.transforms import require_side, resize, to_array
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.processing.video import Clip, ClipPlan, VideoInfo, load_clip

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE, VIDEO = "<image>", "<video>"
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
MAX_SIDE_PX = 4096  # whatever `size` says
MAX_FRAME_PX = 2048
LANCZOS = 1
EDGES = ("longest_edge", "height", "width")
SKIP_S = 1  # of a long clip, at either end
SMALL_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Idefics3Settings:
    """longest_edge: of the resized picture; None where `size` gives height and width instead."""

    pixels: PixelSettings
    size: tuple[tuple[str, int], ...]
    frame_px: int
    do_image_splitting: bool

    @classmethod
    def read(cls, settings: Settings) -> Idefics3Settings:
        edges = settings.edges("size", EDGES)
        frame = settings.edges("max_image_size", ("longest_edge",)).get("longest_edge", 364)
        if frame > MAX_FRAME_PX:
            raise settings.error("max_image_size", frame, f"at most {MAX_FRAME_PX}")
        if not edges:
            edges = {"longest_edge": 4 * 364}
        if "longest_edge" not in edges and len(edges) != 2:
            raise settings.error("size", edges, "longest_edge, or height and width")
        return cls(
            pixels=PixelSettings.read(settings, LANCZOS, HALF, HALF),
            size=tuple(sorted(edges.items())),
            frame_px=frame,
            do_image_splitting=settings.flag("do_image_splitting", default=True),
        )


@dataclass(frozen=True)
class ClipSettings:
    """How SmolVLM takes frames from a clip, and what becomes of them.

    size: of the first resize, as in Idefics3Settings; frame_px: of the square frame behind it.
    """

    fps: float
    max_frames: int
    pixels: PixelSettings
    size: tuple[tuple[str, int], ...]
    frame_px: int


class Idefics3Processor(VisionProcessor):
    """Frames of `frame_px` squared, `image_seq_len` tokens each; one ImageMetadata a frame."""

    facts = FACTS

    def read_settings(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> MediaTokens:
        del overrides  # there are none
        files = ProcessorFiles.read(self.folder)
        self.settings = Idefics3Settings.read(files.image)
        self.sizes = FrameSizes.read(HuggingFaceConfig(config))
        self.image_seq_len = self.sizes.tokens_of(self.settings.frame_px, files.image.source)
        files.processor.agree("image_seq_len", self.image_seq_len)
        self.clips = read_clips(files)
        keys = ("image_token_id", "image_token_index")
        self.image_token_id = self.agreed_token_id(IMAGE, config, *keys)
        self.tokenizer.require_token_id(FAKE)  # GLOBAL may be plain text, as row and column are
        return MediaTokens({"image": (IMAGE,), "video": (VIDEO,)}, (self.image_token_id,))

    @property
    def digest(self) -> str:
        return f"idefics3|{self.settings}|{self.clips}"

    def forms(self, messages: list[Message]) -> list[list[Message]]:
        """Clips are written as the text <video>: older templates know no part of type video."""
        return super().forms([{**m, "content": _videos_as_text(m["content"])} for m in messages])

    def check(self, request: PromptRequest, num_videos: int) -> None:
        super().check(request, num_videos)
        if num_videos and self.clips is None:
            raise InputError(
                f"{self.architecture}: this checkpoint was not made for video; "
                "give frames of it as images"
            )

    def encode_image(self, source: Any, request: PromptRequest) -> EncodedMedia:
        picture = self.load(source, request, self.settings.pixels)
        image = picture.image
        rows, columns = frame_grid(image.size, self.settings)
        check_num_tokens((rows * columns + 1) * self.image_seq_len, image.size)
        canvas, frames = split(image, self.settings)
        arrays = [to_array(frame, self.settings.pixels) for frame in frames]
        side = self.settings.frame_px
        whole = Tiles(1, 1, (side, side), self._token_grid)
        tiles = replace(whole, rows=rows, columns=columns, overview=True) if rows else whole
        cap = first_cap(image.size, self.settings)
        return EncodedMedia(
            replacement=image_text(rows, columns, self.image_seq_len),
            token_id=self.image_token_id,
            images=[self.new_image(array, self.image_seq_len) for array in arrays],
            record=picture_record(picture, canvas, (rows, columns), tiles, cap),
        )

    @property
    def _token_grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens: frames are square."""
        side = math.isqrt(self.image_seq_len)
        return side, side

    def encode_clip(self, source: Any, request: PromptRequest) -> EncodedMedia:
        settings = self.clips
        if settings is None:
            raise InputError(f"{self.architecture} takes no video")
        limit, side = request.num_frames or settings.max_frames, settings.frame_px
        self._require_same_tokens(side)

        def choose(info: VideoInfo) -> np.ndarray:
            return sample_frames(info, settings.fps, limit)

        def prepare(frame: Image, first: tuple[int, int], count: int) -> Image:
            del first, count
            return clip_frame(frame, settings)

        convert = settings.pixels.convert_rgb
        plan = ClipPlan(request.fps, choose, prepare, request.access, convert_rgb=convert)
        clip = load_clip(source, plan)
        check_num_tokens(len(clip.frames) * self.image_seq_len, clip.source_size)
        arrays = [to_array(frame, settings.pixels) for frame in clip.frames]
        cap = Cap("max_image_size", side) if max(clip.source_size) > side else None
        return EncodedMedia(
            replacement=clip_text(clip, self.image_seq_len),
            token_id=self.image_token_id,
            images=[self.new_image(array, self.image_seq_len) for array in arrays],
            record=clip_record(clip, (0, 0), self._token_grid, cap),
        )

    def _require_same_tokens(self, side: int) -> None:
        """Raises: ProcessorError for frames of clips of another size than those of pictures."""
        tokens = self.sizes.tokens_of(side, "the settings of clips")
        if tokens != self.image_seq_len:
            raise ProcessorError(
                f"the settings of clips: max_image_size is {side}, {tokens} tokens a frame; "
                f"expected {self.image_seq_len}, as pictures have"
            )

    def arrays(self, media: Sequence[EncodedMedia]) -> dict[str, np.ndarray]:
        """pixel_values float32 [1, F, 3, S, S]; pixel_attention_mask int64 [1, F, S, S]."""
        frames = [image.pixel_values for item in media for image in item.images]
        if not frames:
            return {}
        pixels = np.stack(frames)[None]
        mask = np.ones((1, len(frames), *pixels.shape[-2:]), np.int64)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


def longest_edge_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) with the longer side at `longest`, the other kept in ratio and made even."""
    width, height = size
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    return max(width, 1), max(height, 1)


def bounded_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) with the longer side at most MAX_SIDE_PX, the other kept in ratio."""
    width, height = size
    ratio = width / height
    if max(width, height) <= MAX_SIDE_PX:
        return size
    if width >= height:
        return MAX_SIDE_PX, max(int(MAX_SIDE_PX / ratio), 1)
    return max(int(MAX_SIDE_PX * ratio), 1), MAX_SIDE_PX


def first_size(size: tuple[int, int], settings: Idefics3Settings) -> tuple[int, int]:
    """(width, height) of the first resize, before splitting."""
    if not settings.pixels.do_resize:
        return size
    edges = dict(settings.size)
    if "longest_edge" in edges:
        return bounded_size(longest_edge_size(size, edges["longest_edge"]))
    return bounded_size((edges["width"], edges["height"]))


def first_cap(size: tuple[int, int], settings: Idefics3Settings) -> Cap | None:
    """What made a picture (width, height) smaller than it was."""
    side, first = settings.frame_px, first_size(size, settings)
    if not settings.do_image_splitting and max(first) > side:
        return Cap("max_image_size", side)
    longest = dict(settings.size).get("longest_edge")
    if longest is None or not settings.pixels.do_resize or max(size) <= max(first):
        return None
    return Cap("longest_edge", max(first))


def frame_grid(size: tuple[int, int], settings: Idefics3Settings) -> tuple[int, int]:
    """(rows, columns) of frames of a picture (width, height); (0, 0): the whole picture alone."""
    width, height = frame_multiples(first_size(size, settings), settings.frame_px)
    rows, columns = height // settings.frame_px, width // settings.frame_px
    single = not settings.do_image_splitting or rows == columns == 1
    return (0, 0) if single else (rows, columns)


def split(image: Image, settings: Idefics3Settings) -> tuple[Image, list[Image]]:
    """An RGB picture as it is cut; its square frames, row by row, the whole picture last."""
    pixels, side = settings.pixels, settings.frame_px
    rows, columns = frame_grid(image.size, settings)
    if pixels.do_resize:
        image = resize(image, *first_size(image.size, settings), pixels)
    if not rows:
        whole = resize(image, side, side, pixels)
        return whole, [whole]
    image = resize(image, columns * side, rows * side, pixels)
    frames = [
        image.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
        for y in range(rows)
        for x in range(columns)
    ]
    return image, [*frames, resize(image, side, side, pixels)]


def frame_multiples(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) rounded up to multiples of a frame, the shorter by the rounded longer one."""
    width, height = size
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = math.ceil(int(width / ratio) / side) * side
    else:
        height = math.ceil(height / side) * side
        width = math.ceil(int(height * ratio) / side) * side
    return max(width, side), max(height, side)


def image_text(rows: int, columns: int, seq_len: int) -> str:
    """What stands for a picture in the prompt."""
    run = IMAGE * seq_len
    lines = [
        "".join(f"{FAKE}<row_{r + 1}_col_{c + 1}>{run}" for c in range(columns)) + "\n"
        for r in range(rows)
    ]
    gap = "\n" if rows else ""
    return "".join(lines) + f"{gap}{FAKE}{GLOBAL}{run}{FAKE}"


def clip_text(clip: Clip, seq_len: int) -> str:
    """What stands for a clip in SmolVLM's prompt: an introduction, then each frame's time."""
    duration = timedelta(seconds=int(clip.duration_s))
    text = (
        f"You are provided the following series of {in_words(len(clip.frames))} frames "
        f"from a {duration} [H:MM:SS] video.\n"
    )
    for stamp in clip.timestamps_s:
        time = f"{int(stamp // 60):02d}:{int(stamp % 60):02d}"
        text += f"\nFrame from {time}:{image_text(0, 0, seq_len)}"
    return text + "\n\n"


def in_words(number: int) -> str:
    """English words for 0 to 999999, as num2words writes them."""
    if number < 20:
        return SMALL_NUMBERS[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f"-{SMALL_NUMBERS[one]}" if one else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    many, rest = divmod(number, size)
    joint = " and " if rest < 100 else ", "
    return f"{in_words(many)} {name}" + (f"{joint}{in_words(rest)}" if rest else "")


def _is_smolvlm(files: ProcessorFiles) -> bool:
    """Whether a folder's files were written for clips too, as SmolVLM2's are."""
    nested = files.processor.section("video_processor")
    return (
        nested is not None
        or files.processor.get("processor_class") == "SmolVLMProcessor"
        or files.video.get("video_processor_type") == "SmolVLMVideoProcessor"
        or files.image.get("video_sampling") is not None
    )


def clip_frame(frame: Image, settings: ClipSettings) -> Image:
    """A frame of a clip, resized twice: to `size`, then to the square.

    Raises: InputError, without resizing, for a frame that is not such a square.
    Source: transformers video_processing_smolvlm.py, resize.
    """
    edges, pixels, side = dict(settings.size), settings.pixels, settings.frame_px
    if not pixels.do_resize:
        return require_side(frame, side)
    width, height = edges.get("width", 0), edges.get("height", 0)
    if "longest_edge" in edges:
        width, height = longest_edge_size(frame.size, edges["longest_edge"])
    width, height = bounded_size((width, height))
    return resize(resize(frame, width, height, pixels), side, side, pixels)


def read_clips(files: ProcessorFiles) -> ClipSettings | None:
    """SmolVLM2's settings of clips; None for checkpoints without them (Idefics3, SmolVLM 1).

    In a file with `video_sampling`, `size` replaces its video_size.
    Source: transformers video_processing_smolvlm.py, __init__.
    """
    settings = files.video
    old = settings.section("video_sampling")
    if old is not None:
        edges = settings.edges("size", EDGES) or old.edges("video_size", EDGES)
        frames, fps = old.integer("max_frames", 64), old.number("fps", 1.0)
    elif _is_smolvlm(files):
        edges = settings.edges("size", EDGES)
        frames, fps = settings.integer("num_frames", 64), settings.number("fps", 1.0)
    else:
        return None
    read = Idefics3Settings.read(settings)
    size = tuple(sorted(edges.items())) or read.size
    return ClipSettings(fps, frames, read.pixels, size, read.frame_px)


def sample_frames(info: VideoInfo, fps: float, max_frames: int) -> np.ndarray:
    """Frame numbers, evenly over the clip without its first and last second if it is long.

    Source: transformers video_processing_smolvlm.py, sample_frames.
    """
    last = info.num_frames - 1
    count = max(min(round(fps * info.duration_s), max_frames), 1)
    start, end = 0, last
    if info.duration_s - 2 * SKIP_S > max_frames * fps:
        start = int(SKIP_S * info.fps)
        end = min(int(info.num_frames - SKIP_S * info.fps), last)
    if start >= end:
        start, end = 0, last
    return np.unique(np.linspace(start, end, count, dtype=np.int64))


def _videos_as_text(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": VIDEO} if p["type"] == "video" else p for p in content]
