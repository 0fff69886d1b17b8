"""Clips under settings of their own, and what transformers' video processors make of them.

`python -m tests.processing.clip_cases` writes clips.npz; it needs torch, transformers and
torchvision. Those processors resize with torchvision, whose filters round differently from
Pillow's: CONTRIBUTING states how far the two lie apart.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fixtures_helper import FIXTURES

STORED = Path(__file__).parent / "clips.npz"
OWN: dict[str, Any] = {
    "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 200,
    "resample": 2,
}  # fmt: skip
BILINEAR, BICUBIC = {"resample": 2}, {"resample": 3}
LANCZOS = {"resample": 1}  # SmolVLM's default
RAW = {"do_normalize": False, "do_convert_rgb": False}
SIZE = {"size": {"longest_edge": 144}}
SAMPLING = {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 48}}}
NESTED, FLAT = "video_processor", "preprocessor_config.json"
SEPARATE = "video_preprocessor_config.json"
# name: fixture, file or section that holds the settings of clips, what is changed there
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "internvl-own": ("internvl-qwen2", SEPARATE, OWN),
    "internvl-bicubic": ("internvl-qwen2", SEPARATE, BICUBIC),
    "internvl-lanczos": ("internvl-qwen2", SEPARATE, LANCZOS),
    "internvl-raw": ("internvl-qwen2", SEPARATE, RAW),
    "smolvlm-nested-own": ("smolvlm", NESTED, OWN),
    "smolvlm-nested-size": ("smolvlm", NESTED, SIZE),
    "smolvlm-nested-bicubic": ("smolvlm", NESTED, BICUBIC),
    "smolvlm-flat-own": ("smolvlm", FLAT, SAMPLING | OWN),
    "smolvlm-flat-size": ("smolvlm", FLAT, SAMPLING | SIZE),
    "smolvlm-flat-raw": ("smolvlm", FLAT, SAMPLING | RAW),
    "qwen25vl-own": ("qwen25vl", SEPARATE, OWN),
    "qwen25vl-bicubic": ("qwen25vl", SEPARATE, BICUBIC),
    "qwen25vl-raw": ("qwen25vl", SEPARATE, RAW),
    "qwen3vl-own": ("qwen3vl", SEPARATE, OWN),
    "qwen3vl-bicubic": ("qwen3vl", SEPARATE, BICUBIC),
    "qwen3vl-raw": ("qwen3vl", SEPARATE, RAW),
}


def make_folder(path: Path, case: str) -> Path:
    """A copy of a fixture whose clips have settings of their own."""
    name, file, changes = CASES[case]
    folder = shutil.copytree(FIXTURES / name, path / name)
    processor = folder / "processor_config.json"
    values = json.loads(processor.read_text()) if processor.exists() else {}
    image, video = values.pop("image_processor", None), values.pop("video_processor", None)
    if file == NESTED:
        values |= {"image_processor": image, "video_processor": {**video, **changes}}
    elif file == FLAT:
        image = {k: v for k, v in image.items() if k != "size" or k in changes}
        (folder / file).write_text(json.dumps({**image, **changes}))
    else:
        old = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**old, **changes}))
    if values:
        processor.write_text(json.dumps(values))
    return folder


def clips() -> list[list[np.ndarray]]:
    """A wide and a high one, two frames each, uint8 [H, W, 3], as smooth as photographs are."""
    noise = np.random.default_rng(5)
    return [
        [
            np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
            for small in noise.integers(0, 256, (2, 9, 7, 3), np.uint8)
        ]
        for size in ((90, 60), (48, 80))
    ]


def level_of(folder: Path, case: str) -> float:
    """What one level of 255 is in pixel_values, in the channel that is spread most."""
    _, file, _ = CASES[case]
    nested = file == NESTED
    path = folder / ("processor_config.json" if nested else file)
    settings = json.loads(path.read_text())
    settings = settings[NESTED] if nested else settings
    spread = min(settings["image_std"]) if settings["do_normalize"] else 1.0
    return settings["rescale_factor"] / spread


def transformers_values(folder: Path, clip: list[np.ndarray]) -> np.ndarray:
    """pixel_values of a clip by the folder's video processor."""
    _import_torchvision()
    from transformers import AutoVideoProcessor

    processor = AutoVideoProcessor.from_pretrained(folder)
    out = processor(clip, return_tensors="np", do_sample_frames=False)
    key = next(k for k in ("pixel_values_videos", "pixel_values") if k in out)
    return np.asarray(out[key], np.float32)


def _import_torchvision() -> None:
    """Also where its compiled operators cannot be loaded: its wheels are built for torch with CUDA.

    Importing it then registers shapes for operators that are not there. Naming them is enough:
    resizing uses operators of torch itself.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        importlib.import_module("torchvision")


_KEPT: list[Any] = []  # a library's definitions go when it does


def write() -> None:
    """Store `CASE/0` and `CASE/1`, pixel_values of both clips, float16."""
    arrays = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as path:
            folder = make_folder(Path(path), case)
            for i, clip in enumerate(clips()):
                arrays[f"{case}/{i}"] = transformers_values(folder, clip).astype(np.float16)
    np.savez_compressed(STORED, **arrays)


if __name__ == "__main__":
    write()
