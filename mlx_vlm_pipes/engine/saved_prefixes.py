"""Prefixes into files and out of them: `Engine.save_prefix`, `Engine.load_prefix`.

What is saved is what the prefix cache holds of a prompt, computed first where it is not there, with
the vision rows of its pictures. Loaded, it is in these caches again: a later request that begins
with these tokens takes it as it would take one of this process, bit for bit. Arrays are touched on
the owning thread; files are written and read on the caller's, while others decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import kv_group_size
from mlx_vlm_pipes.contexts import ImageMetadata, TextContext
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.engine.caches import token_keys
from mlx_vlm_pipes.engine.identity import adapter_digest
from mlx_vlm_pipes.engine.prefix_file import (
    CACHE,
    FEATURES,
    IMAGES,
    TOKENS,
    PrefixHeader,
    PrefixOwner,
    Shapes,
    damaged,
    int64,
    read_prefix_header,
    require_replaceable,
    write_prefix,
)
from mlx_vlm_pipes.engine.slices import encode, image_key
from mlx_vlm_pipes.engine.state import EngineState
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.errors import InputError, OutOfBudget, PrefixError, clip
from mlx_vlm_pipes.hf_config import lookup
from mlx_vlm_pipes.kv_cache import CacheRow, Layer
from mlx_vlm_pipes.weights.safetensors import HostArray


@dataclass(frozen=True)
class SavedPrefix:
    """A prefix in a file. images: pictures, tiles and frames, as `Usage.images_encoded` counts.

    nbytes: of the tensors, about the size of the file. adapter: the LoRA adapter that it belongs
    to, as it is named here; "" for the base model.
    """

    path: Path
    tokens: int
    images: int
    nbytes: int
    adapter: str = ""


class PrefixFiles:
    """Saves and loads the prefixes of one engine."""

    def __init__(self, worker: OwnerThread, state: EngineState) -> None:
        self._worker, self._state = worker, state

    # ---- saving

    def save(
        self, path: Path, context: TextContext, compute: Callable[[], CacheRow]
    ) -> SavedPrefix:
        """Write the prefix of a prompt; compute runs the prompt where it is not cached.

        Raises: PrefixError for a file of another kind in its place, OutOfBudget for a prefix that
        the engine may not keep, InputError if it cannot be written, and what `compute` raises.
        """
        require_replaceable(path)
        self._require_caching()
        keys, owner = self._state.keys(context), self._owner(context)
        row = self._worker.call(lambda: self._cached(keys))
        if row is None:
            self._require_budget(len(keys), "the prompt")
            row = compute()
        layers = self._worker.call(lambda: _on_host(row))
        arrays = _named(context, layers)
        for i, image in enumerate(_distinct(context.images)):  # one a call: others go on between
            arrays[f"{FEATURES}{i}"] = self._worker.call(partial(self._rows, image))
        nbytes = write_prefix(path, owner, arrays)
        return SavedPrefix(path, len(keys), len(context.images), nbytes, context.model_name)

    def _cached(self, keys: np.ndarray) -> CacheRow | None:
        """A staged row of exactly these tokens; None where not all of them are cached."""
        length, row = self._state.prefixes.match(keys)
        return row.copy(length, length) if row is not None and length == len(keys) else None

    def _rows(self, image: ImageMetadata) -> HostArray:
        """A picture's vision rows, from the cache or encoded."""
        known = self._state.images.get(image.image_hash)
        if known is None:
            (known,) = encode(self._state.model, {image_key(image): image}).values()
        return HostArray.of(known)

    def _owner(self, context: TextContext) -> PrefixOwner:
        model, name = self._state.model, context.model_name
        reach = self._state.planned_length(context) + context.position_delta
        return replace(
            self._here(),
            adapter=adapter_digest(model, name),
            adapter_name=name,
            rope_table=model.language.key_table(reach),
        )

    def _here(self) -> PrefixOwner:
        """The loaded model, without an adapter."""
        model, params = self._state.model, self._state.model.kv_params
        kept = params.dtype.name
        if params.bits is not None:
            group = kv_group_size(params.head_dim, params.group_size)
            kept = f"{params.bits} bits in groups of {group}"
        kind = str(lookup(model.huggingface_config, "model_type"))
        digest = self._worker.call(lambda: self._state.model_digest)
        return PrefixOwner(kind, model.dtype.name, kept, digest, "", "", 0)

    # ---- loading

    def load(self, path: Path) -> SavedPrefix:
        """Put a file's prefix and vision rows into the caches.

        Raises: PrefixError for a file that is missing, no prefix, damaged, too new or another
        model's; OutOfBudget for one that is larger than what the engine may keep.
        """
        self._require_caching()
        header = read_prefix_header(path)
        adapter = self._fitting(header)
        header.require_shapes(self._worker.call(lambda: self._shapes(header)))
        self._require_budget(header.num_tokens, str(path))
        arrays = header.read()
        pictures = self._pictures(header, arrays)
        salt = self._state.salt_of(header.owner.rope_table, adapter)
        keys = token_keys(arrays.pop(TOKENS).data, pictures, salt)
        hashes = list(dict.fromkeys(digest for _, _, digest in pictures))
        self._worker.call(lambda: self._install(keys, hashes, arrays))
        return SavedPrefix(path, len(keys), len(pictures), header.nbytes, adapter)

    def _fitting(self, header: PrefixHeader) -> str:
        """The adapter's name here. Raises: PrefixError naming what does not fit."""
        owner, here, model = header.owner, self._here(), self._state.model
        pairs = (
            ("a model of type", owner.model_type, here.model_type, "load that model"),
            ("dtype", owner.dtype, here.dtype, "load with that dtype"),
            ("a KV cache of", owner.cache, here.cache, "load with those kv_bits"),
        )
        for what, saved, own, remedy in pairs:
            if saved != own:
                raise PrefixError(
                    f"{header.path}: saved with {what} {clip(saved)}, this pipeline has {own}; "
                    f"{remedy} or save the prefix again"
                )
        loaded = ("", *model.adapters)
        adapter = next((n for n in loaded if adapter_digest(model, n) == owner.adapter), None)
        if adapter is None:
            raise PrefixError(
                f"{header.path}: saved with the adapter '{clip(owner.adapter_name)}'; loaded are: "
                f"{', '.join(model.adapters) or 'none'}; load it or save the prefix again"
            )
        if owner.model != here.model:  # a tower with an adapter merged into it is another one
            raise PrefixError(
                f"{header.path}: saved with another {here.model_type} model (its weights or its "
                "config.json differ); load that model or save the prefix again"
            )
        return adapter

    def _shapes(self, header: PrefixHeader) -> Shapes:
        """The tensors that a prefix of so many tokens has; how many vision rows the file says."""
        params, config = self._state.model.kv_params, self._state.model.language.decoder.config
        count = header.num_tokens
        shapes = {
            TOKENS: (DType.int64, (count,)),
            IMAGES: (DType.int64, (header.num_images, 3)),
        }
        for i, array in enumerate(self._state.cache.format.empty(params, 1, count)):
            form = DType.from_mx(array.dtype), tuple(array.shape)
            shapes |= {f"{CACHE}{layer}.{i}": form for layer in range(params.num_layers)}
        width = config.hidden_size * (1 + config.feature_layers)
        for i, (dtype, rows) in enumerate(header.features()):
            shapes[f"{FEATURES}{i}"] = dtype, (rows, width)
        return shapes

    def _pictures(
        self, header: PrefixHeader, arrays: Mapping[str, HostArray]
    ) -> list[tuple[int, int, int]]:
        """Begin, end and hash of each picture.

        Raises: PrefixError where tokens, pictures, vision rows and rotary table contradict each
        other or the model.
        """
        model, tokens = self._state.model, arrays[TOKENS].data
        pictures = [(begin, end, digest) for begin, end, digest in arrays[IMAGES].data.tolist()]
        if not len(tokens):
            raise damaged(header.path, "it has no token")
        if len(tokens) > model.max_seq_len:
            raise PrefixError(
                f"{header.path}: {len(tokens)} tokens, this pipeline holds {model.max_seq_len}; "
                "load with a larger max_length"
            )
        if tokens.min() < 0 or tokens.max() >= model.vocab_size:
            raise damaged(header.path, "it has tokens that the model has not")
        if header.owner.rope_table > max(1, model.max_seq_len):
            raise damaged(header.path, "it has a rotary table that the model has not")
        rows: dict[int, int] = {}
        last = 0
        for begin, end, digest in pictures:
            if not (last <= begin < end <= len(tokens) and digest >= 0):
                raise damaged(header.path, "its pictures do not lie one behind the other")
            rows[digest] = int(np.count_nonzero(tokens[begin:end] == tokens[begin]))
            last = end
        if list(rows.values()) != [count for _, count in header.features()]:
            raise damaged(header.path, "its pictures have other vision rows than tokens")
        return pictures

    def _install(
        self, keys: np.ndarray, hashes: Sequence[int], arrays: dict[str, HostArray]
    ) -> None:
        """Into the caches; the host's arrays are let go one after the other."""
        for i, digest in enumerate(hashes):
            rows = arrays.pop(f"{FEATURES}{i}").to_mx()
            mx.eval(rows)
            self._state.images.put([digest], [rows])
        if self._state.prefixes.covers(keys):
            return
        params, width = self._state.model.kv_params, self._state.cache.format.width
        layers: list[Layer] = []
        for layer in range(params.num_layers):
            names = [f"{CACHE}{layer}.{i}" for i in range(width)]
            layers.append(tuple(arrays.pop(name).to_mx() for name in names))
            mx.eval(layers[-1])
        row = self._state.cache.new_row()
        row.length = len(keys)
        row.stage(layers)
        self._state.prefixes.store(keys, row)

    def _require_caching(self) -> None:
        if not self._state.config.enable_prefix_caching:
            raise InputError("this engine keeps no prefixes; load with enable_prefix_caching=True")

    def _require_budget(self, tokens: int, what: str) -> None:
        need = tokens * self._state.model.kv_params.bytes_per_token
        budget = self._state.prefixes.budget_bytes
        if need > budget:
            raise OutOfBudget(
                f"{what}: {tokens} tokens take {need / 1e6:.3g} MB, the engine keeps at most "
                f"{budget / 1e6:.3g} MB of prefixes; raise EngineConfig.prefix_bytes"
            )


def _on_host(row: CacheRow) -> list[list[HostArray]]:
    mx.eval(row.arrays())
    return [[HostArray.of(array) for array in layer] for layer in row.layers]


def _distinct(images: Sequence[ImageMetadata]) -> list[ImageMetadata]:
    """Each picture once, in the order of their first places."""
    return list({image.image_hash: image for image in reversed(images)}.values())[::-1]


def _named(context: TextContext, layers: Sequence[Sequence[HostArray]]) -> dict[str, HostArray]:
    """A prompt's tokens, pictures and cache as the tensors of a file.

    Raises: InputError for pictures without a hash, which no other request could be known to have.
    """
    pictures = [(image.start_idx, image.end_idx, image.image_hash) for image in context.images]
    if any(digest is None for _, _, digest in pictures):
        raise InputError("a picture without a content hash; let the processor make the context")
    arrays = {
        TOKENS: int64(context.tokens.prompt, -1),
        IMAGES: int64(pictures, -1, 3),
    }
    for layer, own in enumerate(layers):
        arrays |= {f"{CACHE}{layer}.{i}": array for i, array in enumerate(own)}
    return arrays
