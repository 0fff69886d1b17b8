"""Qwen3-VL: a clip's frames stand one by one in the prompt, each behind its time in seconds.

A frame's `<|vision_start|>...<|vision_end|>` takes the place of the pair that the chat template
puts around a clip, as in transformers 4.57, which the released weights were trained with;
transformers 5.23 leaves that pair around all the frames. What the model itself does is the same.
"""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.video_utils import VideoMetadata

from ..case import Prompt
from .family import Arrays, Pictures, fill_placeholders
from .qwen2_5_vl import Qwen25VL

PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"


class Qwen3VL(Qwen25VL):
    style = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    config_classes = ("Qwen3VLConfig", "Qwen3VLTextConfig")
    processor_class = "Qwen3VLProcessor"
    video_processor_class = "Qwen3VLVideoProcessor"
    mean = std = (0.5, 0.5, 0.5)

    def frame_size(self, frames: list[Image.Image], step: int) -> tuple[int, int]:
        """The limits are those of the whole clip."""
        low, high = self.limits(self.options.video_tokens)
        factor, first = self.patch_px * self.merge, frames[0]
        return smart_resize(len(frames), first.height, first.width, step, factor, low, high)

    def expand(self, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
        arrays = self._images(pictures.images) if pictures.images else {}
        if pictures.videos:
            arrays.update(self._videos(pictures.videos, prompt.fps))
            del arrays["second_per_grid_ts"]
        counts = [int(grid.prod()) // self.merge**2 for grid in arrays.get("image_grid_thw", [])]
        text = fill_placeholders(text, PAD, [PAD * n for n in counts])
        clips = [self._clip_text(i, arrays, prompt, pictures) for i in range(len(pictures.videos))]
        text = text.replace(START + VIDEO_PAD + END, VIDEO_PAD)
        return fill_placeholders(text, VIDEO_PAD, clips), arrays

    def _clip_text(self, index: int, arrays: Arrays, prompt: Prompt, pictures: Pictures) -> str:
        """What the processor of transformers makes of a clip that is sampled already."""
        count = len(pictures.videos[index])
        metadata = VideoMetadata(
            total_num_frames=count, fps=prompt.fps, frames_indices=list(range(count))
        )
        step = self.case.config["vision"]["temporal_patch_size"]
        stand_in = SimpleNamespace(
            video_processor=SimpleNamespace(merge_size=self.merge, temporal_patch_size=step),
            vision_start_token=START,
            vision_end_token=END,
            video_token=VIDEO_PAD,
        )
        stand_in._calculate_timestamps = Qwen3VLProcessor._calculate_timestamps.__get__(stand_in)
        made = {"video_grid_thw": arrays["video_grid_thw"][[index]], "video_metadata": [metadata]}
        return Qwen3VLProcessor.replace_video_token(cast("Any", stand_in), made, 0)

    def positions(self, ids: list[int], arrays: Arrays, *, counts_time: bool) -> np.ndarray:
        """Every frame is a picture of its own, so there is no time to count."""
        frames = [[1, h, w] for t, h, w in arrays.get("video_grid_thw", []) for _ in range(t)]
        single = {"video_grid_thw": np.array(frames)}
        return super().positions(ids, {**arrays, **single}, counts_time=counts_time)

    def step_positions(self, arrays: Arrays) -> np.ndarray:
        return np.zeros(len(arrays["video_grid_thw"]))
