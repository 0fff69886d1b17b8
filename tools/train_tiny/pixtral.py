"""Pixtral: pictures of any shape in patches of 8 pixels, one image token each."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.pixtral import modeling_pixtral

from .family import CLIP_MEAN, CLIP_STD, DECODER, Family, View, normalised
from .shapes import Mix
from .tasks import Case, pixtral_cases
from .tokenizer import ChatFormat, write_json

PATCH_PX, LONGEST_PX = 8, 64

TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- eos_token }}"
    "{%- elif message['role'] == 'system' %}"
    "{%- if message['content'] is string %}{{- '[INST]' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST]' + message['content'][0]['text'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- '[INST]' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- elif part['type'] == 'image' %}{{- '[IMG]' }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '[/INST]' }}{%- endif %}{%- endfor %}"
)
CHAT = ChatFormat(
    special=(
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
    ),
    template=TEMPLATE,
    answer_open="[/INST]",
    answer_close="</s>",
    pad="<pad>",
    stop=("</s>",),
    bos="<s>",
    unk="<unk>",
)


class Pixtral(Family):
    name = "pixtral"
    architecture = "LlavaForConditionalGeneration"
    processor_class = "PixtralProcessor"
    chat = CHAT

    def sample_batch(self, rng: np.random.Generator, size: int, mix: Mix) -> list[Case]:
        return pixtral_cases(rng, size, mix)

    def model_config(self) -> transformers.PreTrainedConfig:
        text = transformers.MistralConfig(
            vocab_size=self.vocab_size,
            **DECODER,
            head_dim=32,
            rms_norm_eps=1e-5,
            sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **self.special_ids(),
        )
        vision = transformers.PixtralVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=LONGEST_PX,
            patch_size=PATCH_PX,
            hidden_act="silu",
            rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
        )
        return transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.token_id("[IMG]"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
            image_seq_length=1,
            tie_word_embeddings=False,
        )

    def new_model(self, seed: int) -> torch.nn.Module:
        model = super().new_model(seed)
        modeling_pixtral.generate_block_attention_mask = _patch_counts
        for layer in model.model.vision_tower.transformer.layers:
            layer.attention.forward = partial(_attention_in_equal_pictures, layer.attention)
        return model

    def write_processor(self, folder: Path) -> None:
        image = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(CLIP_MEAN),
            "image_processor_type": "PixtralImageProcessor",
            "image_std": list(CLIP_STD),
            "patch_size": {"height": PATCH_PX, "width": PATCH_PX},
            "processor_class": self.processor_class,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": LONGEST_PX},
        }
        write_json(folder / "preprocessor_config.json", image)
        processor = {
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": PATCH_PX,
            "processor_class": self.processor_class,
        }
        write_json(folder / "processor_config.json", processor)

    def media(self, case: Case) -> dict[str, np.ndarray]:
        sized = [_sized(picture) for picture in case.images]
        if not sized:
            return {}
        pixels = np.stack([normalised(picture, CLIP_MEAN, CLIP_STD) for picture in sized])
        sizes = np.array([(picture.height, picture.width) for picture in sized], np.int64)
        return {"pixel_values": pixels.transpose(0, 3, 1, 2), "image_sizes": sizes}

    def projector(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.model.multi_modal_projector

    def views(self, case: Case, media: dict[str, np.ndarray]) -> list[View]:
        grids = media["image_sizes"] // PATCH_PX
        return [(s, g[0], g[1]) for s, g in zip(case.scenes, grids, strict=True)]

    def expand(self, text: str, media: dict[str, np.ndarray]) -> str:
        head, *rest = text.split("[IMG]")
        runs = []
        for (height, width), part in zip(media.get("image_sizes", ()), rest, strict=True):
            row = "[IMG]" * (int(width) // PATCH_PX)
            rows = "[IMG_BREAK]".join([row] * (int(height) // PATCH_PX))
            runs.append(f"{rows}[IMG_END]{part}")
        return head + "".join(runs)


def _sized(picture: Image.Image) -> Image.Image:
    """Longest edge at most LONGEST_PX, both up to whole patches (PixtralImageProcessorPil)."""
    width, height = picture.size
    ratio = max(width, height) / LONGEST_PX
    if ratio > 1:
        width, height = int(width / ratio), int(height / ratio)
    size = tuple((length - 1) // PATCH_PX * PATCH_PX + PATCH_PX for length in (width, height))
    return picture.resize(size, Image.Resampling.BICUBIC) if picture.size != size else picture


def _patch_counts(pictures: list[int], _: torch.Tensor) -> list[int]:
    """Stands in for transformers' block mask: patches per picture, all equal in training."""
    return pictures


def _attention_in_equal_pictures(
    attention: torch.nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: list[int],
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' vision attention where each picture is a row of a batch.

    transformers masks one sequence of all patches, which is quadratic in the batch.
    """
    total, count = hidden_states.shape[1], attention_mask[0]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, total, attention.num_heads, attention.head_dim).transpose(1, 2)

    def by_picture(x: torch.Tensor) -> torch.Tensor:
        return x[0].unflatten(1, (total // count, count)).transpose(0, 1)

    q, k = heads(attention.q_proj(hidden_states)), heads(attention.k_proj(hidden_states))
    q, k = modeling_pixtral.apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=0)
    v = heads(attention.v_proj(hidden_states))
    out = torch.nn.functional.scaled_dot_product_attention(
        by_picture(q), by_picture(k), by_picture(v)
    )
    return attention.o_proj(out.transpose(1, 2).reshape(1, total, -1)), None
