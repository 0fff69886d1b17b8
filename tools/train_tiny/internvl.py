"""InternVL: pictures in up to six tiles of 64 pixels and a thumbnail, 16 image tokens each."""

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from .family import DECODER, Family, View, normalised
from .shapes import Mix
from .tasks import Case, internvl_case
from .tokenizer import ChatFormat, write_json

TILE_PX, PATCH_PX, MAX_TILES = 64, 8, 6
TILE_TOKENS = (TILE_PX // PATCH_PX // 2) ** 2
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SHARES = (1.0, 0.25, 0.4, 0.4, 0.15)  # of a full batch, by kind of picture: more tiles, fewer

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = ChatFormat(
    special=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
    ),
    template=TEMPLATE,
    answer_open="<|im_start|>assistant\n",
    answer_close="<|im_end|>",
    pad="<|endoftext|>",
    stop=("<|im_end|>", "<|endoftext|>"),
    tokenizer_class="Qwen2Tokenizer",
    nfc=True,
    names={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)


class InternVL(Family):
    name = "internvl"
    architecture = "InternVLForConditionalGeneration"
    processor_class = "InternVLProcessor"
    chat = CHAT

    def sample_batch(self, rng: np.random.Generator, size: int, mix: Mix) -> list[Case]:
        """Pictures with equally many tiles, fewer of them where there are more tiles."""
        kind = int(rng.integers(1, len(SHARES))) if rng.random() < mix.tiled else 0
        return [internvl_case(rng, kind, mix) for _ in range(round(size * SHARES[kind]))]

    def model_config(self) -> transformers.PreTrainedConfig:
        text = transformers.Qwen2Config(
            vocab_size=self.vocab_size,
            **DECODER,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **self.special_ids(),
        )
        vision = transformers.InternVLVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=[TILE_PX, TILE_PX],
            patch_size=[PATCH_PX, PATCH_PX],
            attention_bias=True,
            norm_type="layer_norm",
            layer_norm_eps=1e-6,
        )
        return transformers.InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=self.token_id("<IMG_CONTEXT>"),
            image_seq_length=TILE_TOKENS,
            downsample_ratio=0.5,
            projector_hidden_act="gelu",
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )

    def write_processor(self, folder: Path) -> None:
        shared = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
            "processor_class": self.processor_class,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": TILE_PX, "width": TILE_PX},
        }
        image = {
            "crop_to_patches": True,
            "image_processor_type": "GotOcr2ImageProcessor",
            "max_patches": MAX_TILES,
            "min_patches": 1,
        }
        write_json(folder / "preprocessor_config.json", {**shared, **image})
        video = {"video_processor_type": "InternVLVideoProcessor"}
        write_json(folder / "video_preprocessor_config.json", {**shared, **video})
        processor = {"image_seq_length": TILE_TOKENS, "processor_class": self.processor_class}
        write_json(folder / "processor_config.json", processor)

    def media(self, case: Case) -> dict[str, np.ndarray]:
        tiles = [_tiles(picture) for picture in case.images]
        if not tiles:
            return {}
        flat = [normalised(t, IMAGENET_MEAN, IMAGENET_STD) for group in tiles for t in group]
        counts = np.array([len(group) for group in tiles], np.int64)
        return {"pixel_values": np.stack(flat).transpose(0, 3, 1, 2), "num_patches": counts}

    def stack(self, media: list[dict[str, np.ndarray]]) -> dict:
        batch = super().stack(media)
        batch.pop("num_patches", None)  # only expand() reads it
        return batch

    def projector(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.model.multi_modal_projector

    def views(self, case: Case, media: dict[str, np.ndarray]) -> list[View]:
        side = TILE_PX // PATCH_PX // 2
        views = []
        for scene, count in zip(case.scenes, media["num_patches"], strict=True):
            views += [(None, side, side)] * (int(count) - 1) + [(scene, side, side)]
        return views

    def expand(self, text: str, media: dict[str, np.ndarray]) -> str:
        head, *rest = text.split("<IMG_CONTEXT>")
        counts = media.get("num_patches", ())
        runs = [
            f"<img>{'<IMG_CONTEXT>' * (TILE_TOKENS * int(count))}</img>{part}"
            for count, part in zip(counts, rest, strict=True)
        ]
        return head + "".join(runs)


def _tiles(picture: Image.Image) -> list[Image.Image]:
    """Tiles row by row, then the thumbnail if there is more than one (GotOcr2ImageProcessorPil)."""
    width, height = picture.size
    columns, rows = get_optimal_tiled_canvas((height, width), (TILE_PX, TILE_PX), 1, MAX_TILES)
    whole = picture.resize((columns * TILE_PX, rows * TILE_PX), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((x, y, x + TILE_PX, y + TILE_PX))
        for y in range(0, whole.height, TILE_PX)
        for x in range(0, whole.width, TILE_PX)
    ]
    if len(tiles) > 1:
        tiles.append(picture.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC))
    return tiles
