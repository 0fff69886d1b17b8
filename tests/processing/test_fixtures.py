"""Prompts, token ids, pixels, grids and positions equal to the stored references."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.processing.types import PromptRequest
from tests.fixtures_helper import SAME_PILLOW, cases, reference

ROOMS = {
    "idefics3": "idefics3.Idefics3Processor", "smolvlm": "idefics3.Idefics3Processor",
    "pixtral": "pixtral.PixtralProcessor", "internvl": "internvl.InternVLProcessor",
    "internvl_chat": "internvl.InternVLProcessor", "qwen2_vl": "qwen2_vl.Qwen2VLProcessor",
    "qwen2_5_vl": "qwen2_5vl.Qwen2_5VLProcessor",
    "qwen3_vl": "qwen3_vl.Qwen3VLProcessor",
}  # fmt: skip
TEXT_ROOM = "llama3.Llama3Processor"
ARRAYS = (
    "pixel_values", "pixel_values_videos", "pixel_attention_mask", "image_sizes",
    "image_grid_thw", "video_grid_thw", "second_per_grid_ts",
)  # fmt: skip


def load_processor(path: Path):
    room, name = ROOMS.get(reference(path)[0]["family"], TEXT_ROOM).split(".")
    module = importlib.import_module(f"mlx_vlm_pipes.architectures.{room}.processing")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return getattr(module, name)(path, config)


def to_request(path: Path, prompt: dict) -> PromptRequest:
    return PromptRequest(
        prompt["prompt"] if prompt["raw"] else prompt["messages"],
        images=[path / name for name in prompt.get("images", [])],
        videos=[[path / name for name in clip] for clip in prompt.get("videos", [])],
        raw=prompt["raw"],
        fps=prompt.get("fps", 2.0),
    )


@pytest.mark.parametrize("path", cases(), ids=lambda p: p.name)
def test_equals_reference(path: Path) -> None:
    facts, arrays = reference(path)
    processor = load_processor(path)
    for prompt in facts["prompts"]:
        name = prompt["name"]
        out = processor.process(to_request(path, prompt))
        assert out.text == prompt["prompt"]
        assert out.input_ids == arrays[f"{name}/input_ids"].tolist()
        for key in ARRAYS:
            expected = arrays.get(f"{name}/{key}")
            assert (expected is None) == (key not in out.hf_arrays), key
            if expected is not None and (SAME_PILLOW or not key.startswith("pixel_values")):
                np.testing.assert_allclose(out.hf_arrays[key], expected, rtol=0, atol=1e-6)
        context = processor.new_context(out, max_length=100_000)
        positions = arrays.get(f"{name}/position_ids_alt", arrays.get(f"{name}/position_ids"))
        if positions is not None:
            np.testing.assert_array_equal(context.decoder_position_ids, positions)
        if out.images:
            ids = np.array(out.input_ids)[context.image_token_indices]
            assert np.isin(ids, processor.tokens.ids).all()
            assert sum(r.num_tokens for r in out.media) == len(context.image_token_indices)


@pytest.mark.parametrize("path", [*cases("internvl"), *cases("qwen2_5_vl")], ids=lambda p: p.name)
def test_vocabulary_files_equal_tokenizer_json(path: Path, tmp_path: Path) -> None:
    """Older Qwen2 and InternVL repositories have vocab.json, merges.txt and added tokens only."""
    model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]), encoding="utf-8")
    shutil.copy(path / "tokenizer_config.json", tmp_path)
    if "added_tokens_decoder" not in (tmp_path / "tokenizer_config.json").read_text():
        pytest.skip("written by transformers 5, which keeps added tokens in tokenizer.json only")
    whole, rebuilt = Tokenizer(path), Tokenizer(tmp_path)
    assert rebuilt.vocab_size == whole.vocab_size
    texts = ["The small river opens 42 doors.\n\n  I'm naïve — 東京<|im_end|>", "e\u0301 x  \t\ny"]
    for text in [*texts, *(p["prompt"] for p in reference(path)[0]["prompts"])]:
        assert rebuilt.encode(text) == whole.encode(text)
