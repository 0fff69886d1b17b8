"""Tools of a request, and how the model that is asked calls them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.grammar import JSON_OPTIONS
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.errors import bad_request
from mlx_vlm_pipes.speech import THINK, CallForm, Speech, call_form

MAX_TOOLS = 128
NEWLINE = '"\\n"'


@dataclass(frozen=True)
class Manner:
    """How a model's answers are to be taken apart. calls: the form of its calls, where it was
    given tools; thinks: whether its template knows reasoning."""

    calls: CallForm | None = None
    thinks: bool = False

    def speech(self, prompt: str) -> Speech:
        """For an answer to this prompt, which may have opened the reasoning itself."""
        is_thinking = self.thinks and prompt.rstrip().endswith(THINK)
        return Speech(self.calls, thinks=self.thinks, is_thinking=is_thinking)


def manner(tokenizer: Tokenizer, tools: list[dict[str, Any]]) -> Manner:
    """Raises: ApiError 400 for tools whose calls this server could not read."""
    template = tokenizer.tool_template if tools else tokenizer.chat_template
    source = "" if template is None else template.source
    form = call_form(source) if tools else None
    if tools and form is None:
        raise bad_request(
            "tools: this model's chat template has no form of tool calls that this server reads; "
            "leave them out, or ask a model that was trained to call tools",
            "tools",
        )
    return Manner(form, THINK in source)


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that an answer may call: none where tool_choice is "none".

    Raises: ApiError 400 for tools of other kinds, and for a choice that cannot be promised.
    """
    tools = body.get("tools") or []
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise bad_request(f"tools is no list of at most {MAX_TOOLS} functions", "tools")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise bad_request(
                'tools: expected {"type": "function", "function": {"name": ...}}', "tools"
            )
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise bad_request("tools: the parameters of a function are no JSON schema", "tools")
    choice = body.get("tool_choice")
    if choice is not None and choice != "none" and not tools:
        raise bad_request("tool_choice without tools has no meaning", "tool_choice")
    return [] if choice == "none" else tools


def forced_calls(body: Mapping[str, Any], tools: list[dict[str, Any]], of: Tokenizer) -> str | None:
    """The grammar of an answer that must call a tool, None where it need not.

    Raises: ApiError 400 for a choice that is none, or of a tool that is not there.
    """
    choice, form = body.get("tool_choice"), manner(of, tools).calls
    if choice in (None, "none", "auto") or form is None:
        return None
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        inner = choice.get("function") if isinstance(choice, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise bad_request(
                'tool_choice: expected "auto", "none", "required" or the name of one of the tools',
                "tool_choice",
            )
    is_single = choice != "required" or body.get("parallel_tool_calls") is False
    return call_grammar(form, functions, of.token_id, is_single=is_single)


def call_grammar(
    form: CallForm,
    functions: Sequence[Mapping[str, Any]],
    token_id: Callable[[str], int | None],
    *,
    is_single: bool,
) -> str:
    """A Lark grammar, as llguidance reads it, of one or more calls of these functions.

    token_id: of a special token, which a grammar names by its number.
    """

    def marker(text: str) -> str:
        number = token_id(text) if text in form.tokens else None
        return json.dumps(text) if number is None else f"<[{number}]>"

    def repeated(one: str, between: str) -> str:
        return one if is_single else f"{one} ({between} {one})*"

    if form.named and token_id(form.named) is not None:
        rules = [
            f"call{i}: {marker(form.begin)} {json.dumps(function['name'])} {marker(form.named)} "
            f"arguments{i}\narguments{i}: %json {json.dumps(_parameters(function))}"
            for i, function in enumerate(functions)
        ]
        one = f"({' | '.join(f'call{i}' for i in range(len(functions)))})"
        return "\n".join([f"start: {repeated(one, '')}", *rules])
    key = "parameters" if form.is_bare else "arguments"
    schemas = [_call_schema(function, key) for function in functions]
    call = f"call: %json {json.dumps({'anyOf': schemas, 'x-guidance': JSON_OPTIONS})}"
    if form.named:
        return f'start: {marker(form.begin)} " [" {repeated("call", json.dumps(", "))} "]"\n{call}'
    if form.is_bare:
        return f"start: {repeated('call', json.dumps('; '))}\n{call}"
    around = f"{marker(form.begin)} {NEWLINE} call {NEWLINE} {json.dumps(form.end)}"
    return f"start: {repeated('one', NEWLINE)}\none: {around}\n{call}"


def _call_schema(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The JSON schema of a call of one function."""
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: _parameters(function)},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """A forced call has no arguments but those described."""
    described = function.get("parameters") or {"type": "object", "properties": {}}
    return {"additionalProperties": False, "x-guidance": JSON_OPTIONS, **described}
