"""What is counted: a decode step, sampling, and every family's tower, at small widths.

Kernels do not grow with widths but for split products and sorts: the decoder here is narrow, with
the head size 64 of the models this package is for, and the vocabulary of sampling is Qwen's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.engine.batch_sampler import BatchSampler
from mlx_vlm_pipes.engine.row_sampler import RowSampler
from mlx_vlm_pipes.hf_config import read_config
from mlx_vlm_pipes.interfaces import ReturnLogits
from mlx_vlm_pipes.kv_cache import cache_format
from mlx_vlm_pipes.loading import LoadOptions, load_model
from mlx_vlm_pipes.nn.decoder import DenseDecoder
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.language_model import LanguageModel
from mlx_vlm_pipes.nn.lora import attach_loras
from mlx_vlm_pipes.nn.rope import RopeSpec
from mlx_vlm_pipes.processing.types import PromptRequest
from mlx_vlm_pipes.registry import find_room
from mlx_vlm_pipes.weights.lora import LoRAAdapter, LoRAPair
from tools.count_kernels.launches import Count, count

LAYERS, CAPACITY, VOCABULARY = 30, 256, 151_936
ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"
TOWERS = {
    "idefics3": "idefics3", "internvl": "internvl-qwen3", "pixtral": "pixtral",
    "qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen25vl", "qwen3_vl": "qwen3vl",
}  # fmt: skip


def decoder_config(layers: int = LAYERS, **changes: Any) -> DecoderConfig:
    """A Llama of four heads of 64 over two key heads."""
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 512, "num_layers": layers, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 64, "vocab_size": 256, "attention_scale": 0.125,
        "rope": RopeSpec(dims=64, theta=10000.0), "tie_word_embeddings": True,
    }  # fmt: skip
    return DecoderConfig(**(sizes | changes))


def decoder(config: DecoderConfig, *, bits: int | None = None, adapters: int = 0) -> DenseDecoder:
    """A fused decoder, packed to `bits`, with adapters on all seven linears of every layer."""
    made = DenseDecoder(config)
    made.update(tree_map(lambda a: mx.zeros(a.shape, mx.bfloat16), made.parameters()))
    if bits is not None:
        nn.quantize(made, group_size=64, bits=bits)
    if adapters:
        loras = [_adapter(config, f"adapter{i}") for i in range(adapters)]
        attach_loras(made, loras, "language_model.", mx.bfloat16)
        made.adapter_names = tuple(lora.name for lora in loras)
        made.adapter_ranks = tuple(lora.rank for lora in loras)
    made.fuse()
    mx.eval(made.parameters())
    return made


def _adapter(config: DecoderConfig, name: str, rank: int = 8) -> LoRAAdapter:
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = zip(
        ADAPTED,
        [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden), (hidden, inner),
         (hidden, inner), (inner, hidden)],
        strict=True,
    )  # fmt: skip
    shapes = dict(sizes)
    layers = {
        f"language_model.layers.{i}.{path}": LoRAPair(
            mx.zeros((rank, shape[0])), mx.zeros((shape[1], rank)), 1.0
        )
        for i in range(config.num_layers)
        for path, shape in shapes.items()
    }
    return LoRAAdapter(name, rank, layers)


def count_decode(model: DenseDecoder, rows: int, *, kv_bits: int | None = None) -> Count:
    """One compiled decode step of a decoder."""
    config = model.config
    params = KVCacheParams(
        DType.bfloat16, config.num_kv_heads, config.head_dim, config.num_layers,
        [DeviceRef.GPU()], bits=kv_bits,
    )  # fmt: skip
    language = LanguageModel(model, params, ReturnLogits.LAST_TOKEN)
    format = cache_format(params)
    cache = [a for _ in range(config.num_layers) for a in format.empty(params, rows, CAPACITY)]
    slots = [mx.zeros((rows,), mx.int32)] if model.adapter_names else []
    arrays = [mx.zeros((rows,), mx.uint32), *(mx.zeros((rows,), mx.int32) for _ in range(2))]
    arrays += [*slots, *cache]
    mx.eval(arrays)
    return count(language._step, *arrays)


def count_sampling(rows: Sequence[SamplingParams], vocab_size: int = VOCABULARY) -> Count:
    """From a step's logits to its tokens, one row for each of the settings."""
    prompt = np.arange(8, dtype=np.int64)

    logits = mx.zeros((len(rows), vocab_size))
    mx.eval(logits)

    def sample(x: mx.array) -> list[mx.array]:
        sampler = BatchSampler(is_gpu=True)
        samplers = [RowSampler(params, prompt, vocab_size, [2]) for params in rows]
        sampler(logits, samplers)  # makes the groups, which stay
        mx.eval(sampler.state())
        tokens, _ = sampler(x, samplers)
        return [tokens, *sampler.state()]

    return count(sample, logits)


def load_checkpoint(folder: Path) -> Any:
    """A checkpoint's model in bfloat16, on this thread."""
    config = read_config(folder)
    return load_model(find_room(config), folder, config, LoadOptions(dtype="bfloat16"))


def count_tower(folder: Path, *, fused: bool = False) -> tuple[Count, int]:
    """One picture's encoding by a checkpoint's tower, and what its last layer alone adds.

    The picture's windows, where the tower has any, are of one size: every other size that a
    picture's edges bring is attended to by itself, in two kernels more a layer.
    """
    config = read_config(folder)
    room, model = find_room(config), load_checkpoint(folder)
    processor: Any = room.processor_class()(folder, config.to_dict())
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    processed = processor.process(PromptRequest([{"role": "user", "content": content}], (noise,)))
    context = processor.new_context(processed, max_length=2048)
    pixels, *tables = model.pack(context.images)
    mx.eval(pixels, tables)

    def encode(x: mx.array) -> mx.array:
        return model.vision_model(x, *tables)

    whole = count(encode, pixels, fused=fused)
    layers = _layers(model.vision_model)
    last = layers.pop()
    shorter = count(encode, pixels, fused=fused)
    layers.append(last)
    return whole, whole.total - shorter.total


def _layers(tower: Any) -> list[nn.Module]:
    """The list that a tower's layers lie in."""
    for _, module in tower.module.named_modules():
        for name in ("layers", "blocks"):
            if isinstance(module.get(name), list):
                return module[name]
    raise LookupError("the tower has neither layers nor blocks")
