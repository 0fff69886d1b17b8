"""What published models take, from their shapes alone, by the arithmetic of `Pipeline.plan`.

    python tools/model_sizes.py

Prints the tables of docs/guide/which-model.md. Nothing is downloaded and no weights are made: a
fixture lends its tokenizer and processor, SHAPES the numbers of the published config.json and
processor files. The device is taken as Metal: bfloat16, attention that keeps no scores.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mlx_vlm_pipes.checkpoint.blueprint import Checkpoint, blueprint  # noqa: E402
from mlx_vlm_pipes.checkpoint.canonical import canonical_state  # noqa: E402
from mlx_vlm_pipes.checkpoint.headers import HeaderWeights  # noqa: E402
from mlx_vlm_pipes.checkpoint.modules import expected_shapes  # noqa: E402
from mlx_vlm_pipes.checkpoint.state import StateDict  # noqa: E402
from mlx_vlm_pipes.config import ModelConfig, PipelineConfig  # noqa: E402
from mlx_vlm_pipes.contexts import ImageMetadata  # noqa: E402
from mlx_vlm_pipes.conversion.recipe import Recipe  # noqa: E402
from mlx_vlm_pipes.engine.plan import _transient, cache_bytes, peak_bytes, prefill_bytes  # noqa: E402
from mlx_vlm_pipes.engine.state import EngineConfig  # noqa: E402
from mlx_vlm_pipes.hf_config import read_config  # noqa: E402
from mlx_vlm_pipes.processing.types import PromptRequest  # noqa: E402
from mlx_vlm_pipes.registry import find_room  # noqa: E402
from mlx_vlm_pipes.weights import read_header  # noqa: E402

GB = 1e9
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TOKENS = 4096  # prompt and answer together, or, where a picture alone takes more,
TEXT_TOKENS = 512  # so many beside it
PICTURES = {"1024 x 768": (1024, 768), "12 MP": (4032, 3024)}
# What macOS recommends as a GPU's working set, of a Mac with so many GB: two thirds of it
# (10922.67 MiB of 16 GB and 21845.34 MiB of 32 GB stand in logs of llama.cpp).
MACS = {8: 2 / 3 * 8 * 2**30, 16: 2 / 3 * 16 * 2**30, 32: 2 / 3 * 32 * 2**30}

Facts = dict[str, Any]
SIGLIP_BASE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
SIGLIP_LARGE = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
INTERN_VIT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
}  # fmt: skip
QWEN3_TOWER = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
QWEN3_LARGE_TOWER = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published model. text: width, MLP, layers, heads, KV heads, vocabulary, head width.

    billions: parameters as its card says them. vision: the tower's part of config.json.
    processor: keys of the processor files. outer: keys beside the two parts. names: the fixture
    that has the same tensors, where that is another one (its own has no head).
    """

    fixture: str
    billions: float
    text: tuple[int, int, int, int, int, int, int]
    vision: Facts
    processor: Facts
    outer: Facts
    names: str = ""


