"""Frames of a clip: from a list, a folder, an animated GIF/WebP/PNG, or a film through PyAV.

A list of frames counts as sampled already; files are sampled as the family's plan says. Frames are
prepared (resized) one by one as they are decoded, so that a long film never lies in memory whole.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.processing.animations import Animation, is_animation, read_animation
from mlx_vlm_pipes.processing.fetch import Access, is_url
from mlx_vlm_pipes.processing.images import (
    ANYWHERE,
    as_array,
    check_size,
    describe,
    load_image,
    local_file,
    open_file,
    open_image,
    read_bytes,
    to_rgb,
)

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FILE_FRAMES = 200_000
MAX_LIST_FRAMES = 4096
MAX_ANIMATION_BYTES = 2**28
MAX_ANIMATION_PIXELS = 2**30  # of all frames: what takes about ten seconds to decode
MAX_FILM_PIXELS = 2**36  # up to the last frame that is read: 18 minutes of 1080p at 30 a second
STILL_DURATION_MS = 100  # what browsers assume where an animation names none
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
# Containers that hold their own frames; a playlist would open other files and addresses.
FILM_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,flv,mpegts,mpeg"


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself before frames are chosen."""

    num_frames: int
    fps: float

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps


@dataclass(frozen=True)
class ClipPlan:
    """How a family wants its frames.

    list_fps: frames a second of a list of frames. choose: ascending frame numbers to take from a
    file. prepare: (RGB frame, size (width, height) of the first frame, number of frames) -> frame.
    convert_rgb: as `load_image` takes it, for frames of a list; decoded files give RGB anyway.
    """

    list_fps: float
    choose: Callable[[VideoInfo], np.ndarray]
    prepare: Callable[[Image, tuple[int, int], int], Image]
    access: Access = ANYWHERE
    convert_rgb: bool = True


@dataclass(frozen=True)
class Clip:
    """Prepared RGB frames; fps of what was sampled; timestamps_s of each frame.

    total_frames: that the clip has. num_chosen: that were to be read of them; a film that ends
    early gives fewer.
    """

    frames: list[Image]
    fps: float
    timestamps_s: list[float]
    duration_s: float
    source_size: tuple[int, int]
    total_frames: int
    num_chosen: int


def load_clip(source: Any, plan: ClipPlan) -> Clip:
    """Read, sample and prepare one clip.

    Args: source, a sequence of frames (whatever `load_image` takes), an array [T, H, W, 3], a
    folder of pictures, or the path, URL or bytes of an animation or a film.
    Raises: MediaError naming the source.
    """
    from PIL import Image as pil

    source = source if isinstance(source, pil.Image) else as_array(source)
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    if isinstance(source, (list, tuple)):
        return _from_list(source, plan, "list of frames")
    name = describe(source)
    if isinstance(source, (np.ndarray, pil.Image)):
        raise MediaError(f"{name} is one picture; give a clip as a list of frames")
    if isinstance(source, os.PathLike) or (isinstance(source, str) and not is_url(source)):
        path = local_file(source, plan.access)
        if os.path.isdir(path):
            return _from_list(_pictures_in(path, name), plan, name)
        with open_file(path, name) as file:
            return _from_stream(file, plan, name)
    return _from_stream(io.BytesIO(read_bytes(source, plan.access)), plan, name)


def arange_indices(start: float, total: int, step: float) -> np.ndarray:
    """Frame numbers start, start + step, ... below total, rounded as torch's float32 arange does.

    Returns: int64 [ceil((total - start) / step)].
    """
    count = max(math.ceil((total - start) / step), 0)
    return (start + step * np.arange(count)).astype(np.float32).astype(np.int64)


def _from_list(source: Sequence[Any], plan: ClipPlan, name: str) -> Clip:
    if not 1 <= len(source) <= MAX_LIST_FRAMES:
        raise MediaError(f"{name} has {len(source)} frames; expected 1 to {MAX_LIST_FRAMES}")
    frames = (load_image(f, plan.access, convert=plan.convert_rgb) for f in source)
    stamps = [i / plan.list_fps for i in range(len(source))]
    return _prepared(frames, len(source), VideoInfo(len(source), plan.list_fps), stamps, plan)


def _pictures_in(folder: Path, name: str) -> list[Path]:
    def natural(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name.lower())
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    try:
        pictures = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise MediaError(f"{name} cannot be opened ({error.strerror})") from error
    if not pictures:
        raise MediaError(f"{name}: no pictures in this folder")
    return sorted(pictures, key=natural)


