"""A checkpoint's tensors under our names, with all that the files say about their packing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.quantization import QuantConfig, QuantizationConfig
from mlx_vlm_pipes.weights import (
    Layout,
    LoRAAdapter,
    ScaledFormat,
    WeightData,
    parse_quantization,
    record_scales,
)

LANGUAGE = "language_model."
VISION = "vision_model."


@dataclass(frozen=True)
class ScaledTensors:
    """The scaled floats of a checkpoint before they were expanded, under canonical names."""

    format: ScaledFormat
    stored: Mapping[str, WeightData]  # shapes and dtypes only; the data are never read

    def within(self, prefix: str) -> ScaledTensors:
        """Those below a prefix, named relative to it."""
        kept = {k.removeprefix(prefix): v for k, v in self.stored.items() if k.startswith(prefix)}
        return ScaledTensors(self.format, kept)

    def without(self, prefix: str) -> ScaledTensors:
        kept = {k: v for k, v in self.stored.items() if not k.startswith(prefix)}
        return ScaledTensors(self.format, kept)


class StateDict(dict[str, WeightData]):
    """Tensors by canonical name (relative to `prefix`), and what the files say beside them.

    quantization: how the packed ones are packed, overrides under canonical names. loras: adapters
    to load with them. layout: how the files name them, None where a user's adapter renamed them.
    """

    def __init__(
        self,
        tensors: Mapping[str, WeightData],
        quantization: QuantizationConfig | None = None,
        *,
        loras: Sequence[LoRAAdapter] = (),
        scaled: ScaledTensors | None = None,
        layout: Layout | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(tensors)
        self.quantization = quantization
        self.loras = loras
        self.scaled = scaled  # None where nothing was scaled
        self.layout = layout
        self.prefix = prefix

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: weight.shape for name, weight in self.items()}

    def keep(self, names: Collection[str]) -> None:
        """Forget all tensors but these."""
        for name in [name for name in self if name not in names]:
            del self[name]

    def below(self, prefix: str) -> StateDict:
        """The tensors below a prefix, named relative to it."""
        return StateDict(
            {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)},
            self.quantization,
            loras=self.loras,
            scaled=None if self.scaled is None else self.scaled.within(prefix),
            layout=self.layout,
            prefix=self.prefix + prefix,
        )

    def without(self, prefix: str) -> StateDict:
        """The tensors that are not below `prefix`, names unchanged."""
        return StateDict(
            {k: v for k, v in self.items() if not k.startswith(prefix)},
            self.quantization,
            loras=self.loras,
            scaled=None if self.scaled is None else self.scaled.without(prefix),
            layout=self.layout,
            prefix=self.prefix,
        )


def below(state: Mapping[str, WeightData], prefix: str) -> StateDict:
    """The tensors below a prefix, named relative to it."""
    return (state if isinstance(state, StateDict) else StateDict(state)).below(prefix)


def tower_state(state: StateDict, prefix: str) -> StateDict:
    """The vision tower's tensors, named as its modules name them; prefix may be empty."""
    return below(state, prefix) if prefix else state.without(LANGUAGE)


def expanded_scales(huggingface_config: Any, state: Mapping[str, WeightData]) -> QuantConfig | None:
    """The record of scaled floats, from what loading expanded or from a raw state dict.

    Covers the tensors of `state` only: text and vision have a record each.
    Raises: UnsupportedModel for a quantisation method that is not read.
    """
    if isinstance(state, StateDict):
        scaled = state.scaled
        return None if scaled is None else record_scales(scaled.stored, scaled.format)
    declared = parse_quantization(config_dict(huggingface_config))
    return record_scales(state, declared) if isinstance(declared, ScaledFormat) else None


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration object as plain data; transformers' own classes have to_dict as well."""
    return config.to_dict() if config is not None else {}


def stored_dtype(state_dict: Mapping[str, WeightData], module: str) -> DType:
    """The dtype of a module's weight, of its scales where the weight is packed.

    module: path below any prefix. Raises: ConfigError when no tensor has that name.
    """
    for name in (f"{module}.scales", f"{module}.weight"):
        for key, weight in state_dict.items():
            if key == name or key.endswith("." + name):
                return weight.dtype
    raise ConfigError(f"the weights have no {module}.weight; its dtype decides the model's")
