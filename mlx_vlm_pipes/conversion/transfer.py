"""One module at a time: unpacked where needed, merged with an adapter, cast, packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_vlm_pipes.conversion.recipe import ConvertOptions, Packing, Recipe
from mlx_vlm_pipes.conversion.source import EMBEDDING_PATH, HEAD_PATH, Source, packing_of
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import WeightsError, clip
from mlx_vlm_pipes.rounding import unpack
from mlx_vlm_pipes.weights import WeightData
from mlx_vlm_pipes.weights.lora import LoRAAdapter, merge_into

Parts = dict[str, mx.array]


@dataclass
class Tally:
    """What was written: elements before packing, bytes, and how each module is packed."""

    read: int = 0  # bytes of the source
    elements: int = 0
    nbytes: int = 0
    kept: int = 0  # matrices that stay floats
    packed: dict[str, Packing] = field(default_factory=dict)  # written module path -> settings


@dataclass(frozen=True)
class Transfer:
    """The work on a source's modules. `adapter` is merged on the way."""

    source: Source
    options: ConvertOptions
    recipe: Recipe
    adapter: LoRAAdapter | None
    tally: Tally = field(default_factory=Tally)

    def run(self) -> Iterator[tuple[str, mx.array]]:
        """(written name, evaluated array), one module after the other.

        A module leaves the source when it is done, so that memory holds one at a time.
        """
        modules, layout = self.source.modules, self.source.layout
        for path in list(modules):
            settings = packing_of(self.source, path)
            parts = modules.pop(path)
            arrays, packed = self.convert(path, parts, settings)
            self.tally.read += sum(part.nbytes for part in parts.values())
            del parts  # the last hold on what was read
            self._read(path, arrays)
            for target in self._targets(path):
                written = layout.written(f"{target}.weight").removesuffix(".weight")
                self._count(written, arrays, packed)
                for part, array in arrays.items():
                    name = f"{written}.{part}" if part else layout.written(target)
                    yield name, array

    def _read(self, path: str, arrays: Parts) -> None:
        """Evaluate. Raises: WeightsError where a file has become shorter than its header says."""
        try:
            mx.eval(list(arrays.values()))
        except RuntimeError as error:
            reason = clip(" ".join(str(error).split()), 120)
            raise WeightsError(
                f"{self.source.folder}: {path} cannot be read ({reason}); was the checkpoint"
                " changed meanwhile?"
            ) from error

    def _targets(self, path: str) -> tuple[str, ...]:
        """Where a module goes: the embedding is the head too, where a reader needs one."""
        if path == EMBEDDING_PATH and self.source.tied and self.source.form.head:
            return path, HEAD_PATH
        return (path,)

    def _count(self, written: str, arrays: Parts, packed: Packing | None) -> None:
        self.tally.nbytes += sum(array.nbytes for array in arrays.values())
        for part, array in arrays.items():
            if packed is not None and part in ("scales", "biases"):
                continue
            factor = 32 / packed[1] if packed is not None and part == "weight" else 1
            self.tally.elements += round(array.size * factor)
        if packed is not None:
            self.tally.packed[written] = packed
        elif "weight" in arrays and arrays["weight"].ndim == 2:
            self.tally.kept += 1

    def convert(
        self, path: str, parts: Mapping[str, WeightData], source: Packing | None
    ) -> tuple[Parts, Packing | None]:
        """A module's arrays as they are to be written, lazily, and how the weight is packed.

        Args: source, how it is packed now. A packed module that an adapter touches is packed
        again with the same settings; others that are packed stay as they are.
        """
        arrays = {part: weight.data for part, weight in parts.items()}
        pair = self.adapter.layers.get(path) if self.adapter else None
        target = source
        if source is None and "weight" in arrays:
            target = self.recipe.settings_for(path, tuple(arrays["weight"].shape))
        if self.options.dequantize:
            target = None
        if source is not None and target == source and pair is None:
            return self._cast(arrays), source
        if source is not None:
            arrays = unpacked(arrays, source, self._dtype)
        if pair is not None:
            weight = arrays["weight"]  # merged before it is rounded to another dtype
            merged = merge_into(weight.astype(mx.float32), pair)
            arrays["weight"] = merged.astype(self._dtype or weight.dtype)
        arrays = self._cast(arrays)
        return (pack(arrays, target) if target else arrays), target

    @property
    def _dtype(self) -> mx.Dtype | None:
        """What floats become; None: as they are."""
        return None if self.options.dtype is None else DType[self.options.dtype].to_mx()

    def _cast(self, arrays: Parts) -> Parts:
        dtype = self._dtype
        if dtype is None:
            return arrays
        return {
            part: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
            for part, array in arrays.items()
        }


def unpacked(arrays: Parts, settings: Packing, dtype: mx.Dtype | None) -> Parts:
    """A packed module as floats; dtype None: as `rounding.unpack`."""
    group_size, bits, mode = settings
    weight = unpack(
        arrays["weight"], arrays["scales"], arrays.get("biases"),
        group_size=group_size, bits=bits, mode=mode, dtype=dtype,
    )  # fmt: skip
    kept = {part: array for part, array in arrays.items() if part not in ("scales", "biases")}
    return {**kept, "weight": weight}


def pack(arrays: Parts, settings: Packing) -> Parts:
    """A module of floats, packed."""
    group_size, bits, mode = settings
    made = mx.quantize(arrays["weight"], group_size, bits, mode)
    names = ("weight", "scales", "biases")
    return {**arrays, **dict(zip(names, made, strict=False))}