def smolvlm(billions: float, text: Any, vision: Facts, scale: int, edge: int) -> Published:
    tile = vision["image_size"]
    tokens = (tile // vision["patch_size"] // scale) ** 2
    pictures = {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": tile}}
    processor = {"image_seq_len": tokens, "image_processor": pictures}
    return Published("smolvlm", billions, text, vision, processor, {"scale_factor": scale})


def qwen2(billions: float, text: Any, *, tied: bool) -> Published:
    vision = {
        "depth": 32, "embed_dim": 1280, "hidden_size": text[0], "num_heads": 16, "mlp_ratio": 4,
        "patch_size": 14, "spatial_patch_size": 14,
    }  # fmt: skip
    processor = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    outer = {"tie_word_embeddings": tied, "rope_scaling": rope}
    return Published("qwen2vl", billions, text, vision, processor, outer, "qwen2vl-v5")


def qwen2_5(billions: float, text: Any, *, tied: bool) -> Published:
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": text[0], "patch_size": 14, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    processor = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    outer = {"tie_word_embeddings": tied, "rope_scaling": rope}
    return Published("qwen25vl", billions, text, vision, processor, outer)


def qwen3(billions: float, text: Any, tower: Facts, *, tied: bool) -> Published:
    vision = tower | {"out_hidden_size": text[0], "patch_size": 16, "num_position_embeddings": 2304}
    processor = {"patch_size": 16, "min_pixels": 65536, "max_pixels": 16777216}
    return Published("qwen3vl", billions, text, vision, processor, {"tie_word_embeddings": tied})


def internvl(billions: float, text: Any) -> Published:
    processor = {
        "size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12,
        "image_seq_length": 256,
    }  # fmt: skip
    outer = {"image_seq_length": 256, "tie_word_embeddings": False}
    return Published("internvl-qwen2", billions, text, INTERN_VIT, processor, outer)


def pixtral(billions: float, text: Any) -> Published:
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "head_dim": 64, "image_size": 1024, "patch_size": 16,
    }  # fmt: skip
    processor = {"patch_size": 16, "size": {"longest_edge": 1024}}
    return Published("pixtral", billions, text, vision, processor, {"tie_word_embeddings": False})


MODELS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": smolvlm(
        0.256, (576, 1536, 30, 9, 3, 49280, 64), SIGLIP_BASE, 4, 2048
    ),
    "HuggingFaceTB/SmolVLM-500M-Instruct": smolvlm(
        0.508, (960, 2560, 32, 15, 5, 49280, 64), SIGLIP_BASE, 4, 2048
    ),
    "HuggingFaceTB/SmolVLM-Instruct": smolvlm(
        2.25, (2048, 8192, 24, 32, 32, 49155, 64), SIGLIP_LARGE, 3, 1536
    ),
    "OpenGVLab/InternVL3-1B-hf": internvl(0.94, (896, 4864, 24, 14, 2, 151674, 64)),
    "OpenGVLab/InternVL3-2B-hf": internvl(2.09, (1536, 8960, 28, 12, 2, 151674, 128)),
    "OpenGVLab/InternVL3-8B-hf": internvl(7.94, (3584, 18944, 28, 28, 4, 151674, 128)),
    "Qwen/Qwen2-VL-2B-Instruct": qwen2(2.21, (1536, 8960, 28, 12, 2, 151936, 128), tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": qwen2(8.29, (3584, 18944, 28, 28, 4, 152064, 128), tied=False),
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen2_5(3.75, (2048, 11008, 36, 16, 2, 151936, 128), tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen2_5(8.29, (3584, 18944, 28, 28, 4, 152064, 128), tied=False),
    "Qwen/Qwen3-VL-2B-Instruct": qwen3(
        2.13, (2048, 6144, 28, 16, 8, 151936, 128), QWEN3_TOWER, tied=True
    ),
    "Qwen/Qwen3-VL-4B-Instruct": qwen3(
        4.44, (2560, 9728, 36, 32, 8, 151936, 128), QWEN3_TOWER, tied=True
    ),
    "Qwen/Qwen3-VL-8B-Instruct": qwen3(
        8.77, (4096, 12288, 36, 32, 8, 151936, 128), QWEN3_LARGE_TOWER, tied=False
    ),
    "mistral-community/pixtral-12b": pixtral(12.7, (5120, 14336, 40, 32, 8, 131072, 128)),
}


@dataclass(frozen=True)
class Need:
    """A request with one picture: its tokens, and bytes beside the weights."""

    picture_tokens: int
    cache: int
    transient: int


@dataclass(frozen=True)
class Sizes:
    """Of one model, in bytes. needs: by the picture's name. pipeline, step: what limits read."""

    parameters: int
    weights_16: int
    weights_4: int
    cache_per_1000: int
    needs: dict[str, Need]
    pipeline: PipelineConfig
    step: int

    def peak(self, need: Need, weights: int) -> int:
        return peak_bytes(weights, need.cache, need.transient, EngineConfig())

    def smallest_mac(self, need: Need, weights: int) -> str:
        """The first of MACS on which `Pipeline.plan` would say that the request fits."""
        for gigabytes, memory in MACS.items():
            limits = EngineConfig.from_pipeline(
                self.pipeline, int(memory), weights, step_bytes=self.step
            )
            if self.peak(need, weights) <= memory and need.cache <= limits.kv_bytes:
                return f"{gigabytes}\N{NO-BREAK SPACE}GB"
        return "more"


def write_folder(model: Published, target: Path) -> Path:
    """The fixture's folder without weights, with the published numbers in its files."""
    source = ROOT / "tests" / "fixtures" / model.fixture
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "reference*"))
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "head_dim",
    )  # fmt: skip
    text: Facts = dict(zip(keys, model.text, strict=True))
    text["max_position_embeddings"] = 32768
    if model.fixture == "qwen3vl":
        text["rope_scaling"] = {
            "rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20],
        }  # fmt: skip
    config = json.loads((target / "config.json").read_text())
    part = config.get("text_config", config)  # Qwen2.5-VL's file has them outside
    part.update(text)
    config["vision_config"].update(model.vision)
    config.update(model.outer)
    if "text_config" in config and "tie_word_embeddings" in model.outer:
        part["tie_word_embeddings"] = model.outer["tie_word_embeddings"]
    (target / "config.json").write_text(json.dumps(config))
    for file in PROCESSOR_FILES:
        if (target / file).is_file():
            kept = json.loads((target / file).read_text())
            both = [k for k, v in model.processor.items() if {type(v), type(kept.get(k))} == {dict}]
            nested = {key: kept[key] | model.processor[key] for key in both}
            (target / file).write_text(json.dumps(kept | model.processor | nested))
    return target


