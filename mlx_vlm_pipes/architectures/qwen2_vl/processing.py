"""Qwen2-VL: pictures and clips of any size as blocks of patches.

Source: transformers image_processing_pil_qwen2_vl.py, video_processing_qwen2_vl.py and
processing_qwen2_vl.py.
"""

from __future__ import annotations

from mlx_vlm_pipes.architectures.qwen2_vl.context import Qwen2VLTextAndVisionContext
from mlx_vlm_pipes.architectures.qwen2_vl.facts import FACTS
from mlx_vlm_pipes.architectures.qwen2_vl.sizes import VisionSizes
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.processing.grid_clips import ClipRunProcessor


class Qwen2VLProcessor(ClipRunProcessor):
    """A clip is one run of placeholders; each of its steps takes one position of time."""

    facts = FACTS
    context_class = Qwen2VLTextAndVisionContext

    def read_sizes(self, vision_config: AutoConfig) -> tuple[int, int, int]:
        sizes = VisionSizes.read(vision_config)
        return sizes.patch_size, sizes.spatial_merge_size, sizes.temporal_patch_size
