"""Qwen3-VL end to end against stored Hugging Face logits and greedy tokens."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import load as load_pipeline
from mlx_vlm_pipes.architectures.qwen3_vl.context import Qwen3VLTextAndVisionContext
from mlx_vlm_pipes.architectures.qwen3_vl.processing import Qwen3VLProcessor
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.errors import ConfigError, ImageTokenMismatch, InputError
from mlx_vlm_pipes.interfaces import ModelInputs, ReturnLogits
from tests.architectures.driving import load, new_cache, relative, run, run_in_chunks
from tests.device import bar
from tests.fixtures_helper import SAME_PILLOW, arguments, cases, reference
from tests.processing.test_fixtures import to_request

BAR = bar(2e-5)  # of the largest logit
every_case = pytest.mark.parametrize("path", cases("qwen3_vl"), ids=lambda path: path.name)
pytestmark = pytest.mark.skipif(not SAME_PILLOW, reason="pixels of another Pillow")


@functools.cache
def processor(path: Path) -> Qwen3VLProcessor:
    return Qwen3VLProcessor(path, json.loads((path / "config.json").read_text()))


def names(path: Path) -> list[str]:
    return [prompt["name"] for prompt in reference(path)[0]["prompts"]]


def context(path: Path, name: str) -> Qwen3VLTextAndVisionContext:
    prompt = next(p for p in reference(path)[0]["prompts"] if p["name"] == name)
    made = processor(path).process(to_request(path, prompt))
    own = processor(path).new_context(made, max_length=4096)
    assert isinstance(own, Qwen3VLTextAndVisionContext)
    return own


def logits(path: Path, name: str) -> np.ndarray:
    return reference(path)[1][f"{name}/logits"]


@every_case
@pytest.mark.parametrize("encoded", [False, True])
def test_one_ragged_batch_of_all_prompts(path: Path, *, encoded: bool) -> None:
    contexts = [context(path, name) for name in names(path)]
    found, greedy = run(load(path), contexts, steps=8, encoded=encoded)
    for name, rows, tokens in zip(names(path), found, greedy, strict=True):
        assert relative(rows, logits(path, name)) < BAR, name
        assert tokens == reference(path)[1][f"{name}/greedy"][:8].tolist(), name


@every_case
@pytest.mark.parametrize("size", [1, 7])
def test_chunks_that_cut_pictures(path: Path, size: int) -> None:
    for name in names(path):
        found = run_in_chunks(load(path), context(path, name), size)
        assert relative(found, logits(path, name)) < BAR, name


@every_case
def test_last_logits_where_features_reach_the_last_layer(path: Path) -> None:
    model = load(path, ReturnLogits.LAST_TOKEN)
    decoder = model.language.decoder.config
    assert decoder.feature_layers == 2
    assert decoder.num_layers == (2 if path.name == "qwen3vl-v5" else 3)
    contexts = [context(path, name) for name in names(path)]
    kv = new_cache(model, len(contexts))
    out = model.execute(model.prepare_initial_token_inputs([contexts], kv))
    wanted = np.stack([logits(path, name)[-1] for name in names(path)])
    assert relative(np.array(out.logits), wanted) < BAR


@every_case
def test_features_are_read_as_they_are_packed(path: Path) -> None:
    model, own = load(path), context(path, names(path)[0])
    (rows,) = model.encode_images(own.images)
    assert rows.shape == (own.images[0].end_idx - own.images[0].start_idx, 3 * 32)

    def answer(features: mx.array) -> np.ndarray:
        inputs = model.prepare_initial_token_inputs(
            [[own]], new_cache(model), image_embeddings=features
        )
        return np.array(model.execute(inputs).logits)

    whole = answer(rows)
    assert relative(whole, logits(path, names(path)[0])) < BAR
    for part in (1, 2):  # each layer's share counts
        columns = mx.arange(96) // 32 != part
        assert relative(answer(rows * columns), whole) > 1e-3
    with pytest.raises(InputError, match="vision rows of 32 numbers; expected 3 x 32"):
        answer(rows[:, :32])
    with pytest.raises(ImageTokenMismatch):
        answer(rows[:-1])


@every_case
def test_refusals(path: Path) -> None:
    model, own = load(path), context(path, names(path)[0])
    with pytest.raises(ConfigError, match="kv_cache_inputs"):
        model.prepare_initial_token_inputs([[own]])
    with pytest.raises(TypeError, match="ModelInputs"):
        model.execute(ModelInputs())
    plain = TextAndVisionContext(max_length=9, tokens=TokenBuffer(np.ones(3)), vision_token_ids=[])
    with pytest.raises(TypeError, match="TextAndVisionContext"):
        model.prepare_initial_token_inputs([[plain]], new_cache(model))
    images: Sequence[ImageMetadata] = [ImageMetadata(0, 1, np.zeros((4, 1176)))]
    with pytest.raises(TypeError, match="ImageMetadata"):
        model.encode_images(images)
    own.images = [ImageMetadata(i.start_idx, i.end_idx, i.pixel_values) for i in own.images]
    with pytest.raises(InputError, match="pictures without grids"):
        own.refresh_positions()


def test_work_of_a_picture_is_that_of_its_grid() -> None:
    path = cases("qwen3_vl")[0]
    model, own = load(path), context(path, "one")
    work = model.vision_work(own.images[0])
    rows, columns = own.images[0].grid_thw[1:]  # pyright: ignore[reportAttributeAccessIssue]  # a GridImage
    assert work.scores == 2 * (rows * columns) ** 2
    assert (
        model.calculate_max_seq_len(
            PipelineConfig(model.pipeline_config.model), model.huggingface_config
        )
        == 2048
    )


def merged(path: Path, folder: Path, name: str, change: np.ndarray) -> Path:
    """A copy of a checkpoint, in float32, with a change of one weight in it."""
    shutil.copytree(path, folder)
    weights = mx.load(str(path / "model.safetensors"))
    assert isinstance(weights, dict)
    weights = {key: value.astype(mx.float32) for key, value in weights.items()}
    weights[name] = weights[name] + mx.array(change.astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def test_an_adapter_is_its_product_added_to_the_weight(tmp_path: Path) -> None:
    """PEFT's names for this architecture; pictures and text go through the same decoder."""
    path, layer = cases("qwen3_vl")[0], "model.language_model.layers.1.mlp.down_proj"
    numbers = np.random.default_rng(5)
    down, up = numbers.normal(0, 0.3, (4, 48)), numbers.normal(0, 0.3, (32, 4))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {"lora_A": down, "lora_B": up}
    named = {f"base_model.model.{layer}.{k}.weight": v for k, v in tensors.items()}
    arrays = {k: mx.array(v.astype(np.float32)) for k, v in named.items()}
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), arrays)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    twin = merged(path, tmp_path / "merged", f"{layer}.weight", 2.0 * up @ down)
    prompt = next(p for p in reference(path)[0]["prompts"] if p["name"] == "mixed")
    request = {**arguments(path, prompt), "max_tokens": 8, "ignore_eos": True, "logprobs": 1}
    answers = []
    for pipe, options in (
        (load_pipeline(path, dtype="float32", adapter=adapter), {"adapter": "adapter"}),
        (load_pipeline(twin, dtype="float32"), {}),
        (load_pipeline(path, dtype="float32"), {}),
    ):
        result = pipe.generate(**request, **options)
        pipe.close()
        assert result.logprobs is not None
        answers.append([entry.token_log_probabilities[0] for entry in result.logprobs])
    np.testing.assert_allclose(answers[0], answers[1], atol=bar(1e-4))
    assert np.abs(np.array(answers[0]) - answers[2]).max() > 1e-2
