"""How far 16-bit numbers, 4-bit weights and an 8-bit cache lead from float32, beside transformers.

    python benchmarks/half_precision.py [--smollm2 FOLDER] [--models ...] [--lines ...]

Needs the extra `reference`. For every position of at least 2,000 the Kullback-Leibler divergence of
the next-token distribution from that of transformers in float32, over the whole vocabulary, in
float64: of this package, and of transformers itself with the same roundings.

- bfloat16, float16: all weights and activations.
- 4-bit: weights packed by this package's convert, activations in bfloat16. Both transformers, the
  one in float32 and the one in bfloat16, get the same weights unpacked.
- 8-bit cache: bfloat16; transformers gets a cache that rounds keys and values as ours does.

With --decode only the last tokens of each prompt count, and ours come from compiled decode steps,
one token each; those of transformers from one pass, as before.

Trained models see their unseen cases, random ones of other families the same pictures; SmolLM2 (a
folder with its safetensors) reads prose, a licence, Python, JSON and other languages.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mlx_vlm_pipes import Pipeline, load  # noqa: E402  # the path above leads there
from mlx_vlm_pipes.config import KVCacheConfig, kv_group_size  # noqa: E402
from mlx_vlm_pipes.conversion import ConvertOptions, convert  # noqa: E402
from mlx_vlm_pipes.hf_config import read_config  # noqa: E402
from mlx_vlm_pipes.kv_cache import (  # noqa: E402
    KVCache,
    cache_inputs,
    increment_cache_lengths,
)
from mlx_vlm_pipes.loading import LoadOptions, load_model  # noqa: E402
from mlx_vlm_pipes.processing.types import PromptRequest  # noqa: E402
from mlx_vlm_pipes.registry import find_room  # noqa: E402
from tools.train_tiny.tasks import messages_of, unseen_case  # noqa: E402

SEED = 7  # of the unseen cases
TEXT_TOKENS = 400  # of each text
DECODED = 8  # last tokens of a prompt that --decode looks at, behind all pictures
LANGUAGES = (
    "Der Zug nach Köln fährt um 7:45 Uhr von Gleis 3. «¿Cuánto cuesta el billete?», preguntó ella. "
    "Le café est fermé à midi ; revenez vers 14 h. 東京は日本の首都です。人口は約1400万人。"
    "E = mc², ∑ 1/n² = π²/6 ≈ 1.6449, 3.7e8 m/s; Ærøskøbing, İstanbul, Łódź. 🙂🚀"
)
TEXT_FILES = (
    "README.md",
    "LICENSE",
    "mlx_vlm_pipes/nn/rope.py",
    "tests/fixtures/qwen3vl/config.json",
    "docs/api.md",
)
CHATS = (
    "What is the capital of France?",
    "Write a haiku about the sea, then explain its rhythm.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Translate into German: the cat sleeps under the old wooden table.",
)
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 128**-0.5,  # the usual 0.02 would make all tokens equally likely
}
RANDOM: dict[str, dict[str, dict[str, Any]]] = {
    "smolvlm": {"text_config": WIDE, "vision_config": {"initializer_range": 0.1}},
    "qwen3vl": {
        "text_config": {
            **WIDE,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {"out_hidden_size": 128, "initializer_range": 0.1},
    },
}
MODELS = {
    "smollm2": "llama3",
    "tiny-idefics3": "idefics3",
    "smolvlm": "idefics3",
    "tiny-pixtral": "pixtral",
    "tiny-internvl": "internvl",
    "tiny-qwen2_5vl": "qwen2_5vl",
    "qwen3vl": "qwen3_vl",
}
LINES = ("float32", "bfloat16", "float16", "4-bit", "8-bit cache")


@dataclass(frozen=True)
class Prompt:
    """A request to a pipeline, and what it makes of it: the model inputs of transformers."""

    request: dict[str, Any]
    inputs: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


def model_folder(name: str, smollm2: Path | None, scratch: Path) -> Path:
    """Where a model lies; the random ones are written into scratch."""
    if name == "smollm2":
        if smollm2 is None:
            raise SystemExit("--smollm2 names the folder of SmolLM2-135M-Instruct")
        return smollm2
    if name in RANDOM:
        return write_random(name, scratch / name)
    bundled = ROOT / "mlx_vlm_pipes" / "assets" / name
    return bundled if bundled.is_dir() else ROOT / "examples" / "models" / name


def write_random(name: str, target: Path) -> Path:
    """A fixture's processor and tokenizer with a wider, deeper network of random weights."""
    source = ROOT / "tests" / "fixtures" / name
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "reference*"))
    config = json.loads((target / "config.json").read_text())
    for part, values in RANDOM[name].items():
        config[part].update(values)
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    parsed = transformers.AutoConfig.from_pretrained(target)
    network = getattr(transformers, config["architectures"][0])._from_config(parsed).float()
    network.save_pretrained(target)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return target


