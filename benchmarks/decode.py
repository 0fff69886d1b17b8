"""Decode speed beside mlx-lm: the same random Llama, both sides interleaved, medians, ratio.

    python benchmarks/decode.py [--rows 1] [--rounds 7]

Needs mlx-lm. Models: `narrow` has 30 layers 64 wide (what small models feel like on a GPU: the
dispatch counts), `smollm` has SmolLM-135M's shape (the bytes count).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

SHAPES = {
    "narrow": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 30,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
    "smollm": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    },
}  # fmt: skip


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A random Llama checkpoint, tied, float32."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "torch_dtype": "float32", **shape,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    arrays = {"model.embed_tokens.weight": rng.standard_normal((shape["vocab_size"], width))}
    for i in range(shape["num_hidden_layers"]):
        for name, size in sizes.items():
            arrays[f"model.layers.{i}.{name}.weight"] = rng.standard_normal(size) / size[1] ** 0.5
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"model.layers.{i}.{name}.weight"] = np.ones(width)
    arrays["model.norm.weight"] = np.ones(width)
    tensors = {k: mx.array(v.astype(np.float32)) for k, v in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


class Ours:
    """Our engine's scheduler, driven on this thread, prompts as token ids."""

    def __init__(self, folder: Path) -> None:
        from mlx_vlm_pipes.engine.scheduler import Scheduler
        from mlx_vlm_pipes.engine.state import EngineConfig
        from mlx_vlm_pipes.hf_config import read_config
        from mlx_vlm_pipes.loading import LoadOptions, load_model
        from mlx_vlm_pipes.registry import find_room

        config = read_config(folder)
        self.model = load_model(find_room(config), folder, config, LoadOptions())
        limits = EngineConfig(enable_prefix_caching=False)
        self.scheduler = Scheduler(self.model, limits)

    def run(self, prompts: list[list[int]], count: int) -> float:
        """Seconds a step between the first and the last token."""
        from mlx_vlm_pipes.contexts import SamplingParams, TextContext, TokenBuffer

        params = SamplingParams(temperature=0, max_new_tokens=count)
        for ids in prompts:
            context = TextContext(
                max_length=8192, tokens=TokenBuffer(np.array(ids)), sampling_params=params
            )
            self.scheduler.submit(context, Silent())
        while len(self.scheduler.running) < len(prompts):
            self.scheduler.step()
        begun = time.perf_counter()
        steps = 0
        while self.scheduler.step():
            steps += 1
        return (time.perf_counter() - begun) / max(steps, 1)


class Silent:
    """A stream decoder that makes no text, so that only the models are compared."""

    def add(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Theirs:
    """mlx-lm: generate_step for one row, BatchGenerator for several."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]  # optional

        self.model, _ = load_model(folder)

    def run(self, prompts: list[list[int]], count: int) -> float:
        if len(prompts) > 1:
            return self._batch(prompts, count)
        from mlx_lm.generate import (  # pyright: ignore[reportMissingImports]  # optional
            generate_step,
        )

        begun = None
        for i, _ in enumerate(generate_step(mx.array(prompts[0]), self.model, max_tokens=count)):
            if i == 0:
                begun = time.perf_counter()
        assert begun is not None
        return (time.perf_counter() - begun) / (count - 1)

    def _batch(self, prompts: list[list[int]], count: int) -> float:
        from mlx_lm.generate import (  # pyright: ignore[reportMissingImports]  # optional
            BatchGenerator,
        )

        generator = BatchGenerator(self.model, max_tokens=count)
        generator.insert(prompts)
        done: list[float] = []
        while True:
            responses = generator.next_generated()
            if not responses:
                break
            done.append(time.perf_counter())
        generator.close()
        gaps = [b - a for a, b in itertools.pairwise(done)]
        return statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), SHAPES[name])
            sides = {"ours": Ours(Path(folder)), "mlx-lm": Theirs(Path(folder))}
            for rows in args.rows:
                compare(name, sides, rows, args.rounds, args.tokens)


def compare(name: str, sides: dict, rows: int, rounds: int, count: int) -> None:
    """Print medians of interleaved rounds and the ratio."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 500, 80).tolist() for _ in range(rows)]
    times: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(rounds + 1):
        for side, runner in sides.items():
            spent = runner.run(prompts, count)
            if i:  # the first round compiles
                times[side].append(spent)
    ours, theirs = (statistics.median(times[side]) for side in sides)
    print(
        f"{name}, {rows} rows, context 80 to {80 + count}: ours {ours * 1e3:.2f} ms a token, "
        f"mlx-lm {theirs * 1e3:.2f} ms, ratio {ours / theirs:.2f}"
    )


if __name__ == "__main__":
    main()
