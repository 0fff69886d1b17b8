"""Clips against transformers' own video processors, with settings that are not the pictures'.

They resize with torchvision, whose filters round differently from Pillow's: of the values, all
but ROUGH lie within one level of 255, and none further off than FAR levels.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.architectures.idefics3.processing import in_words
from mlx_vlm_pipes.errors import MediaError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.registry import find_room
from tests.processing.clip_cases import (
    CASES,
    STORED,
    clips,
    level_of,
    make_folder,
    transformers_values,
)

ROUGH, FAR = 1e-3, 3.01
ROUNDED = 2**-11  # of a stored value, which is float16


def our_values(folder: Path, clip: list) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    processor = find_room(HuggingFaceConfig(config)).processor_class()(folder, config)
    arrays = processor.process(PromptRequest("why?", videos=[clip])).hf_arrays
    return arrays["pixel_values_videos" if "pixel_values_videos" in arrays else "pixel_values"]


def assert_near(found: np.ndarray, wanted: np.ndarray, level: float) -> None:
    off = np.abs(found - wanted.reshape(found.shape).astype(np.float32)) / level
    rounding = np.abs(found) * ROUNDED / level
    assert (off - rounding).max() <= FAR
    assert (off - rounding > 1.01).mean() <= ROUGH


@pytest.mark.parametrize("case", CASES)
def test_frames_are_the_stored_ones_of_transformers(tmp_path: Path, case: str) -> None:
    folder = make_folder(tmp_path, case)
    with np.load(STORED) as stored:
        for i, clip in enumerate(clips()):
            wanted = stored[f"{case}/{i}"]
            assert_near(our_values(folder, clip), wanted, level_of(folder, case))


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_frames_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if not find_spec("torchvision"):
        pytest.skip("needs torchvision")
    folder = make_folder(tmp_path, case)
    for clip in clips():
        assert_near(
            our_values(folder, clip), transformers_values(folder, clip), level_of(folder, case)
        )


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("-raw")])
def test_frames_without_three_channels_are_refused_where_nothing_converts(
    tmp_path: Path, case: str
) -> None:
    folder = make_folder(tmp_path, case)
    grey = [Image.fromarray(frame).convert("L") for frame in clips()[0]]
    with pytest.raises(MediaError, match=r"mode L.*do_convert_rgb is false"):
        our_values(folder, grey)


@pytest.mark.reference
def test_numbers_are_written_as_num2words_does() -> None:
    num2words = pytest.importorskip("num2words").num2words
    for number in [*range(1200), 9999, 10000, 100001, 999999]:
        assert in_words(number) == num2words(number)