def requests(name: str, pipe: Pipeline) -> Iterator[dict[str, Any]]:
    """Requests without end: texts of several kinds, or pictures with questions and answers."""
    if name == "smollm2":
        for text in [(ROOT / file).read_text() for file in TEXT_FILES] + [LANGUAGES]:
            ids = pipe.tokenizer.encode(text)[:TEXT_TOKENS]
            yield {"prompt": pipe.tokenizer.decode(ids), "raw": True}
        yield from ({"prompt": question} for question in CHATS)
        return
    own = {"tiny-qwen2_5vl": "qwen2_5_vl", "tiny-internvl": "internvl", "tiny-pixtral": "llava"}
    for index in range(10_000):
        case = unseen_case(own.get(name, "idefics3"), SEED, index)
        if not case.clip:  # after clips transformers 5 counts positions otherwise (README)
            yield {"prompt": messages_of(case), "images": case.images}


def draw_prompts(name: str, folder: Path, positions: int) -> list[Prompt]:
    """Prompts with at least so many positions, encoded by this package (as by transformers)."""
    prompts: list[Prompt] = []
    with load(folder, dtype="float32", device="cpu") as pipe:
        for request in requests(name, pipe):
            encoded = pipe.encode(**request)
            ids = torch.tensor([encoded.input_ids])
            inputs = {key: torch.from_numpy(a) for key, a in encoded.hf_arrays.items()}
            if "image_grid_thw" in inputs:
                image_token = pipe.config.image_token_id
                inputs["mm_token_type_ids"] = (ids == image_token).long()
            prompts.append(Prompt(request, {"input_ids": ids, **inputs}))
            if name != "smollm2" and sum(p.length for p in prompts) >= positions:
                break
    return prompts


def reference_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model of a folder."""
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures or []
    return getattr(transformers, architecture[0]).from_pretrained(folder, dtype=dtype).eval()


class Stepping:
    """A model whose decode steps are driven on this thread, with the tokens that a prompt has."""

    def __init__(self, folder: Path, dtype: str, kv_bits: int | None) -> None:
        config = read_config(folder)
        room = find_room(config)
        options = LoadOptions(dtype=dtype, kv_cache=KVCacheConfig(bits=kv_bits))
        self.model = load_model(room, folder, config, options)
        self.processor = room.processor_class()(folder, config.to_dict(), {})

    def logits(self, prompt: Prompt) -> np.ndarray:
        """float32 [DECODED, V]: of the last tokens, one step each."""
        given = dict(prompt.request)
        asked, images = given.pop("prompt"), tuple(given.pop("images", ()))
        processed = self.processor.process(PromptRequest(asked, images, **given))
        ids = processed.input_ids
        short = replace(processed, input_ids=ids[:-DECODED])
        context = self.processor.new_context(short, max_length=self.model.max_seq_len)
        cache = KVCache(self.model.kv_params)
        kv = cache_inputs(cache, [cache.new_row()])
        inputs = self.model.prepare_initial_token_inputs([[context]], kv)
        mx.eval(self.model.execute(inputs).last_logits())
        increment_cache_lengths(kv, [len(ids) - DECODED])
        rows = []
        for token in ids[-DECODED:]:
            inputs = self.model.prepare_next_token_inputs(mx.array([token]), inputs)
            rows.append(np.array(self.model.execute(inputs).last_logits()))
            increment_cache_lengths(kv, [1])
        return np.concatenate(rows)


class RoundedLayer(DynamicLayer):
    """A layer's cache, whose keys and values go through MLX's affine packing."""

    bits = 8

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = self._rounded(key_states), self._rounded(value_states)
        return super().update(keys, values, *args, **kwargs)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        group = kv_group_size(x.shape[-1], KVCacheConfig().group_size)
        values = mx.array(x.float().numpy()).astype(mx.bfloat16)
        packed = mx.quantize(values, group, self.bits)
        back = mx.dequantize(*packed, group_size=group, bits=self.bits).astype(mx.float32)
        return torch.from_numpy(np.array(back)).to(x.dtype)


def reference_logits(
    model: PreTrainedModel, prompt: Prompt, *, rounded_cache: bool = False
) -> np.ndarray:
    """float32 [T, V] of transformers, with the model's dtype."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in prompt.inputs.items()}
    cache = None
    if rounded_cache:
        cache = DynamicCache()
        count = model.config.get_text_config().num_hidden_layers
        cache.layers.extend(RoundedLayer() for _ in range(count))
    with torch.no_grad():
        out = model.forward(**inputs, past_key_values=cache, use_cache=rounded_cache)
    return out.logits[0].float().numpy()


def text_path(name: str) -> str:
    """A decoder module's path, the same in every layout: layers.0..., embed_tokens, lm_head."""
    return re.sub(r"^.*model\.(?=layers|embed_tokens|lm_head)", "", name)


