"""Idefics3: pictures become one 64-pixel square, 16 image tokens each; no splitting."""

from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from .family import DECODER, Family, View, normalised
from .shapes import Mix
from .tasks import Case, idefics3_case
from .tokenizer import ChatFormat, write_json

TILE_PX, PATCH_PX, SHUFFLE = 64, 8, 2
IMAGE_TOKENS = (TILE_PX // PATCH_PX // SHUFFLE) ** 2
HALF = (0.5, 0.5, 0.5)

TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'] is string %}{{ ': ' + message['content'] }}{% else %}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHAT = ChatFormat(
    special=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<fake_token_around_image>",
        "<global-img>",
        "<image>",
        "<end_of_utterance>",
    ),
    template=TEMPLATE,
    answer_open="Assistant:",
    answer_close="<end_of_utterance>",
    pad="<|end_of_text|>",
    stop=("<|end_of_text|>", "<end_of_utterance>"),
    bos="<|begin_of_text|>",
)


class Idefics3(Family):
    name = "idefics3"
    architecture = "Idefics3ForConditionalGeneration"
    processor_class = "Idefics3Processor"
    chat = CHAT

    def sample_batch(self, rng: np.random.Generator, size: int, mix: Mix) -> list[Case]:
        return [idefics3_case(rng, mix) for _ in range(size)]

    def model_config(self) -> transformers.PreTrainedConfig:
        text = transformers.LlamaConfig(
            vocab_size=self.vocab_size,
            **DECODER,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **self.special_ids(),
        )
        vision = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": TILE_PX,
            "patch_size": PATCH_PX,
        }
        return transformers.Idefics3Config(
            text_config=text,
            vision_config=vision,
            scale_factor=SHUFFLE,
            image_token_id=self.token_id("<image>"),
            pad_token_id=self.token_id(self.chat.pad),
            tie_word_embeddings=False,
        )

    def write_processor(self, folder: Path) -> None:
        image = {
            "do_convert_rgb": True,
            "do_image_splitting": False,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(HALF),
            "image_processor_type": "Idefics3ImageProcessor",
            "image_std": list(HALF),
            "max_image_size": {"longest_edge": TILE_PX},
            "processor_class": self.processor_class,
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": TILE_PX},
        }
        write_json(folder / "preprocessor_config.json", image)
        processor = {"image_seq_len": IMAGE_TOKENS, "processor_class": self.processor_class}
        write_json(folder / "processor_config.json", processor)

    def media(self, case: Case) -> dict[str, np.ndarray]:
        pixels = [normalised(_tile(picture), HALF, HALF) for picture in case.images]
        if not pixels:
            return {}
        return {"pixel_values": np.stack(pixels).transpose(0, 3, 1, 2)[None]}

    def projector(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.model.connector

    def views(self, case: Case, media: dict[str, np.ndarray]) -> list[View]:
        side = TILE_PX // PATCH_PX // SHUFFLE
        return [(scene, side, side) for scene in case.scenes]

    def expand(self, text: str, media: dict[str, np.ndarray]) -> str:
        fake = "<fake_token_around_image>"
        return text.replace("<image>", f"{fake}<global-img>{'<image>' * IMAGE_TOKENS}{fake}")


def _tile(picture: Image.Image) -> Image.Image:
    """The two resizings of transformers' processor: longest edge to the tile, then to a square."""
    width, height = picture.size
    longest = max(width, height)
    if longest != TILE_PX:
        shorter = int(min(width, height) * TILE_PX / longest)
        shorter += shorter % 2
        size = (TILE_PX, shorter) if width >= height else (shorter, TILE_PX)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if picture.size != (TILE_PX, TILE_PX):
        picture = picture.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
    return picture
