"""Calls of tools in the history of a conversation, in the forms that chat templates want."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_vlm_pipes.processing.chat_template import plain
from mlx_vlm_pipes.processing.messages import Message


def tool_call_forms(messages: Sequence[Message]) -> list[list[Message]]:
    """The same messages, the arguments of tool calls first as objects, then as JSON texts.

    OpenAI's API gives them as texts, most templates want objects and print them as JSON. One form,
    as it is, where there are no arguments.
    """
    if not any(isinstance(m.get("tool_calls"), (list, tuple)) for m in messages):
        return [list(messages)]
    return [[_with_arguments(m, change) for m in messages] for change in (_as_object, _as_json)]


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message
    return {**message, "tool_calls": [_call(call, change) for call in calls]}


def _call(call: Any, change: Callable[[Any], Any]) -> Any:
    """A call as OpenAI writes it, {"function": {"name", "arguments"}}, or its inner part alone."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments  # what a model wrote need not be JSON
    return value if isinstance(value, dict) else arguments


def _as_json(arguments: Any) -> Any:
    if not isinstance(arguments, Mapping):
        return arguments
    return json.dumps(plain(arguments), ensure_ascii=False)