def give_unpacked_weights(model: PreTrainedModel, packed: Path) -> None:
    """Put a 4-bit checkpoint's weights, unpacked in float32, into transformers' model."""
    arrays: dict[str, Any] = {}
    for file in packed.glob("*.safetensors"):
        arrays.update(mx.load(str(file)))  # pyright: ignore[reportArgumentType,reportCallIssue]
    parameters = {text_path(name): value for name, value in model.named_parameters()}
    for name in [n.removesuffix(".scales") for n in arrays if n.endswith(".scales")]:
        scales, biases = (arrays[f"{name}.{k}"].astype(mx.float32) for k in ("scales", "biases"))
        group = 32 * arrays[f"{name}.weight"].shape[1] // 4 // scales.shape[1]
        weight = mx.dequantize(arrays[f"{name}.weight"], scales, biases, group, 4)
        with torch.no_grad():
            parameters[f"{text_path(name)}.weight"].copy_(torch.from_numpy(np.array(weight)))


def divergence(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of found from wanted at each position: [T, V] -> float64 [T]."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (wanted, found))
    return (np.exp(p) * (p - q)).sum(-1)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def measure(
    prompts: list[Prompt],
    references: list[np.ndarray],
    run: Callable[[Prompt], np.ndarray],
) -> tuple[np.ndarray, float]:
    """Divergence at every position, and the share of positions with the same likeliest token."""
    parts, same = [], []
    for prompt, whole in zip(prompts, references, strict=True):
        found = run(prompt)
        wanted = whole[-len(found) :]
        parts.append(divergence(wanted, found))
        same.append(found.argmax(-1) == wanted.argmax(-1))
    return np.concatenate(parts), float(np.concatenate(same).mean())


def ratio_bounds(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % of the ratio of the means, positions drawn again with both sides' numbers together."""
    draw = np.random.default_rng(0)
    picks = (draw.integers(0, len(ours), len(ours)) for _ in range(1000))
    low, high = np.percentile([ours[i].mean() / theirs[i].mean() for i in picks], (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Case:
    """One model with its prompts; `packed` holds its 4-bit version."""

    name: str
    folder: Path
    packed: Path
    prompts: list[Prompt]
    decode: bool  # only the last DECODED tokens of each prompt, by decode steps

    def references(self, line: str) -> list[np.ndarray]:
        model = self._theirs(line, torch.float32)
        return [reference_logits(model, prompt) for prompt in self.prompts]

    def ours(self, line: str, references: list[np.ndarray]) -> tuple[np.ndarray, float]:
        """What this package gives on one line of the table."""
        folder = self.packed if line == "4-bit" else self.folder
        dtype = line if line in ("float32", "float16") else "bfloat16"
        bits = 8 if line == "8-bit cache" else None
        if self.decode:
            return measure(self.prompts, references, Stepping(folder, dtype, bits).logits)
        with load(folder, dtype=dtype, device="cpu", kv_bits=bits) as pipe:
            return measure(self.prompts, references, lambda p: pipe.logits(**p.request))

    def theirs(self, line: str, references: list[np.ndarray]) -> tuple[np.ndarray, float]:
        """What transformers gives with the same roundings."""
        model = self._theirs(line, torch.float16 if line == "float16" else torch.bfloat16)
        rounded, begin = line == "8-bit cache", -DECODED if self.decode else 0

        def run(prompt: Prompt) -> np.ndarray:
            return reference_logits(model, prompt, rounded_cache=rounded)[begin:]

        return measure(self.prompts, references, run)

    def _theirs(self, line: str, dtype: torch.dtype) -> PreTrainedModel:
        model = reference_model(self.folder, torch.float32)
        if line == "4-bit":
            give_unpacked_weights(model, self.packed)
        nn.Module.to(model, dtype)  # in place
        return model


def compare(case: Case, lines: list[str]) -> None:
    """Print a row of the table for each line."""
    plain: list[np.ndarray] | None = None
    for line in lines:
        if line == "4-bit":
            wanted = case.references(line)
        else:
            wanted = plain = plain or case.references(line)
        own, same = case.ours(line, wanted)
        head = f"| {case.name} | {line} | {len(own)} | {own.mean():.3g} | "
        if line == "float32":
            print(f"{head} | | {same:.4f} | |", flush=True)
            continue
        other, their_same = case.theirs(line, wanted)
        low, high = ratio_bounds(own, other)
        ratio = f"{own.mean() / other.mean():.2f} ({low:.2f} to {high:.2f})"
        print(f"{head}{other.mean():.3g} | {ratio} | {same:.4f} | {their_same:.4f} |", flush=True)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=LINES)
    parser.add_argument("--decode", action="store_true", help="decode steps instead of prompts")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print("| model | what | positions | ours | transformers | ratio | same top: ours | theirs |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            folder = model_folder(name, args.smollm2, Path(scratch))
            packed = Path(scratch) / f"{name}-4bit"
            if "4-bit" in args.lines:
                options = ConvertOptions(
                    model=folder, out=packed, bits=4, dtype="bfloat16", measure=False
                )
                convert(options)
            prompts = draw_prompts(name, folder, args.positions)
            compare(Case(name, folder, packed, prompts, args.decode), args.lines)


if __name__ == "__main__":
    main()
