"""Published shapes with random weights, one picture: load, first token, decode, peak memory.

    python benchmarks/real_shapes.py [--rounds 3] [--models smolvlm-256m ...] [--sides ours ...]
        [--text-layers N] [--tower-layers N]

Needs an environment with torch and transformers, and mlx-vlm where it is to be compared. Float32
on the CPU; each run in a process of its own, the sides one after the other in every round, medians.
All sides get the token ids and pixels of this package's processor, outside of the times:

- load: from the folder to a model with its weights in memory;
- first token: vision tower and prompt, from pixels to the first token's logits;
- decode: tokens a second behind it, one row;
- peak: the most memory of the process (its high-water mark), libraries included.

Shapes: config.json of HuggingFaceTB/SmolVLM-256M-Instruct, OpenGVLab/InternVL3-1B-hf (text:
Qwen2.5-0.5B) and Qwen/Qwen2.5-VL-3B-Instruct; of the last with 2 of its 36 text layers. On a slow
machine --text-layers and --tower-layers cut them further; the table then says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

PICTURE_PX = (1024, 768)  # width, height
NEW_TOKENS = 16
SIDES = ("ours", "transformers", "mlx-vlm")
FIXTURES = {
    "smolvlm-256m": "smolvlm",
    "internvl3-1b": "internvl-qwen2",
    "qwen2.5-vl-3b": "qwen25vl",
}
# What each fixture's files become: by file, then by key, nested dictionaries merged.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "smolvlm-256m": {
        "config.json": {
            "text_config": {
                "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
                "vocab_size": 49280, "max_position_embeddings": 8192,
            },
            "vision_config": {
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
            },
        },
        "processor_config.json": {
            "image_seq_len": 64,
            "image_processor": {
                "size": {"longest_edge": 2048},
                "max_image_size": {"longest_edge": 512},
            },
        },
    },
    "internvl3-1b": {
        "config.json": {
            "image_seq_length": 256,
            "text_config": {
                "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674,
                "max_position_embeddings": 32768,
            },
            "vision_config": {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14],
            },
        },
        "preprocessor_config.json": {
            "size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12,
        },
        "processor_config.json": {"image_seq_length": 256},
    },
    "qwen2.5-vl-3b": {
        "config.json": {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
            "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "rope_scaling": {"mrope_section": [16, 24, 24]},
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "out_hidden_size": 2048, "patch_size": 14, "spatial_patch_size": 14,
                "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
            },
        },
        "preprocessor_config.json": {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056},
        "video_preprocessor_config.json": {"patch_size": 14},
    },
}  # fmt: skip


FEWER_TEXT = {"qwen2.5-vl-3b": 2}  # all of its layers would be 12 GB
TOWER_DEPTH = {"qwen2.5-vl-3b": "depth"}  # others call it num_hidden_layers


@dataclass(frozen=True)
class Cut:
    """How many layers to run at most; None for as many as the shape has (FEWER_TEXT for text)."""

    text: int | None = None
    tower: int | None = None

    def shape(self, name: str) -> dict[str, dict[str, Any]]:
        """The files' values of a shape with so many layers."""
        values = copy.deepcopy(SHAPES[name])
        config = values["config.json"]
        text, tower = config.get("text_config", config), config["vision_config"]
        depth = TOWER_DEPTH.get(name, "num_hidden_layers")
        most = self.text or FEWER_TEXT.get(name, sys.maxsize)
        text["num_hidden_layers"] = min(text["num_hidden_layers"], most)
        tower[depth] = min(tower[depth], self.tower or sys.maxsize)
        if "fullatt_block_indexes" in tower:
            kept = [i for i in tower["fullatt_block_indexes"] if i < tower[depth]]
            tower["fullatt_block_indexes"] = kept or [tower[depth] - 1]
        return values

    def flags(self) -> list[str]:
        """The options that say the same."""
        given = {"--text-layers": self.text, "--tower-layers": self.tower}
        return [str(part) for pair in given.items() if pair[1] is not None for part in pair]

    def title(self, name: str) -> str:
        """The model's name, and how many of its layers are run where that is not all of them."""
        own, whole = self.shape(name)["config.json"], SHAPES[name]["config.json"]
        depth = TOWER_DEPTH.get(name, "num_hidden_layers")
        parts = {
            "text": [c.get("text_config", c)["num_hidden_layers"] for c in (own, whole)],
            "tower": [c["vision_config"][depth] for c in (own, whole)],
        }
        said = [f"{have} of {of} {part}" for part, (have, of) in parts.items() if have < of]
        return f"{name} ({', '.join(said)} layers)" if said else name


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old values with the new ones in their places, dictionaries merged."""
    nested = {k: merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and k in old}
    return {**old, **new, **nested}


def write_model(name: str, target: Path, cut: Cut) -> None:
    """A fixture's tokenizer and processor with a published shape, random weights in float32."""
    import torch
    import transformers

    source = ROOT / "tests" / "fixtures" / FIXTURES[name]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "reference*"))
    for file, values in cut.shape(name).items():
        facts = merged(json.loads((target / file).read_text()), values)
        (target / file).write_text(json.dumps(facts))
    config = json.loads((target / "config.json").read_text())
    torch.manual_seed(0)
    parsed = transformers.AutoConfig.from_pretrained(target)
    network = getattr(transformers, config["architectures"][0])._from_config(parsed).float()
    network.save_pretrained(target)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def request(picture_px: tuple[int, int]) -> dict[str, Any]:
    """A chat about one picture of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (*picture_px[::-1], 3), np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    return {"prompt": [{"role": "user", "content": content}], "images": [noise]}


def write_inputs(folder: Path, picture_px: tuple[int, int]) -> int:
    """Store the arrays that the other sides read; returns the number of tokens."""
    from mlx_vlm_pipes.hf_config import read_config
    from mlx_vlm_pipes.processing.types import PromptRequest
    from mlx_vlm_pipes.registry import find_room

    config = read_config(folder)
    processor = find_room(config).processor_class()(folder, config.to_dict(), {})
    given = request(picture_px)
    processed = processor.process(PromptRequest(given["prompt"], tuple(given["images"])))
    ids = np.array([processed.input_ids])
    np.savez(folder / "inputs.npz", input_ids=ids, **processed.hf_arrays)
    return ids.shape[1]


def run_ours(folder: Path, picture_px: tuple[int, int]) -> dict[str, float]:
    from mlx_vlm_pipes import load

    begun = time.perf_counter()
    pipe = load(folder, dtype="float32", device="cpu")
    loaded = time.perf_counter() - begun
    answer = pipe.generate(**request(picture_px), max_tokens=NEW_TOKENS, temperature=0)
    steps = len(answer.tokens) - 1
    pipe.close()
    first = answer.timings.prompt_s
    return {"load": loaded, "first": first, "decode": steps / answer.timings.generation_s}


def run_transformers(folder: Path, picture_px: tuple[int, int]) -> dict[str, float]:
    import torch
    import transformers

    del picture_px  # in the stored arrays
    torch.set_num_threads(1)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    begun = time.perf_counter()
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    loaded = time.perf_counter() - begun
    inputs = {name: torch.from_numpy(a) for name, a in np.load(folder / "inputs.npz").items()}
    inputs.pop("num_patches", None)  # of InternVL's tiles, which its model does not ask for
    if "image_grid_thw" in inputs:
        kinds = inputs["input_ids"] == model.config.image_token_id
        inputs["mm_token_type_ids"] = kinds.long()

    stamps: list[float] = []  # of each token's logits
    model.lm_head.register_forward_hook(lambda *_: stamps.append(time.perf_counter()))
    begun = time.perf_counter()
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    model.generate(**inputs, do_sample=False, **length)
    decode = (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return {"load": loaded, "first": stamps[0] - begun, "decode": decode}


def run_mlx_vlm(folder: Path, picture_px: tuple[int, int]) -> dict[str, float]:
    import mlx.core as mx
    from mlx_vlm.models import cache  # pyright: ignore[reportMissingImports]  # optional
    from mlx_vlm.utils import load_model  # pyright: ignore[reportMissingImports]  # optional

    del picture_px  # in the stored arrays
    begun = time.perf_counter()
    model: Any = load_model(folder)
    mx.eval(model.parameters())
    loaded = time.perf_counter() - begun
    arrays = {name: mx.array(a) for name, a in np.load(folder / "inputs.npz").items()}
    ids, pixels = arrays.pop("input_ids"), arrays.pop("pixel_values")
    made = cache.make_prompt_cache(model.language_model)
    begun = time.perf_counter()
    out = model.get_input_embeddings(ids, pixels, mask=mx.ones_like(ids), **arrays)
    kept = {k: v for k, v in out.to_dict().items() if k != "inputs_embeds" and v is not None}
    answer = model.language_model(
        ids, inputs_embeds=out.inputs_embeds, cache=made, **{**arrays, **kept}
    )
    token = mx.argmax(answer.logits[:, -1:], axis=-1)
    mx.eval(token)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(NEW_TOKENS - 1):
        token = mx.argmax(model.language_model(token, cache=made).logits[:, -1:], axis=-1)
        mx.eval(token)
    decode = (NEW_TOKENS - 1) / (time.perf_counter() - begun)
    return {"load": loaded, "first": first, "decode": decode}


RUNS: dict[str, Callable[[Path, tuple[int, int]], dict[str, float]]] = {
    "ours": run_ours,
    "transformers": run_transformers,
    "mlx-vlm": run_mlx_vlm,
}


def in_own_process(side: str, folder: Path, picture_px: tuple[int, int]) -> dict[str, float] | str:
    """One side's figures, or the last line of what went wrong."""
    command = [sys.executable, __file__, "--run", side, str(folder)]
    command += ["--picture", *map(str, picture_px)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:120]
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(
    name: str, sides: list[str], rounds: int, picture_px: tuple[int, int], cut: Cut
) -> None:
    """Print a row of the table for each side."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        writing = [sys.executable, __file__, "--write", name, str(folder), *cut.flags()]
        subprocess.run(writing, check=True)  # so that torch's memory is given back
        tokens = write_inputs(folder, picture_px)
        results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        failed: dict[str, str] = {}
        for _ in range(rounds):
            for side in [s for s in sides if s not in failed]:
                result = in_own_process(side, folder, picture_px)
                if isinstance(result, str):
                    failed[side] = result
                else:
                    results[side].append(result)
    title = cut.title(name)
    for side in sides:
        if side in failed:
            print(f"| {title} | {tokens} | {side} | {failed[side]} | | | |", flush=True)
            continue
        load, first, decode, peak = (
            statistics.median(r[key] for r in results[side])
            for key in ("load", "first", "decode", "peak")
        )
        print(
            f"| {title} | {tokens} | {side} | {load:.2f} | {first:.2f} | {decode:.2f} "
            f"| {peak / 1e9:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--picture", nargs=2, type=int, default=PICTURE_PX, help="width, height")
    parser.add_argument("--text-layers", type=int, help="at most so many")
    parser.add_argument("--tower-layers", type=int, help="at most so many")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # a side and a folder
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)  # a model and a folder
    args = parser.parse_args()
    picture_px = (args.picture[0], args.picture[1])
    cut = Cut(args.text_layers, args.tower_layers)
    if args.write:
        write_model(args.write[0], Path(args.write[1]), cut)
        return
    if args.run:
        figures = RUNS[args.run[0]](Path(args.run[1]), picture_px)
        unit = 1 if sys.platform == "darwin" else 1024
        figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(json.dumps(figures))
        return
    print("| model | tokens | side | load s | first token s | decode tokens/s | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in args.models:
        compare(name, args.sides, args.rounds, picture_px, cut)


if __name__ == "__main__":
    main()
