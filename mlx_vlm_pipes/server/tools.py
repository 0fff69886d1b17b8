"""Tools of a request, and how the model that is asked calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.errors import bad_request
from mlx_vlm_pipes.speech import THINK, CallForm, Speech, call_form

MAX_TOOLS = 128


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
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise bad_request('tool_choice: this server takes "auto" and "none"', "tool_choice")
    if choice == "auto" and not tools:
        raise bad_request("tool_choice without tools has no meaning", "tool_choice")
    return [] if choice == "none" else tools
