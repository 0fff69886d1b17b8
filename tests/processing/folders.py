"""Model folders with a byte-level tokenizer and the processor files of a family; no weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

LIST_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% else %}{{ MARKERS[p['type']] }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IDEFICS3_TOKENS = ["<fake_token_around_image>", "<global-img>", "<image>", "<row_1_col_1>"]
PIXTRAL_TOKENS = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
INTERNVL_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def template(**markers: str) -> str:
    """A chat template that takes texts and lists; markers by kind of part."""
    return "{% set MARKERS = " + json.dumps(markers) + " %}" + LIST_TEMPLATE


def byte_tokenizer(special: list[str], bos: str | None = None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [*special, "<|end|>", *([bos] if bos else [])]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def make_folder(
    path: Path,
    special: list[str],
    files: dict[str, Any],
    chat_template: str | None = None,
    bos: str | None = None,
) -> Path:
    """Write a folder; files maps names to JSON values, or to texts."""
    byte_tokenizer(special, bos).save(str(path / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "bos_token": bos}
    if chat_template is not None:
        config["chat_template"] = chat_template
    for name, value in {"tokenizer_config.json": config, **files}.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / name).write_text(text, encoding="utf-8")
    return path


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise: nothing about it is symmetric or smooth."""
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())
