"""One picture's encode and prefill beside mlx-vlm: same checkpoint, interleaved, medians, ratio.

    python benchmarks/vision.py [--rounds 5] [--families idefics3 pixtral qwen2_vl ...]

Needs an environment with mlx-vlm, torch and transformers beside this package: the fixtures'
checkpoints are widened with random weights (HF's own classes save them) and take pictures of
256 x 192 pixels, so that matrix products and attention count as they do in real models. Both
sides get the token ids and pixels of this package's processor, outside of the time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FIXTURES = {
    "idefics3": "idefics3",
    "pixtral": "pixtral",
    "internvl": "internvl-qwen3",  # mlx-vlm cannot load the Llama and Qwen2 ones
    "qwen2_vl": "qwen2vl",
    "qwen2_5_vl": "qwen25vl",
}
TEXT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
VISION = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
PICTURE_PX = (256, 192)  # width, height
# What lets the fixtures' processors keep such a picture: by file, then by key. Idefics3 and
# InternVL cut it into squares of 128 and 112 pixels.
LARGER: dict[str, dict[str, dict[str, Any]]] = {
    "idefics3": {
        "preprocessor_config.json": {
            "size": {"longest_edge": 256},
            "max_image_size": {"longest_edge": 128},
        },
        "processor_config.json": {"image_seq_len": 64},
    },
    "pixtral": {"preprocessor_config.json": {"size": {"longest_edge": 256}}},
    "internvl": {
        "preprocessor_config.json": {"size": {"height": 112, "width": 112}},
        "processor_config.json": {"image_seq_length": 64},
        "config.json": {"image_seq_length": 64},
    },
    "qwen2_vl": {"preprocessor_config.json": {"max_pixels": 256 * 256}},
    "qwen2_5_vl": {"preprocessor_config.json": {"max_pixels": 256 * 256}},
}
TOWER_PX: dict[str, Any] = {"idefics3": 128, "pixtral": 256, "internvl": [112, 112]}


def widen(family: str, source: Path, target: Path) -> None:
    """A copy of a fixture with a wider, deeper, random network that sees larger pictures."""
    import torch
    import transformers

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    for name, changes in LARGER[family].items():
        facts = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps({**facts, **changes}))
    config = json.loads((target / "config.json").read_text())
    text = config.get("text_config", config)
    text.update(TEXT)
    text.pop("layer_types", None)
    vision: dict[str, Any] = dict(VISION)
    if config["model_type"] == "qwen2_5_vl":
        vision = {"hidden_size": 256, "intermediate_size": 768, "depth": 6}
        vision["out_hidden_size"] = TEXT["hidden_size"]
        vision["fullatt_block_indexes"] = [2, 5]
    if config["model_type"] == "qwen2_vl":
        vision = {"embed_dim": 256, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 3, "depth": 6}
    tower = config["vision_config"]
    tower.update(vision)
    if family in TOWER_PX:
        tower["image_size"] = TOWER_PX[family]
    if "head_dim" in tower:
        tower["head_dim"] = 256 // tower["num_attention_heads"]
    text["head_dim"] = 256 // text["num_attention_heads"]
    scaling = text.get("rope_scaling") or {}
    if "mrope_section" in scaling:
        half = text["head_dim"] // 2
        scaling["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    loaded = transformers.AutoConfig.from_pretrained(target)
    network = getattr(transformers, config["architectures"][0])._from_config(loaded).float()
    network.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config))


class Ours:
    """Encode and prefill through the documented model, on this thread."""

    def __init__(self, folder: Path) -> None:
        from mlx_vlm_pipes.hf_config import read_config
        from mlx_vlm_pipes.loading import LoadOptions, load_model
        from mlx_vlm_pipes.processing.types import PromptRequest
        from mlx_vlm_pipes.registry import find_room

        config = read_config(folder)
        room = find_room(config)
        self.model = load_model(room, folder, config, LoadOptions(dtype="float32"))
        self.processor = room.processor_class()(folder, config.to_dict())
        noise = np.random.default_rng(0).integers(0, 256, (*PICTURE_PX[::-1], 3), np.uint8)
        content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
        request = PromptRequest([{"role": "user", "content": content}], (noise,))
        self.processed = self.processor.process(request)

    def run(self) -> None:
        from mlx_vlm_pipes.kv_cache import KVCache, cache_inputs

        context = self.processor.new_context(self.processed, max_length=2048)
        cache = KVCache(self.model.kv_params)
        row = cache.new_row()
        inputs = self.model.prepare_initial_token_inputs([[context]], cache_inputs(cache, [row]))
        logits = self.model.execute(inputs).next_token_logits
        mx.eval(logits, row.arrays())


def as_mlx_vlm(folder: Path) -> Path:
    """The folder under the model_type that mlx-vlm knows: Pixtral is "pixtral" there."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llava":
        return folder
    copy = shutil.copytree(folder, folder.with_name("for-mlx-vlm"))
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "pixtral"}))
    return copy


class Theirs:
    """mlx-vlm: input embeddings, then the language model with a prompt cache."""

    def __init__(self, folder: Path, ids: list[int], media: dict[str, np.ndarray]) -> None:
        from mlx_vlm.utils import load_model  # pyright: ignore[reportMissingImports]  # optional

        self.model = load_model(as_mlx_vlm(folder))
        self.ids, self.media = np.array([ids]), media

    def run(self) -> None:
        from mlx_vlm.models import cache  # pyright: ignore[reportMissingImports]  # optional

        ids = mx.array(self.ids)
        extra = {key: mx.array(value) for key, value in self.media.items()}
        pixels = extra.pop("pixel_values")
        out = self.model.get_input_embeddings(ids, pixels, mask=mx.ones_like(ids), **extra)
        kept = {k: v for k, v in out.to_dict().items() if k != "inputs_embeds" and v is not None}
        made = cache.make_prompt_cache(self.model.language_model)
        answer = self.model.language_model(
            ids, inputs_embeds=out.inputs_embeds, cache=made, **{**extra, **kept}
        )
        mx.eval(answer.logits[:, -1], [layer.state for layer in made])


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and peak bytes above what was there before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before, begun = mx.get_active_memory(), time.perf_counter()
    run()
    return time.perf_counter() - begun, mx.get_peak_memory() - before


def compare(family: str, rounds: int) -> None:
    """Print both sides' medians and the ratios for one family."""
    source = ROOT / "tests" / "fixtures" / FIXTURES[family]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / family
        widen(family, source, target)
        ours = Ours(target)
        theirs = Theirs(target, ours.processed.input_ids, ours.processed.hf_arrays)
        sides = {"ours": ours.run, "mlx-vlm": theirs.run}
        results: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for i in range(rounds + 1):
            for side, run in sides.items():
                result = measure(run)
                if i:
                    results[side].append(result)
    (seconds, peak), (their_seconds, their_peak) = (
        tuple(statistics.median(r[k] for r in results[side]) for k in (0, 1)) for side in sides
    )
    print(
        f"{family} ({len(ours.processed.input_ids)} tokens): ours {seconds * 1e3:.1f} ms, "
        f"{peak / 1e6:.1f} MB; mlx-vlm {their_seconds * 1e3:.1f} ms, {their_peak / 1e6:.1f} MB; "
        f"ratios {seconds / their_seconds:.2f} (time), {peak / their_peak:.2f} (memory)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--families", nargs="+", default=list(FIXTURES), choices=list(FIXTURES))
    args = parser.parse_args()
    for family in args.families:
        compare(family, args.rounds)


if __name__ == "__main__":
    main()
