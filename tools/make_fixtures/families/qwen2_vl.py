"""Qwen2-VL: Qwen2.5-VL's pictures and clips; a step of a clip takes one position of time."""

import numpy as np
from PIL import Image

from .family import Arrays
from .qwen2_5_vl import Qwen25VL


class Qwen2VL(Qwen25VL):
    architecture = "Qwen2VLForConditionalGeneration"
    config_classes = ("Qwen2VLConfig", "Qwen2VLTextConfig")
    processor_class = "Qwen2VLProcessor"

    def _videos(self, clips: list[list[Image.Image]], fps: float) -> Arrays:
        arrays = super()._videos(clips, fps)
        del arrays["second_per_grid_ts"]
        return arrays

    def step_positions(self, arrays: Arrays) -> np.ndarray:
        return np.ones(len(arrays.get("video_grid_thw", [])))
