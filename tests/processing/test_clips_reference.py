"""Clips against transformers' own video processors, with settings that are not the pictures'.

They resize with torchvision, whose filters round differently from Pillow's: of the values, all
but ROUGH lie within one level of 255, and none further off than FAR levels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.registry import find_room
from tests.fixtures_helper import FIXTURES

ROUGH, FAR = 1e-3, 3.01
OWN: dict[str, Any] = {
    "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 200,
    "resample": 2,
}  # fmt: skip
SAMPLING = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 48}}
CASES = {
    "internvl": ("internvl-qwen2", "video_preprocessor_config.json", OWN),
    "smolvlm-nested": ("smolvlm", "video_processor", OWN),
    "smolvlm-nested-size": ("smolvlm", "video_processor", {"size": {"longest_edge": 144}}),
    "smolvlm-flat": ("smolvlm", "preprocessor_config.json", {"video_sampling": SAMPLING, **OWN}),
    "smolvlm-flat-size": (
        "smolvlm",
        "preprocessor_config.json",
        {"video_sampling": SAMPLING, "size": {"longest_edge": 144}},
    ),
    "qwen25vl": ("qwen25vl", "video_preprocessor_config.json", OWN),
    "qwen3vl": ("qwen3vl", "video_preprocessor_config.json", OWN),
}


def make_folder(path: Path, name: str, file: str, changes: dict[str, Any]) -> Path:
    """A copy of a fixture whose clips have settings of their own."""
    folder = shutil.copytree(FIXTURES / name, path / name)
    processor = folder / "processor_config.json"
    values = json.loads(processor.read_text()) if processor.exists() else {}
    image, video = values.pop("image_processor", None), values.pop("video_processor", None)
    if file == "video_processor":
        values |= {"image_processor": image, "video_processor": {**video, **changes}}
    elif file == "preprocessor_config.json":
        image = {k: v for k, v in image.items() if k != "size" or k in changes}
        (folder / file).write_text(json.dumps({**image, **changes}))
    else:
        old = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**old, **changes}))
    if values:
        processor.write_text(json.dumps(values))
    return folder


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_frames_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    pytest.importorskip("torchvision")
    from transformers import AutoVideoProcessor

    folder = make_folder(tmp_path, *CASES[case])
    config = json.loads((folder / "config.json").read_text())
    ours = find_room(HuggingFaceConfig(config)).processor_class()(folder, config)
    theirs = AutoVideoProcessor.from_pretrained(folder)
    noise = np.random.default_rng(5)
    for size in ((90, 60), (48, 80)):
        small = noise.integers(0, 256, (4, 9, 7, 3), np.uint8)
        frames = [
            np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in small
        ]
        out = ours.process(PromptRequest("why?", videos=[frames]))
        wanted = theirs(frames, return_tensors="np", do_sample_frames=False)
        key = next(k for k in ("pixel_values_videos", "pixel_values") if k in wanted)
        found = out.hf_arrays[key if key in out.hf_arrays else "pixel_values"]
        want = np.asarray(wanted[key]).reshape(found.shape)
        scale = 255 * max(theirs.rescale_factor / s for s in theirs.image_std)
        levels = np.abs(found - want) / scale * 255
        assert levels.max() <= FAR, case
        assert (levels > 1.01).mean() <= ROUGH, case
