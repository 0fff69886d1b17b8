"""Qwen2.5-VL: images and clips as grids of patches, positions on three axes."""

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from ..case import Json, Prompt
from ..tokenizer import write_json
from .family import Arrays, Pictures, VisionFamily, fill_placeholders


class Qwen25VL(VisionFamily):
    style = "qwen"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    config_classes = ("Qwen2_5_VLConfig", "Qwen2_5_VLTextConfig")
    processor_class = "Qwen2_5_VLProcessor"
    video_processor_class = "Qwen2VLVideoProcessor"
    template_in = "tokenizer_config+chat_template.json"
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def config(self) -> transformers.PretrainedConfig:
        outer, inner = self.config_classes
        text = self.text_config(inner)
        return getattr(transformers, outer)(
            text_config=text.to_dict(),
            vision_config=dict(self.case.config["vision"]),
            image_token_id=self.files["<|image_pad|>"],
            video_token_id=self.files["<|video_pad|>"],
            vision_start_token_id=self.files["<|vision_start|>"],
            vision_end_token_id=self.files["<|vision_end|>"],
            tie_word_embeddings=self.is_tied,
        )

    @property
    def merge(self) -> int:
        return self.case.config["vision"]["spatial_merge_size"]

    @property
    def patch_px(self) -> int:
        return self.case.config["vision"]["patch_size"]

    def limits(self, num_tokens: tuple[int, int]) -> tuple[int, int]:
        """Fewest and most pixels."""
        low, high = num_tokens
        return low * (self.patch_px * self.merge) ** 2, high * (self.patch_px * self.merge) ** 2

    def write_processor(self) -> None:
        low, high = self.limits(self.options.image_tokens)
        video_low, video_high = self.limits(self.options.video_tokens)
        owner = {"processor_class": self.processor_class}
        image = {**self.settings(), "image_processor_type": "Qwen2VLImageProcessor"}
        size = {"shortest_edge": video_low, "longest_edge": video_high}
        kind = {"video_processor_type": self.video_processor_class}
        video = {**self.video_settings(), **kind, "size": size}
        if self.options.nested_processor:
            image["size"] = {"shortest_edge": low, "longest_edge": high}
            video["do_sample_frames"] = False
            nested = {"image_processor": image, "video_processor": video}
            self.write_processor_config({**owner, **nested})
            return
        image.update(min_pixels=low, max_pixels=high, **owner)
        write_json(self.folder / "preprocessor_config.json", image)
        is_own = self.video_settings() != self.settings()
        if is_own or self.options.video_tokens != self.options.image_tokens:
            write_json(self.folder / "video_preprocessor_config.json", {**video, **owner})

    def settings(self) -> Json:
        return {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "merge_size": self.merge,
            "patch_size": self.patch_px,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "temporal_patch_size": self.case.config["vision"]["temporal_patch_size"],
        }

    def video_settings(self) -> Json:
        """Of the file for clips; the fuzzer lets it differ from that for pictures."""
        return self.settings()

    def expand(self, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
        arrays = self._images(pictures.images) if pictures.images else {}
        if pictures.videos:
            arrays.update(self._videos(pictures.videos, prompt.fps))
        kinds = (("<|image_pad|>", "image_grid_thw"), ("<|video_pad|>", "video_grid_thw"))
        for token, key in kinds:
            counts = [int(grid.prod()) // self.merge**2 for grid in arrays.get(key, [])]
            text = fill_placeholders(text, token, [token * n for n in counts])
        return text, arrays

    def _images(self, images: list[Image.Image]) -> Arrays:
        low, high = self.limits(self.options.image_tokens)
        size = {"shortest_edge": low, "longest_edge": high}
        out = Qwen2VLImageProcessorPil(**self.settings(), size=size)(images, return_tensors="np")
        return {
            "pixel_values": np.asarray(out["pixel_values"], dtype=np.float32),
            "image_grid_thw": np.asarray(out["image_grid_thw"], dtype=np.int64),
        }

    def _videos(self, clips: list[list[Image.Image]], fps: float) -> Arrays:
        """The video processor of transformers needs torchvision; this is its arithmetic."""
        step = self.case.config["vision"]["temporal_patch_size"]
        cut = [self._cut(frames, step) for frames in clips]
        seconds = np.full(len(clips), step / fps, dtype=np.float32)
        return {
            "pixel_values_videos": np.concatenate([rows for rows, _ in cut]),
            "video_grid_thw": np.array([grid for _, grid in cut], dtype=np.int64),
            "second_per_grid_ts": seconds,
        }

    def frame_size(self, frames: list[Image.Image], step: int) -> tuple[int, int]:
        """(height, width) of the resized frames."""
        del step  # every frame has the limits to itself
        limits = self.limits(self.options.video_tokens)
        return smart_resize(frames[0].height, frames[0].width, self.patch_px * self.merge, *limits)

    def _cut(self, frames: list[Image.Image], step: int) -> tuple[np.ndarray, list[int]]:
        """Patches [t * h * w, 3 * step * patch * patch] and (t, h, w) of one clip."""
        p, merge = self.patch_px, self.merge
        says = self.video_settings()
        width, height = frames[0].size
        if says["do_resize"]:
            height, width = self.frame_size(frames, step)
        how = Image.Resampling(says["resample"])
        resized = [np.asarray(f.convert("RGB").resize((width, height), how)) for f in frames]
        resized += resized[-1:] * (-len(frames) % step)
        stack = np.stack(resized).astype(np.float32)
        if says["do_rescale"]:
            factor = says["rescale_factor"]
            stack = stack / 255 if factor == 1 / 255 else stack * factor
        if says["do_normalize"]:
            mean, std = (np.array(says[k], np.float32) for k in ("image_mean", "image_std"))
            stack = (stack - mean) / std
        t, h, w = len(stack) // step, height // p, width // p
        blocks = stack.reshape(t, step, h // merge, merge, p, w // merge, merge, p, 3)
        rows = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
        return rows, [t, h, w]

    def inputs(self, ids: list[int], arrays: Arrays) -> dict[str, torch.Tensor]:
        inputs = super().inputs(ids, arrays)
        kinds = torch.zeros_like(inputs["input_ids"])
        kinds[inputs["input_ids"] == self.files["<|image_pad|>"]] = 1
        kinds[inputs["input_ids"] == self.files["<|video_pad|>"]] = 2
        return {**inputs, "mm_token_type_ids": kinds}

    def step_positions(self, arrays: Arrays) -> np.ndarray:
        """Time positions from one step of t to the next, of each clip: float64 [clips]."""
        rate = self.case.config["vision"]["tokens_per_second"]
        return np.array(arrays.get("second_per_grid_ts", []), np.float64) * rate

    def positions(self, ids: list[int], arrays: Arrays, *, counts_time: bool) -> np.ndarray:
        """Positions [3, T]: time, height, width.

        The text after a medium moves on by the larger of its height and width (transformers 5), or,
        where `counts_time`, by its largest position on any axis (the original Qwen code).
        """
        image_id, video_id = self.files["<|image_pad|>"], self.files["<|video_pad|>"]
        images = iter(arrays.get("image_grid_thw", []))
        clips = arrays.get("video_grid_thw", []), self.step_positions(arrays)
        videos = iter(zip(*clips, strict=True))
        out, here, i = [], 0, 0
        while i < len(ids):
            if ids[i] not in (image_id, video_id):
                out.append(np.full((3, 1), here))
                here, i = here + 1, i + 1
                continue
            (t, h, w), step = (next(images), 0.0) if ids[i] == image_id else next(videos)
            times = np.floor(np.arange(int(t)) * float(step)).astype(np.int64)
            rows, cols = np.arange(int(h) // self.merge), np.arange(int(w) // self.merge)
            grid = np.stack(np.meshgrid(times, rows, cols, indexing="ij")).reshape(3, -1)
            out.append(grid + here)
            i += grid.shape[1]
            here += int(grid.max()) + 1 if counts_time else max(len(rows), len(cols))
        return np.concatenate(out, axis=1)