def _from_stream(stream: BinaryIO, plan: ClipPlan, name: str) -> Clip:
    """A film is read where it lies; an animation is small enough to be held."""
    head = stream.read(12)
    stream.seek(0)
    if not is_animation(head):
        return _from_film(stream, plan, name)
    data = stream.read(MAX_ANIMATION_BYTES + 1)
    if len(data) > MAX_ANIMATION_BYTES:
        raise MediaError(f"{name} is larger than the limit of {MAX_ANIMATION_BYTES} bytes")
    image = open_image(data, name)
    animation = read_animation(data, image.size)
    _check_animation(animation, name)
    return _from_animation(image, animation, plan, name)


def _check_animation(animation: Animation, name: str) -> None:
    """Raises: MediaError for more frames or pixels than are decoded in good time."""
    count, pixels = len(animation.durations_ms), animation.num_pixels
    if count > MAX_FILE_FRAMES:
        raise MediaError(f"{name} has {count} frames; the limit is {MAX_FILE_FRAMES}")
    if count > 1 and pixels > MAX_ANIMATION_PIXELS:
        raise MediaError(
            f"{name} has {count} frames of {animation.width}x{animation.height}, {pixels} pixels "
            f"in all; the limit is {MAX_ANIMATION_PIXELS}, make it smaller or shorter"
        )


def _from_animation(image: Image, animation: Animation, plan: ClipPlan, name: str) -> Clip:
    count = len(animation.durations_ms)
    total_ms = sum(duration or STILL_DURATION_MS for duration in animation.durations_ms)
    info = VideoInfo(count, count / total_ms * 1000)
    chosen = plan.choose(info)

    def frames() -> Iterator[Image]:
        for i in chosen.tolist():
            try:
                image.seek(i)
                frame = image.copy()
            except Exception as error:
                raise MediaError(f"{name} cannot be decoded at frame {i}") from error
            yield to_rgb(frame, name)

    return _sampled(frames(), chosen, info, plan, name)


def _from_film(stream: BinaryIO, plan: ClipPlan, name: str) -> Clip:
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise MediaError(
            f'{name}: films need PyAV; pip install "mlx-vlm-pipes[video]", or give a list of frames'
        ) from error
    options = {"format_whitelist": FILM_FORMATS}
    try:
        with av.open(stream, options=options) as film:
            track = next((t for t in film.streams.video if t.codec_context is not None), None)
            if track is None:
                raise MediaError(f"{name} holds no video stream that can be decoded")
            check_size((track.width, track.height), name)
            rate = track.average_rate or track.guessed_rate
            count = track.frames or sum(1 for p in film.demux(track) if p.size)
            if not rate or not 1 <= count <= MAX_FILE_FRAMES:
                raise MediaError(
                    f"{name}: {count} frames at {rate} a second cannot be sampled; the limit is "
                    f"{MAX_FILE_FRAMES} frames"
                )
            film.seek(0)
            info = VideoInfo(count, float(rate))
            chosen = plan.choose(info)
            _check_film(chosen, track.width, track.height, name)
            return _sampled(_decoded(film, track, chosen, name), chosen, info, plan, name)
    except (FFmpegError, EOFError, OverflowError, UnicodeDecodeError) as error:
        raise MediaError(f"{name} cannot be decoded as a film") from error


def _check_film(chosen: np.ndarray, width: int, height: int, name: str) -> None:
    """Raises: MediaError where more pixels lie up to the last chosen frame than MAX_FILM_PIXELS."""
    count = int(chosen.max(initial=-1)) + 1
    if count * width * height > MAX_FILM_PIXELS:
        raise MediaError(
            f"{name} has {count} frames of {width}x{height}, {count * width * height} pixels in "
            f"all; the limit is {MAX_FILM_PIXELS}, make it smaller or shorter"
        )


def _decoded(film: Any, track: Any, chosen: np.ndarray, name: str) -> Iterator[Image]:
    from PIL import Image as pil

    wanted = set(chosen.tolist())
    for i, frame in enumerate(film.decode(track)):
        if i in wanted:
            check_size((frame.width, frame.height), name)
            yield pil.fromarray(frame.to_ndarray(format="rgb24"))
        if i >= max(wanted):
            return


def _sampled(
    frames: Iterable[Image], chosen: np.ndarray, info: VideoInfo, plan: ClipPlan, name: str
) -> Clip:
    if not len(chosen):
        raise MediaError(f"{name}: none of its {info.num_frames} frames was chosen")
    stamps = [i / info.fps for i in chosen.tolist()]
    return _prepared(frames, len(chosen), info, stamps, plan)


def _prepared(
    frames: Iterable[Image], count: int, info: VideoInfo, stamps: list[float], plan: ClipPlan
) -> Clip:
    first: tuple[int, int] | None = None
    ready: list[Image] = []
    for frame in frames:
        first = first or frame.size
        ready.append(plan.prepare(frame, first, count))
    if first is None:
        raise MediaError("the clip has no frame that can be decoded")
    fps = count / info.num_frames * info.fps
    stamps = stamps[: len(ready)]
    return Clip(ready, fps, stamps, info.duration_s, first, info.num_frames, count)
