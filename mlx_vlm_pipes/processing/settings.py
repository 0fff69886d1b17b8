"""Reading the JSON files of a model folder: bounded, checked, with errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_vlm_pipes import json_files
from mlx_vlm_pipes.errors import ProcessorError, shown

MAX_SIDE_PX = 2**16
MAX_COUNT = 2**40

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no such file.

    Raises: ProcessorError if it is unreadable, larger than 64 MiB or not an object.
    """
    return json_files.read_json(path, ProcessorError)


@dataclass(frozen=True)
class Settings:
    """One JSON object with typed look-ups; null counts as absent. source: named in errors."""

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def integer(self, key: str, default: int, low: int = 1, high: int = MAX_SIDE_PX) -> int:
        value = self.get(key)
        return default if value is None else self.checked_int(key, value, low, high)

    def agree(self, key: str, value: int) -> None:
        """Raises: ProcessorError if the file says another number than config.json implies."""
        said = self.integer(key, value, high=MAX_COUNT)
        if said != value:
            raise self.error(key, said, f"{value}, as config.json implies")

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, value, "a number")
        if not math.isfinite(value) or not 0 < value < MAX_COUNT:
            raise self.error(key, value, "a positive number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or not value:
            raise self.error(key, value, "a text")
        return value

    def channels(self, key: str, default: tuple[float, ...]) -> tuple[float, float, float]:
        """Three finite numbers, for red, green and blue; a single one counts for all."""
        value = self.get(key)
        given: Any = default if value is None else value
        if type(given) in (int, float):
            given = (given, given, given)
        numbers = isinstance(given, (list, tuple)) and all(type(v) in (int, float) for v in given)
        if not numbers or len(given) != 3 or not all(abs(v) < MAX_COUNT for v in given):
            raise self.error(key, value, "three numbers")
        return float(given[0]), float(given[1]), float(given[2])

    def section(self, key: str) -> Settings | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return Settings(f"{self.source}: {key}", value)

    def edges(self, key: str, names: tuple[str, ...]) -> dict[str, int]:
        """The given entries of a size object such as {"longest_edge": 364}; absent ones missing.

        A number n stands for height and width n, a list for [height, width].
        """
        value = self.get(key)
        pair = [value, value] if isinstance(value, (int, float)) else value
        if isinstance(pair, list) and len(pair) == 2:
            value = {"height": pair[0], "width": pair[1]}
        section = Settings(self.source, {key: value}).section(key)
        if section is None:
            return {}
        if not any(section.get(name) is not None for name in names):
            raise self.error(key, self.get(key), f"an object with {' or '.join(names)}")
        found = {name: section.get(name) for name in names if section.get(name) is not None}
        return {name: section.checked_int(name, v, 1, MAX_COUNT) for name, v in found.items()}

    def checked_int(self, key: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, value, f"a whole number from {low} to {high}")
        return value

    def error(self, key: str, value: Any, expected: str) -> ProcessorError:
        return ProcessorError(f"{self.source}: {key} is {shown(value)}; expected {expected}")


@dataclass(frozen=True)
class PixelSettings:
    """What happens to the pixels of every family: resampling filter, scale, mean and deviation.

    convert_rgb: False takes the channels of a picture as they are, whatever they mean.
    """

    resample: int
    do_resize: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    convert_rgb: bool

    @classmethod
    def read(
        cls,
        settings: Settings,
        resample: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> PixelSettings:
        """Read the common keys; the other arguments are what the family defaults to.

        Raises: ProcessorError for a wrong type, a zero deviation, an unknown filter or a crop.
        Source: transformers image_processing_backends.py, PilBackend.
        """
        if settings.flag("do_center_crop", default=False):
            raise ProcessorError(f"{settings.source}: do_center_crop is not supported")
        deviations = settings.channels("image_std", std)
        if not all(deviations):
            raise settings.error("image_std", list(deviations), "numbers other than zero")
        return cls(
            resample=settings.integer("resample", resample, low=0, high=5),
            do_resize=settings.flag("do_resize", default=True),
            do_rescale=settings.flag("do_rescale", default=True),
            rescale_factor=settings.number("rescale_factor", 1 / 255),
            do_normalize=settings.flag("do_normalize", default=True),
            mean=settings.channels("image_mean", mean),
            std=deviations,
            convert_rgb=settings.flag("do_convert_rgb", default=True),
        )


@dataclass(frozen=True)
class ProcessorFiles:
    """The processor settings of a folder: of pictures, of clips, and of the processor itself."""

    image: Settings
    video: Settings
    processor: Settings

    @classmethod
    def read(cls, folder: Path, *, required: bool = True) -> ProcessorFiles:
        """Nested sections of processor_config.json win over the separate files, as in transformers.

        Args: required, whether there are no picture settings to fall back on.

        Raises: ProcessorError if neither processor_config.json nor preprocessor_config.json
        describes the pictures, or a file is broken.
        """
        processor = _file(folder / "processor_config.json") or Settings("processor_config.json")
        flat = _file(folder / "preprocessor_config.json")
        image = processor.section("image_processor") or flat
        if image is None and not required:
            image = Settings(str(folder / "preprocessor_config.json"))
        if image is None:
            raise ProcessorError(
                f"{folder}: no preprocessor_config.json and no image_processor in "
                "processor_config.json; the picture settings are needed"
            )
        separate = _file(folder / "video_preprocessor_config.json")
        video = processor.section("video_processor") or separate or image
        return cls(image, video, processor)


def _file(path: Path) -> Settings | None:
    values = read_json(path)
    return None if values is None else Settings(str(path), values)
