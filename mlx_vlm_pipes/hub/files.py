"""Which files of a repository are a model, and what it is that has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_vlm_pipes.errors import clip
from mlx_vlm_pipes.gguf.header import SUFFIX

TEXTS = (".json", ".jinja")  # beside the weights: configuration, tokenizer, chat template
VOCABULARIES = ("tokenizer.model", "merges.txt", "vocab.txt")
WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_LISTED = 4  # names in one message


def weight_files(files: Sequence[str], index: Callable[[], Sequence[str]] | None) -> list[str]:
    """What of a repository's files are the model's weights, in safetensors; empty for none.

    The index's, else `model.safetensors`, else what is called `model*`, else all that loading
    would take. Folders hold other layouts of the same model, or its parts for other programs.
    """
    if index is not None:
        return list(index())
    top = [file for file in files if file.endswith(WEIGHTS) and "/" not in file]
    if "model.safetensors" in top:
        return ["model.safetensors"]
    named = [file for file in top if file.startswith("model")]
    return named or [f for f in top if not f.startswith(("consolidated", "adapter", "."))]


def is_text(file: str) -> bool:
    return file.endswith(TEXTS) or file in VOCABULARIES


def no_weights(name: str, files: Sequence[str]) -> str:
    """What a repository without usable weights has instead, and what to do."""
    ggufs = [file for file in files if file.endswith(SUFFIX) and "mmproj" not in file]
    if ggufs:
        return (
            f"holds GGUF files ({some(ggufs)}); name one of them, as {name}/{clip(ggufs[0], 120)}"
        )
    adapters = [file for file in files if file.startswith("adapter") and file.endswith(WEIGHTS)]
    if adapters:
        return "is an adapter, not a model; download it, and give its folder as adapter="
    if any(file.startswith("consolidated") for file in files):
        return "has the maker's own layout only (consolidated); take the one for transformers"
    if any(file.endswith(WEIGHTS) for file in files):
        return "has weights in subfolders only; it is no single model for transformers or MLX"
    if any(file.endswith(PICKLES) for file in files):
        return (
            "has PyTorch pickles only, which are never read because they can run code; look for"
            " the same model in safetensors"
        )
    return f"has no weights in safetensors ({len(files)} files)"


def some(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(clip(name, 60) for name in names[:MAX_LISTED]) + more