def sizes_of(model: Published, folder: Path) -> Sizes:
    parsed = read_config(write_folder(model, folder))
    encoding = ModelConfig(
        model_path=str(folder), quantization_encoding="bfloat16", huggingface_config=parsed
    )
    pipeline, room = PipelineConfig(model=encoding), find_room(parsed)
    room_class, state = room.model_class(), tensor_names(model)
    shapes = expected_shapes(room_class, pipeline, state)
    _, decoder = blueprint(room_class, Checkpoint(pipeline, state))
    params = room_class.get_kv_params(
        parsed, pipeline, encoding.devices, encoding.kv_cache, encoding.cache_dtype
    )
    count = sum(math.prod(shape) for shape in shapes.values())
    processor = room.processor_class()(folder, parsed.to_dict(), {})
    config, _ = room_class.read_config(pipeline)
    encoder = room_class.__new__(room_class)  # vision_work reads nothing but the configuration
    encoder.model_config = config

    def prefill(tokens: int) -> int:
        return prefill_bytes(decoder, 2, tokens, EngineConfig(), fused=True)

    def need(size: tuple[int, int]) -> Need:
        of_picture, encoding = picture(processor, encoder, size)
        tokens = max(TOKENS, of_picture + TEXT_TOKENS)
        return Need(of_picture, cache_bytes(params, tokens), max(encoding, prefill(tokens)))

    return Sizes(
        parameters=count,
        weights_16=2 * count,
        weights_4=packed_bytes(shapes),
        cache_per_1000=1000 * params.bytes_per_token,
        needs={name: need(size) for name, size in PICTURES.items()},
        pipeline=pipeline,
        step=prefill(EngineConfig().prefill_chunk),
    )


def tensor_names(model: Published) -> StateDict:
    """The fixture's tensors as stand-ins: which there are (biases, a head) is read from names."""
    folder = ROOT / "tests" / "fixtures" / (model.names or model.fixture)
    parsed, infos = read_config(folder), read_header(folder / "model.safetensors").tensors
    encoding = ModelConfig(
        model_path=str(folder), quantization_encoding="float32", huggingface_config=parsed
    )
    pipeline, room_class = PipelineConfig(model=encoding), find_room(parsed).model_class()
    _, changes = room_class.read_config(pipeline)
    state = canonical_state(HeaderWeights(infos), None, room_class.layouts, pipeline, changes)
    tied = model.outer.get("tie_word_embeddings", False)
    state.keep([name for name in state if not (tied and name.endswith("lm_head.weight"))])
    return state


def packed_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """As `convert --bits 4` writes them: the decoder's linears packed, the rest in bfloat16."""
    recipe, total = Recipe((64, 4, "affine")), 0
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        settings = recipe.settings_for(module, shape) if part == "weight" else None
        count = math.prod(shape)
        total += 2 * count if settings is None else count // 2 + 2 * 2 * count // settings[0]
    return total


def picture(processor: Any, encoder: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens that one picture of a size takes, and what encoding it holds at its widest."""
    from PIL import Image

    with_one = processor.process(PromptRequest("", [Image.new("RGB", size)]))
    without = processor.process(PromptRequest("", []))
    sizes = [encoding_bytes(encoder, image) for image in with_one.images]
    batch = EngineConfig().image_batch
    widest = max(sum(sizes[i : i + batch]) for i in range(0, len(sizes), batch))
    return len(with_one.input_ids) - len(without.input_ids), widest


def encoding_bytes(encoder: Any, image: ImageMetadata) -> int:
    """engine.plan.picture_bytes, for Metal: bfloat16, no scores in memory."""
    return int(_transient(encoder.vision_work(image), 2, fused=True)) + image.pixel_values.nbytes


def tables(sizes: dict[str, Sizes]) -> tuple[str, str]:
    """The rows of the two tables of docs/guide/which-model.md."""
    first, second = [], []
    for name, one in sizes.items():
        small, large = one.needs.values()
        both = (one.weights_16, one.weights_4)
        needed = (
            f"{_gb(w)} | {_gb(one.peak(small, w))} | {one.smallest_mac(small, w)}" for w in both
        )
        first.append(
            f"| `{name}` | {one.parameters / GB:.2f} |"
            f" {one.cache_per_1000 / 1e6:.0f}\N{NO-BREAK SPACE}MB | {' | '.join(needed)} |"
        )
        second.append(
            f"| `{name}` | {large.picture_tokens:,} | {_gb(large.cache)} |"
            f" {_gb(one.peak(large, one.weights_4))} | {one.smallest_mac(large, one.weights_4)} |"
        )
    return "\n".join(first), "\n".join(second)


def _gb(size: int) -> str:
    return f"{size / GB:.1f}\N{NO-BREAK SPACE}GB"


def measured(names: list[str]) -> dict[str, Sizes]:
    with tempfile.TemporaryDirectory() as root:
        return {name: sizes_of(MODELS[name], Path(root) / str(i)) for i, name in enumerate(names)}


if __name__ == "__main__":
    print("\n\n".join(tables(measured(list(MODELS)))))
