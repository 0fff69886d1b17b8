"""A converted folder's packed weights expanded with numpy, put into a transformers model."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

PARTS = ("scales", "biases")
NEAR = 0.5  # of a weight's spread: how far the expanded weight may be from its original


def expanded(folder: Path) -> list[np.ndarray]:
    """Every packed matrix of a folder as float32 [rows, columns].

    MLX's affine form: little-endian runs of `bits` in uint32, a scale and a bias for each group.
    """
    settings = json.loads((folder / "config.json").read_text()).get("quantization")
    if settings is None:
        return []
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    matrices = []
    for name in sorted(n for n in tensors if n.endswith(".scales")):
        stem = name.removesuffix(".scales")
        said = settings.get(stem)
        bits = (said if isinstance(said, dict) else settings)["bits"]
        packed = tensors[f"{stem}.weight"].numpy()
        scales, biases = (tensors[f"{stem}.{part}"].float().numpy() for part in PARTS)
        flat = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
        values = flat.reshape(len(packed), -1, bits) @ (1 << np.arange(bits))
        groups = values.reshape(*scales.shape, -1).astype(np.float32)
        matrices.append((groups * scales[..., None] + biases[..., None]).reshape(len(packed), -1))
    return matrices


def with_weights_of(
    model: transformers.PreTrainedModel, folder: Path
) -> transformers.PreTrainedModel:
    """A copy whose matrices are those of the folder, each in the place it is nearest to.

    By nearness and not by name, so that nothing of the package's own renaming comes in.
    Raises: ValueError where a matrix is near none.
    """
    model = copy.deepcopy(model)
    homes = [p for p in model.parameters() if p.ndim == 2]
    for matrix in expanded(folder):
        value = torch.from_numpy(matrix)
        fits = [p for p in homes if p.shape == value.shape]
        far = [float((p - value).abs().mean() / p.std()) for p in fits]
        if not fits or min(far) > NEAR:
            raise ValueError(f"a packed matrix {list(value.shape)} is near none of the model's")
        fits[int(np.argmin(far))].data.copy_(value)
    return model
