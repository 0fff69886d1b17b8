"""What keys and values depend on beside tokens and pictures: the model, and the request's adapter.

A saved prefix names both by a digest, so that another process can tell whether it fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.errors import PrefixError, clip
from mlx_vlm_pipes.interfaces import PipelineModelWithKVCache
from mlx_vlm_pipes.quantization import LoRAConfig
from mlx_vlm_pipes.weights import split_lora_path

SAMPLES = 256  # elements of each tensor
_UNREAD = ("_name_or_path", "transformers_version")  # of config.json: they change no number
_READ_BYTES = 1 << 20
_SAMPLE_BYTES = 64


def model_digest(model: PipelineModelWithKVCache) -> str:
    """sha256 of config.json's values, of names, shapes and dtypes of all weights as they are in
    memory (adapters of the decoder left out), and of 256 elements of each, evenly spaced.

    So it is the same wherever the files lie and however they are cut, and takes milliseconds for
    any model; a change of few single numbers may escape it. Raises: PrefixError for a model that
    does not say its networks.
    """
    if not model.networks:
        raise PrefixError(f"{type(model).__name__} names no networks, so no file can be its own")
    state = hashlib.sha256(_as_json(model.huggingface_config.to_dict()))
    samples = []
    for network in model.networks:
        for name in sorted(network.weights):
            array = network.weights[name]
            state.update(f"{name} {list(array.shape)} {array.dtype}\n".encode())
            samples.append(_sampled(array))
    state.update(np.asarray(mx.concatenate(samples)).data)
    return state.hexdigest()


def values_digest(config: Mapping[str, Any]) -> str:
    """sha256 of config.json's values, or of others that JSON knows."""
    return hashlib.sha256(_as_json(config)).hexdigest()


def _as_json(config: Mapping[str, Any]) -> bytes:
    values = {name: value for name, value in config.items() if name not in _UNREAD}
    return json.dumps(values, sort_keys=True, default=str).encode()


def files_digest(paths: Sequence[Path]) -> str:
    """sha256 of the files' sizes, their beginnings (the headers) and some bytes all over them.

    So it takes milliseconds for any model; a change of few single numbers may escape it.
    """
    state = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        state.update(f"{size}\n".encode())
        with path.open("rb") as file:
            state.update(file.read(_READ_BYTES))
            for i in range(SAMPLES):
                file.seek(size * i // SAMPLES)
                state.update(file.read(_SAMPLE_BYTES))
    return state.hexdigest()


def _sampled(array: mx.array) -> mx.array:
    """Some elements of an array as bytes, uint8 [n]; an odd step visits all columns."""
    flat = array.reshape(-1)
    step = array.size // SAMPLES | 1
    return mx.contiguous(flat[::step][:SAMPLES]).view(mx.uint8)


def adapter_digest(model: PipelineModelWithKVCache, name: str) -> str:
    """sha256 of an adapter's files, or "" for the base model (no name).

    Raises: PrefixError where they cannot be read any more.
    """
    if not name:
        return ""
    lora = model.pipeline_config.lora
    paths = dict(split_lora_path(entry) for entry in (lora.lora_paths if lora else ()))
    folder, state = paths[name], hashlib.sha256()
    files = _adapter_files(folder)
    if not files:
        raise PrefixError(f"{clip(folder)}: the files of the adapter '{clip(name)}' are gone")
    try:
        for path in files:
            state.update(f"{path.name} {path.stat().st_size}\n".encode())
            _update(state, path)
    except OSError as error:
        raise PrefixError(
            f"{clip(folder)}: the adapter cannot be read ({error.strerror})"
        ) from None
    return state.hexdigest()


def adapters_digest(lora: LoRAConfig | None) -> str:
    """What names all adapters that are to be loaded, wherever their files lie."""
    named = {} if lora is None else dict(split_lora_path(entry) for entry in lora.lora_paths)
    parts = [f"{name} {files_digest(_adapter_files(folder))}" for name, folder in named.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _adapter_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("adapter*") if path.is_file())


def _update(state: Any, path: Path) -> None:
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            state.update(piece)
