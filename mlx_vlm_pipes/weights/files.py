"""Which files a model's weights are, and opening them by their kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_vlm_pipes.errors import WeightsError
from mlx_vlm_pipes.gguf.header import SUFFIX, is_gguf
from mlx_vlm_pipes.weights.checkpoint import SafetensorWeights, Weights
from mlx_vlm_pipes.weights.gguf import GGUFWeights, gguf_header
from mlx_vlm_pipes.weights.safetensors import Header, read_safetensors_header, safetensors_files


def load_weights(paths: str | Path | Sequence[str | Path]) -> Weights:
    """Open checkpoint files by their suffix.

    Raises: WeightsError for pickles, mixed suffixes, several GGUF files, or no file at all.
    """
    listed = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    suffixes = sorted({path.suffix for path in listed})
    if suffixes == [".safetensors"]:
        return SafetensorWeights(listed)
    if suffixes == [SUFFIX] and len(listed) == 1:
        return GGUFWeights(listed[0])
    if suffixes == [SUFFIX]:
        raise WeightsError(f"{len(listed)} GGUF files; expected one, {listed[0]} or another")
    raise WeightsError(
        f"weight files must all be .safetensors, or one .gguf; found: {suffixes or 'none'}"
    )


def read_header(path: str | Path) -> Header:
    """One file's tensors, names, dtypes and shapes, whichever kind of file it is.

    Raises: WeightsError naming the file, and the tensor where one is at fault; UnsupportedModel.
    """
    path = Path(path)
    return gguf_header(path) if path.suffix == SUFFIX else read_safetensors_header(path)


def find_weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a model: its GGUF file, or what safetensors_files finds in its folder.

    Raises: as safetensors_files.
    """
    folder = Path(folder)
    return [folder] if is_gguf(folder) else safetensors_files(folder)
