"""Perplexity of a fixed text in four precisions, beside mlx-lm's on the same files.

    python benchmarks/perplexity.py [--tokens 512] [--only float32 ...]

Needs mlx-lm, and the checkpoint of tools/real_checkpoint.py. Its weights are expanded to float32
and written in each precision by `convert`; both sides read the same folder and compute in the same
dtype. The text is `perplexity.txt`, which nobody has trained on: this project's README of November
2026. Runs on MLX's default device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes import load
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.conversion import ConvertOptions, convert

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.real_checkpoint import checkpoint_path  # the path above leads there

TEXT = Path(__file__).with_suffix(".txt")
# name: (what convert is asked for, dtype to compute in)
PRECISIONS: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({}, "float32"),
    "bfloat16": ({"dtype": "bfloat16"}, "bfloat16"),
    "8 bits": ({"bits": 8, "dtype": "bfloat16"}, "bfloat16"),
    "4 bits": ({"bits": 4, "dtype": "bfloat16"}, "bfloat16"),
}


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """Of ids [T] but the first, by the logits [T, V] before each."""
    rows = logits[:-1].astype(np.float64)
    top = rows.max(-1)
    log_sums = top + np.log(np.exp(rows - top[:, None]).sum(-1))
    return float(np.exp(np.mean(log_sums - rows[np.arange(len(rows)), ids[1:]])))


def ours(folder: Path, dtype: str, ids: np.ndarray) -> float:
    with load(folder, dtype=dtype) as pipe:
        context = TextContext(tokens=TokenBuffer(ids), max_length=8192)
        return perplexity(pipe.engine.prompt_logits(context), ids)


def theirs(folder: Path, ids: np.ndarray) -> float:
    import mlx_lm

    model = mlx_lm.load(str(folder))[0]
    logits = model(mx.array(ids)[None])[0].astype(mx.float32)
    return perplexity(np.array(logits), ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=512, help="of the text")
    parser.add_argument("--only", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "plain"
        source = checkpoint_path()
        convert(ConvertOptions(
            model=source, out=plain, dequantize=True, dtype="float32", measure=False,
        ))  # fmt: skip
        with load(plain) as pipe:
            text = TEXT.read_text(encoding="utf-8")
            ids = np.array(pipe.encode(text, raw=True).input_ids[: args.tokens])
        print(f"{len(ids)} tokens of {TEXT.name}, {source.name}, {mx.default_device()}")
        for precision in args.only:
            options, dtype = PRECISIONS[precision]
            folder = plain
            if options:
                folder = Path(name) / precision.replace(" ", "-")
                convert(ConvertOptions(model=plain, out=folder, measure=False, **options))
            mine, other = ours(folder, dtype, ids), theirs(folder, ids)
            print(f"{precision:9} ours {mine:8.3f}  mlx-lm {other:8.3f}", flush=True)


if __name__ == "__main__":
    main()
