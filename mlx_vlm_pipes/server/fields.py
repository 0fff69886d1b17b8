"""A request's parameters as options of the package; each is judged under the name it came by."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_pipes.errors import InputError, shown
from mlx_vlm_pipes.options import OPTIONS, Option
from mlx_vlm_pipes.server.errors import bad_request

# What the clients call our options. Under its own name every option is taken too.
NAMES = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "seed": "seed",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "min_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
    "adapter": "adapter",
    "fps": "fps",
    "num_frames": "num_frames",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "chat_template_kwargs": "chat_template_kwargs",
    "thinking_budget": "thinking_budget",
    "speculative": "speculative",
    "num_draft_tokens": "num_draft_tokens",
}
# They change nothing of the answer, or nothing that this server does otherwise.
IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip
MAX_N = 128


def option_values(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a body names, by our names; null is as if it were not there.

    Raises: ApiError 400 naming the parameter, for a wrong value and for two names of one option.
    """
    found: dict[str, Any] = {}
    for param, name in NAMES.items():
        value = body.get(param)
        if value is None:
            continue
        if name in found:
            raise bad_request(f"{param} and {name} are the same; give one of them", param)
        found[name] = read(replace(OPTIONS[name], name=param), _plain(param, value))
    return found


def read(option: Option, value: object) -> Any:
    """As `Option.read`. Raises: ApiError 400 naming the parameter."""
    try:
        return option.read(value)
    except InputError as error:
        raise bad_request(str(error), option.name) from None


def switch(body: Mapping[str, Any], param: str) -> bool:
    value = body.get(param)
    return value is not None and read(Option("", name=param, kind=bool), value)


def count(body: Mapping[str, Any], param: str, *, low: int, high: int) -> int | None:
    value = body.get(param)
    if value is None:
        return None
    return read(Option("", name=param, kind=int, low=low, high=high), value)


def refuse_unknown(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises: ApiError 400 for a parameter that would change the answer, had it an effect."""
    for param, value in body.items():
        if param in known or param in NAMES or param in IGNORED or value is None:
            continue
        raise bad_request(f"{shown(param)} is not supported by this server; leave it out", param)


def _plain(param: str, value: Any) -> Any:
    """JSON's keys are texts: token ids of a logit_bias are numbers again."""
    if param != "logit_bias" or not isinstance(value, Mapping):
        return value
    if not all(key.isdecimal() for key in value):
        raise bad_request("logit_bias has keys that are no token ids", param)
    return {int(key): bias for key, bias in value.items()}
