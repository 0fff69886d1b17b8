"""What is particular to an architecture, as data that needs no MLX.

Each room has a `facts.py` with its own `FACTS`; `registry` finds it by the names in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mlx_vlm_pipes.config_limits import Limit
from mlx_vlm_pipes.errors import ConfigError, shown


class Coordinates(Enum):
    """In what a family writes places in a picture, from its upper left corner."""

    FRACTIONS = "fractions of width and height, 0 to 1"
    THOUSANDTHS = "thousandths of width and height, 0 to 1000"
    PIXELS = "pixels of the resized picture"


@dataclass(frozen=True)
class Composite:
    """A model_type whose config.json describes a text part and a vision part.

    text, vision: model_type of a part that names none. fixed: parts that are of that type whatever
    they name (released files often repeat the outer one). defaults: values of keys that a file may
    leave out at the top. flat: a file without a text part has the text's keys at the top.
    Source: `sub_configs_defaults` in transformers' configuration files.
    """

    text: str
    vision: str
    fixed: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    flat: bool = False


@dataclass(frozen=True)
class RoomFacts:
    """What a room adds to what all of them share.

    class_defaults: by model_type, values of keys that a saved configuration may leave out, because
    they equal the default of transformers' class. composites: by outer model_type. connectors:
    beginnings of the canonical names between tower and decoder. limits: of keys of config.json
    that only this architecture has. overrides: keys that `vision_config_overrides` may hold.
    coordinates: in what it was trained to write boxes; FRACTIONS where no source names any.
    """

    class_defaults: Mapping[str, Mapping[str, Any]]
    composites: Mapping[str, Composite] = field(default_factory=dict)
    connectors: tuple[str, ...] = ()
    limits: Mapping[str, Limit] = field(default_factory=dict)
    overrides: Mapping[str, Limit] = field(default_factory=dict)
    coordinates: Coordinates = Coordinates.FRACTIONS

    def check_overrides(self, given: Mapping[str, Any]) -> None:
        """Raises: ConfigError for a key that this architecture does not have, or a bad value."""
        for key, value in given.items():
            if key not in self.overrides:
                known = ", ".join(self.overrides) or "none"
                raise ConfigError(
                    f"vision_config_overrides: {key!r}; this architecture knows {known}"
                )
            limit = self.overrides[key]
            if not limit.holds(value):
                raise ConfigError(
                    f"vision_config_overrides: {key!r} is {shown(value)}, expected {limit.expected}"
                )


NO_FACTS = RoomFacts({})
