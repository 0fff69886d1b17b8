"""Broken, cut, hostile and odd pictures and clips, in every form: the same pixels, or one line."""

from __future__ import annotations

import gc
import io
import random
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mlx_vlm_pipes.errors import InputError, PipesWarning
from mlx_vlm_pipes.processing.base import TextProcessor
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from mlx_vlm_pipes.processing.types import PromptRequest as Request
from tests.fixtures_helper import FIXTURES
from tests.torture import pictures, section
from tests.torture.drawing import open_processor
from tests.torture.section import Case, one_line, require, taken_or_refused

FAMILIES = [
    "idefics3", "smolvlm", "pixtral", "internvl-qwen2", "qwen2vl", "qwen25vl", "qwen3vl",
]  # fmt: skip
WITH_CLIPS = ["smolvlm", "internvl-qwen2", "qwen2vl", "qwen25vl", "qwen3vl"]
ORIENTATION = 0x0112  # EXIF


class Section(section.Section):
    """A kind of case and a family, drawn."""

    small: ClassVar[int] = 40

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed, folder)
        self._processors: dict[str, TextProcessor] = {}
        warnings.simplefilter("ignore", PipesWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    @property
    def whole(self) -> int:
        return 1500

    def draw(self, index: int) -> Case:
        rng = self.rng(index)
        kinds = {
            "sound": 5, "broken": 8, "odd": 4, "array": 3, "exif": 2, "clip": 3, "broken clip": 4,
            "odd clip": 3, "frames": 3, "film": 2,
        }  # fmt: skip
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        family = rng.choice(WITH_CLIPS if kind in CLIPS else FAMILIES)
        ways = {
            "sound": self._sound, "broken": self._broken, "odd": self._odd, "array": self._array,
            "exif": self._exif, "clip": self._clip, "broken clip": self._broken_clip,
            "odd clip": self._odd_clip, "frames": self._frames, "film": self._film,
        }  # fmt: skip
        return ways[kind](rng, family)

    def _process(self, family: str, images: list[Any], videos: list[Any]) -> ProcessedPrompt:
        if family not in self._processors:
            self._processors[family] = open_processor(FIXTURES / family)
        request = Request("What is it?", tuple(images), tuple(videos))
        return self._processors[family].process(request)

    def _pixels(self, family: str, picture: Any) -> np.ndarray:
        pixels = self._process(family, [picture], []).pixel_values
        assert pixels is not None
        return pixels

    def _held(self, family: str, images: list[Any], videos: list[Any]) -> None:
        """Finite pixels, or one line that shows nothing of the content."""
        try:
            found = self._process(family, images, videos)
            arrays = found.hf_arrays
        except InputError as error:
            one_line(error)
            return
        finally:
            gc.collect()  # files that a case opened
        values = [a for a in arrays.values() if np.issubdtype(a.dtype, np.floating)]
        require(values and all(np.isfinite(a).all() for a in values), "pixels that are no numbers")

    def _sound(self, rng: random.Random, family: str) -> Case:
        kind = rng.choice(sorted(pictures.KEEPS))
        mode, form = rng.choice(pictures.KEEPS[kind]), rng.choice(sorted(pictures.FORMS))
        picture = pictures.draw_picture(rng, pictures.SIDES[3:], mode)
        data = pictures.stored(picture, kind)

        def run() -> None:
            source = pictures.FORMS[form](data, self.folder, rng)
            with Image.open(io.BytesIO(data)) as opened:
                opened.load()
                expected = self._pixels(family, opened)
            require(np.array_equal(self._pixels(family, source), expected), "other pixels")

        return Case(f"{family}: {kind} {mode} {picture.size} as {form}", run)

    def _broken(self, rng: random.Random, family: str) -> Case:
        kind, form = rng.choice(sorted(pictures.KEEPS)), rng.choice(sorted(pictures.FORMS))
        mode = rng.choice(pictures.KEEPS[kind])
        data = pictures.stored(pictures.draw_picture(rng, mode=mode), kind)
        how, data = pictures.damaged(data, rng)

        def run() -> None:
            self._held(family, [pictures.FORMS[form](data, self.folder, rng)], [])

        return Case(f"{family}: {kind} {mode} {how} as {form}", run)

    def _odd(self, rng: random.Random, family: str) -> Case:
        about = rng.choice(sorted({**pictures.ODD, **pictures.ODD_NAMES}))

        def run() -> None:
            self._held(family, [pictures.odd_source(about, self.folder)], [])

        return Case(f"{family}: {about}", run)

    def _array(self, rng: random.Random, family: str) -> Case:
        if rng.random() < 0.3:
            picture = pictures.draw_picture(rng, [1, 2, 9, 3000], rng.choice(pictures.MODES))
            about = f"{picture.mode} {picture.size}"
            return Case(f"{family}: {about}", lambda: self._held(family, [picture], []))
        about, array = pictures.odd_arrays(rng)
        return Case(f"{family}: {about}", lambda: self._held(family, [array], []))

    def _exif(self, rng: random.Random, family: str) -> Case:
        """All eight orientations of one upright picture are that picture."""
        turn = rng.choice([*range(1, 9), 0, 9, 65535])
        kind = rng.choice(["PNG", "TIFF", "WEBP"])
        upright = pictures.draw_picture(rng, pictures.SIDES[3:])
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        options = {"lossless": True} if kind == "WEBP" else {}
        data = pictures.stored(_turned_back(upright, turn), kind, exif=exif.tobytes(), **options)

        def run() -> None:
            expected = self._pixels(family, upright)
            require(np.array_equal(self._pixels(family, data), expected), "not upright")

        return Case(f"{family}: {kind} of EXIF orientation {turn}", run)

    def _clip(self, rng: random.Random, family: str) -> Case:
        kind, form = rng.choice(["GIF", "WEBP", "PNG"]), rng.choice(sorted(pictures.FORMS))
        data = pictures.animated(rng, kind)

        def run() -> None:
            expected = self._arrays(family, data)
            found = self._arrays(family, pictures.FORMS[form](data, self.folder, rng))
            same = all(np.array_equal(found[name], expected[name]) for name in expected)
            require(same and found.keys() == expected.keys(), "other frames")

        return Case(f"{family}: a clip, {kind} as {form}", run)

    def _arrays(self, family: str, clip: Any) -> dict[str, np.ndarray]:
        """Nothing for a clip of too few frames: equal ones were joined when it was written."""
        found = taken_or_refused(lambda: self._process(family, [], [clip]).hf_arrays)
        return found or {}

    def _broken_clip(self, rng: random.Random, family: str) -> Case:
        kind, form = rng.choice(["GIF", "WEBP", "PNG"]), rng.choice(sorted(pictures.FORMS))
        how, data = pictures.damaged(pictures.animated(rng, kind), rng)

        def run() -> None:
            self._held(family, [], [pictures.FORMS[form](data, self.folder, rng)])

        return Case(f"{family}: a clip, {kind} {how} as {form}", run)

    def _odd_clip(self, rng: random.Random, family: str) -> Case:
        about = rng.choice(sorted({**pictures.ODD, **pictures.ODD_NAMES}))

        def run() -> None:
            self._held(family, [], [pictures.odd_source(about, self.folder)])

        return Case(f"{family}: as a clip, {about}", run)

    def _frames(self, rng: random.Random, family: str) -> Case:
        """Lists of frames of all kinds, some of them no frame, and folders of them."""
        frames: list[Any] = []
        for _ in range(rng.choice([0, 1, 2, 3, 5])):
            picture = pictures.draw_picture(rng, [7, 28, 48], rng.choice(pictures.MODES[:7]))
            data = pictures.stored(picture.convert("RGB"), "PNG")
            odd = pictures.odd_arrays(rng)[1]
            frames.append(rng.choice([picture, np.asarray(picture), data, data, odd, None, []]))
        if frames and rng.random() < 0.3:
            frames = [frame for frame in frames if isinstance(frame, bytes)]
            return Case(
                f"{family}: a folder of {len(frames)}", lambda: self._folder(family, frames)
            )
        about = ", ".join(type(frame).__name__ for frame in frames)
        return Case(f"{family}: frames [{about}]", lambda: self._held(family, [], [frames]))

    def _folder(self, family: str, frames: list[bytes]) -> None:
        folder = self.folder / f"frames-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        for i, frame in enumerate(frames):
            (folder / f"{i}.png").write_bytes(frame)
        (folder / "notes.txt").write_text("no picture")
        self._held(family, [], [folder])

    def _film(self, rng: random.Random, family: str) -> Case:
        """A film of PyAV's own, whole or damaged."""
        kind, how = rng.choice(["mp4", "avi", "matroska"]), "whole"
        sides, rate = (rng.choice([16, 48, 120]), rng.choice([16, 48])), rng.choice([1, 5, 30])
        data = film(kind, sides, rng.choice([1, 2, 9]), rate)
        if rng.random() < 0.7:
            how, data = pictures.damaged(data, rng)
        form = rng.choice(["bytes", "path", "stream", "data URL"])

        def run() -> None:
            self._held(family, [], [pictures.FORMS[form](data, self.folder, rng)])

        return Case(f"{family}: {kind} {how} {sides} at {rate} a second as {form}", run)


CLIPS = ("clip", "broken clip", "odd clip", "frames", "film")


def film(kind: str, size: tuple[int, int], frames: int, rate: int) -> bytes:
    """A film of grey frames. Skips itself where PyAV is missing: an empty file."""
    try:
        import av
    except ImportError:
        return b"x"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _turned_back(upright: Image.Image, orientation: int) -> Image.Image:
    """The picture that becomes upright when this orientation is applied."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    return upright.transpose(turns[orientation]) if orientation in turns else upright
