"""A request's parameters as options of the package; each is judged under the name it came by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_vlm_pipes.errors import InputError, shown
from mlx_vlm_pipes.options import OPTIONS, Option
from mlx_vlm_pipes.server.errors import bad_request

# Options that every dialect takes, under their own names; each dialect adds its names for some.
OWN = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
    "min_tokens", "ignore_eos", "adapter", "fps", "num_frames", "min_pixels", "max_pixels",
    "chat_template_kwargs", "thinking_budget", "speculative",
    "num_draft_tokens",
)  # fmt: skip
NAMES = {**{name: name for name in OWN}, "max_completion_tokens": "max_tokens"}
# They change nothing of the answer, or nothing that this server does otherwise.
IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip
MAX_N = 128


@dataclass
class Given:
    """Options of a request. values: by our names; params: what the request calls each of them."""

    values: dict[str, Any] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)

    def add(self, param: str, **values: Any) -> None:
        """What one more parameter means; what was said under an option's own name stands."""
        for name, value in values.items():
            if name not in self.values:
                self.values[name], self.params[name] = value, param
            elif isinstance(value, dict):
                self.values[name] = {**value, **self.values[name]}


def option_values(body: Mapping[str, Any], names: Mapping[str, str] = NAMES) -> Given:
    """The options that a body names; null is as if it were not there.

    names: of a dialect, parameter -> option. Raises: ApiError 400 naming the parameter, for a wrong
    value and for two names of one option.
    """
    found = Given()
    for param, name in names.items():
        value = body.get(param)
        if value is None:
            continue
        if name in found.values:
            raise bad_request(f"{param} and {name} are the same; give one of them", param)
        found.add(param, **{name: read(replace(OPTIONS[name], name=param), _plain(param, value))})
    return found


def read(option: Option, value: object) -> Any:
    """As `Option.read`. Raises: ApiError 400 naming the parameter."""
    try:
        return option.read(value)
    except InputError as error:
        raise bad_request(str(error), option.name) from None


def switch(body: Mapping[str, Any], param: str) -> bool:
    """A parameter that is true or false; false where it is not given. Raises: as `read`."""
    value = body.get(param)
    return value is not None and read(Option("", name=param, kind=bool), value)


def count(body: Mapping[str, Any], param: str, *, low: int, high: int) -> int | None:
    """A whole number within bounds; None where it is not given. Raises: as `read`."""
    value = body.get(param)
    if value is None:
        return None
    return read(Option("", name=param, kind=int, low=low, high=high), value)


def refuse_unknown(
    body: Mapping[str, Any], known: Collection[str], names: Collection[str] = NAMES
) -> None:
    """Raises: ApiError 400 for a parameter that would change the answer, had it an effect.

    known: what a dialect reads beside options; names: those of options.
    """
    for param, value in body.items():
        if param in known or param in names or param in IGNORED or value is None:
            continue
        raise bad_request(f"{shown(param)} is not supported by this server; leave it out", param)


def _plain(param: str, value: Any) -> Any:
    """JSON's keys are texts: token ids of a logit_bias are numbers again."""
    if param != "logit_bias" or not isinstance(value, Mapping):
        return value
    if not all(key.isdecimal() for key in value):
        raise bad_request("logit_bias has keys that are no token ids", param)
    return {int(key): bias for key, bias in value.items()}
