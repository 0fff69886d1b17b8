"""Qwen2.5-VL: pictures and clips in patches of 8 pixels, windows of 32, three-axis positions."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .family import CLIP_MEAN, CLIP_STD, DECODER, Family, View, normalised
from .shapes import Mix, pick
from .tasks import QWEN_CLIP_SHARE, Case, clip_case, qwen_picture_case
from .tokenizer import ChatFormat, write_json

PATCH_PX, MERGE, STEP_FRAMES, WINDOW_PX = 8, 2, 2, 32
MIN_PIXELS, MAX_PIXELS = 64 * 64, 64 * 96
FRAME_COUNTS = (4, 4, 6, 8)

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = ChatFormat(
    special=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    template=TEMPLATE,
    answer_open="<|im_start|>assistant\n",
    answer_close="<|im_end|>",
    pad="<|endoftext|>",
    stop=("<|im_end|>", "<|endoftext|>"),
    tokenizer_class="Qwen2Tokenizer",
    nfc=True,
)


class Qwen25VL(Family):
    name = "qwen2_5vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    processor_class = "Qwen2_5_VLProcessor"
    chat = CHAT

    def sample_batch(self, rng: np.random.Generator, size: int, mix: Mix) -> list[Case]:
        """Only pictures, or only clips of one length."""
        if rng.random() >= QWEN_CLIP_SHARE:
            return [qwen_picture_case(rng, mix) for _ in range(size)]
        frames = pick(rng, FRAME_COUNTS)
        return [clip_case(rng, (frames,)) for _ in range(size * 2 // frames)]

    def model_config(self) -> transformers.PreTrainedConfig:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        text = {
            "vocab_size": self.vocab_size,
            **DECODER,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope,
            **self.special_ids(),
        }
        vision = {
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": STEP_FRAMES,
            "tokens_per_second": 1,
            "window_size": WINDOW_PX,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 128,
        }
        return transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=self.token_id("<|image_pad|>"),
            video_token_id=self.token_id("<|video_pad|>"),
            vision_start_token_id=self.token_id("<|vision_start|>"),
            vision_end_token_id=self.token_id("<|vision_end|>"),
            tie_word_embeddings=False,
        )

    def new_model(self, seed: int) -> torch.nn.Module:
        model = super().new_model(seed)
        for block in model.model.visual.blocks:
            block.attn.forward = partial(_attention_in_equal_chunks, block.attn)
        return model

    def write_processor(self, folder: Path) -> None:
        shared = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "merge_size": MERGE,
            "patch_size": PATCH_PX,
            "processor_class": self.processor_class,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "temporal_patch_size": STEP_FRAMES,
        }
        image = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
        }
        video = {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        }
        write_json(folder / "preprocessor_config.json", {**shared, **image})
        write_json(folder / "video_preprocessor_config.json", {**shared, **video})

    def media(self, case: Case) -> dict[str, np.ndarray]:
        if case.clip:
            pixels, grid = _patches(case.clip)
            seconds = np.array([STEP_FRAMES / case.fps], np.float32)
            names = {"pixel_values_videos": pixels, "video_grid_thw": grid}
            return {**names, "second_per_grid_ts": seconds}
        if not case.images:
            return {}
        pixels, grids = zip(*(_patches([picture]) for picture in case.images), strict=True)
        return {"pixel_values": np.concatenate(pixels), "image_grid_thw": np.concatenate(grids)}

    def projector(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.model.visual

    def views(self, case: Case, media: dict[str, np.ndarray]) -> list[View]:
        if case.clip:
            _, rows, columns = media["video_grid_thw"][0] // MERGE
            return [(scene, rows, columns) for scene in case.scenes[::STEP_FRAMES]]
        grids = media["image_grid_thw"] // MERGE
        return [(s, g[1], g[2]) for s, g in zip(case.scenes, grids, strict=True)]

    def expand(self, text: str, media: dict[str, np.ndarray]) -> str:
        for token, name in (
            ("<|image_pad|>", "image_grid_thw"),
            ("<|video_pad|>", "video_grid_thw"),
        ):
            head, *rest = text.split(token)
            counts = [int(grid.prod()) // MERGE**2 for grid in media.get(name, [])]
            runs = [token * count + part for count, part in zip(counts, rest, strict=True)]
            text = head + "".join(runs)
        return text

    def extra_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        kinds = torch.zeros_like(ids)
        kinds[ids == self.token_id("<|image_pad|>")] = 1
        kinds[ids == self.token_id("<|video_pad|>")] = 2
        return {"mm_token_type_ids": kinds}


def _patches(frames: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pixels [patches, 3 * 2 * 8 * 8] and their grid [1, 3], as Qwen lays them out."""
    width, height = frames[0].size
    height, width = smart_resize(height, width, PATCH_PX * MERGE, MIN_PIXELS, MAX_PIXELS)
    sized = [f if f.size == (width, height) else f.resize((width, height), 3) for f in frames]
    stack = np.stack([normalised(frame, CLIP_MEAN, CLIP_STD) for frame in sized])
    if len(stack) % STEP_FRAMES:
        stack = np.concatenate([stack, stack[-1:]])
    steps, rows, columns = len(stack) // STEP_FRAMES, height // PATCH_PX, width // PATCH_PX
    split = (steps, STEP_FRAMES, rows // MERGE, MERGE, PATCH_PX, columns // MERGE, MERGE, PATCH_PX)
    blocks = stack.reshape(*split, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return blocks.reshape(steps * rows * columns, -1), np.array([[steps, rows, columns]], np.int64)


def _attention_in_equal_chunks(
    attention: torch.nn.Module,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: object,
) -> torch.Tensor:
    """transformers' vision attention for chunks that all have one length, in a single call.

    transformers calls attention once per chunk, which dominates the time at this size.
    """
    total, heads = hidden_states.shape[0], attention.num_heads
    length = int(cu_seqlens[1] - cu_seqlens[0])
    qkv = attention.qkv(hidden_states).reshape(total, 3, heads, -1)
    q, k, v = qkv.permute(1, 0, 2, 3).unbind(0)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (t.reshape(total // length, length, heads, -1).transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return attention.proj(out.transpose(1, 2).reshape(total, -1))
