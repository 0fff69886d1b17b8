"""InternVL models driven by hand: tiny random checkpoints, contexts, prefill and decode steps."""

import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.architectures.internvl import InternVLConfig, InternVLModel
from mlx_vlm_pipes.architectures.internvl.vision_model import VisionModel
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig
from mlx_vlm_pipes.contexts import ImageMetadata, TextAndVisionContext, TokenBuffer
from mlx_vlm_pipes.interfaces import InferenceSession, ReturnLogits
from mlx_vlm_pipes.kv_cache import increment_cache_lengths
from mlx_vlm_pipes.nn.decoder import DenseDecoder
from mlx_vlm_pipes.weights import find_weight_files, load_weights, parameter_shapes
from tests.architectures.driving import new_cache
from tests.device import device, device_spec

IMAGE_TOKEN = 3
TEXT = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 40,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4, "norm_type": "layer_norm",
}  # fmt: skip
NATIVE = {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "image_token_id": IMAGE_TOKEN,
    "text_config": TEXT,
    "vision_config": {**VISION, "model_type": "internvl_vision", "attention_bias": True},
}


def pipeline_config(config: Any, folder: Path | None = None, **options: Any) -> PipelineConfig:
    """A float32 pipeline over a configuration object, or over the one in a folder."""
    model = ModelConfig(
        model_path=str(folder or ""),
        weight_path=find_weight_files(folder) if folder else [],
        quantization_encoding="float32",
        device_specs=[device_spec()],
        huggingface_config=config,
        **options,
    )
    return PipelineConfig(model=model)


def random_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """config.json and random weights under canonical names, with small biases and scales."""
    (folder / "config.json").write_text(json.dumps(config))
    built = InternVLConfig.initialize(PipelineConfig(model=_bare_model(folder)))
    built.vision_config.o_proj_bias = True
    built.llm_config.finalize(config_text(folder), {}, ReturnLogits.ALL)
    built.llm_config.tie_word_embeddings = False
    shapes = parameter_shapes(VisionModel(built))
    decoder = DenseDecoder(built.llm_config.decoder_config())
    shapes |= {f"language_model.{k}": v for k, v in parameter_shapes(decoder).items()}
    random = np.random.default_rng(0)
    weights = {
        name: mx.array(random.normal(0, 0.3, shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def _bare_model(folder: Path) -> ModelConfig:
    return ModelConfig(model_path=str(folder), quantization_encoding="float32")


def config_text(folder: Path) -> Any:
    return _bare_model(folder).require_huggingface_config().text_config


def load(folder: Path, mode: ReturnLogits = ReturnLogits.ALL) -> InternVLModel:
    pipeline = pipeline_config(None, folder)
    chosen = device()
    return InternVLModel(
        pipeline,
        InferenceSession([chosen]),
        [chosen],
        pipeline.model.kv_cache,
        load_weights(pipeline.model.weight_path),
        return_logits=mode,
    )


def tiles(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    """Random pixels, float32 [count, 3, side, side]."""
    return np.random.default_rng(seed).normal(size=(count, 3, side, side)).astype(np.float32)


def context(ids: np.ndarray, pixels: np.ndarray | None, token: int) -> TextAndVisionContext:
    """A request whose tiles are shared out among the runs of the image token."""
    images = []
    if pixels is not None:
        where = np.flatnonzero(ids == token)
        per_tile, used = len(where) // len(pixels), 0
        for run in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1):
            count = len(run) // per_tile
            images.append(ImageMetadata(int(run[0]), int(run[-1]) + 1, pixels[used : used + count]))
            used += count
    return TextAndVisionContext(
        max_length=4096, tokens=TokenBuffer(ids), vision_token_ids=[token], images=images
    )


def run(
    model: InternVLModel, contexts: list[TextAndVisionContext], steps: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of every prompt position of each row, and `steps` greedy tokens, [rows, steps]."""
    kv = new_cache(model, len(contexts))
    inputs = model.prepare_initial_token_inputs([contexts], kv)
    out = model.execute(inputs)
    assert out.logit_offsets is not None
    offsets, logits = np.array(out.logit_offsets), np.array(out.logits)
    increment_cache_lengths(kv, [c.tokens.active_length for c in contexts])
    chosen = []
    for _ in range(steps):
        assert out.next_token_logits is not None
        chosen.append(mx.argmax(out.next_token_logits, axis=-1))
        inputs = model.prepare_next_token_inputs(chosen[-1], inputs)
        out = model.execute(inputs)
        increment_cache_lengths(kv, [1] * len(contexts))
    rows = [logits[begin:end] for begin, end in itertools.pairwise(offsets)]
    return rows, np.array(chosen).T
