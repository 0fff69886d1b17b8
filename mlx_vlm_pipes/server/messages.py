"""/v1/messages: Anthropic's form of a chat, by way of OpenAI's."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_pipes.errors import shown
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.answers import Answers, Question
from mlx_vlm_pipes.server.chat import Chat, Telling, chat_question
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.events import event
from mlx_vlm_pipes.server.fields import OWN, Given, option_values, refuse_unknown, switch
from mlx_vlm_pipes.server.forms import schema_of
from mlx_vlm_pipes.server.settings import ServerSettings
from mlx_vlm_pipes.server.thinking import add_effort, add_thinking
from mlx_vlm_pipes.server.told import Told
from mlx_vlm_pipes.server.tools import forced_calls, manner, read_tools
from mlx_vlm_pipes.speech import Kind, Piece

KNOWN = frozenset({
    "messages", "model", "stream", "system", "tools", "tool_choice", "thinking",
    "output_config", "cache_control", "inference_geo",  # the last two change nothing here
})  # fmt: skip
# What Anthropic's clients call our options.
NAMES = {**{name: name for name in OWN}, "stop_sequences": "stop"}
PROMPT = "messages"
CHOICES = {"auto": "auto", "none": "none", "any": "required"}


def read_messages(
    body: Mapping[str, Any], tokenizer: Tokenizer, settings: ServerSettings
) -> tuple[Question, Telling]:
    """Raises: ApiError 400 naming Anthropic's parameter that is wrong."""
    refuse_unknown(body, KNOWN, NAMES)
    if body.get("max_tokens") is None:
        raise bad_request(
            "max_tokens is missing; expected how long the answer may be", "max_tokens"
        )
    return read_prompt(body, tokenizer, settings)


def read_prompt(
    body: Mapping[str, Any], tokenizer: Tokenizer, settings: ServerSettings
) -> tuple[Question, Telling]:
    """As read_messages, for a request that need not say how long its answer may be."""
    given = option_values(body, NAMES)
    add_thinking(given, body.get("thinking"), "thinking", tokenizer)
    _add_output(given, body, tokenizer)
    chat: dict[str, Any] = {}
    if body.get("tools"):
        chat["tools"] = [_tool(tool) for tool in _list(body["tools"], "tools")]
    if body.get("tool_choice") is not None:
        chat |= _choice(body["tool_choice"])
    tools = read_tools(chat)
    telling = Telling(switch(body, "stream"), manner(tokenizer, tools))
    asked = Chat(_messages(body), PROMPT, tools, forced_calls(chat, tools, tokenizer))
    return chat_question(asked, given, telling, settings), telling


def _add_output(given: Given, body: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """output_config: the form of the answer, and the effort of thinking where that is asked for.

    Raises: ApiError 400 for anything else in it.
    """
    config = body.get("output_config")
    if config is None:
        return
    if not isinstance(config, Mapping) or not config.keys() <= {"format", "effort"}:
        raise bad_request("output_config: expected format and effort", "output_config")
    if config.get("format") is not None:
        given.add("output_config", **schema_of(config["format"], "output_config"))
    thinking = body.get("thinking")
    if isinstance(thinking, Mapping) and thinking.get("type") != "disabled":
        add_effort(given, config.get("effort"), "output_config", tokenizer)


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if body.get("system"):
        out.append({"role": "system", "content": _system(body["system"])})
    for message in _list(body.get("messages"), "messages"):
        if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant"):
            raise bad_request(
                'messages: expected objects with the role "user" or "assistant"', "messages"
            )
        content = message.get("content")
        if isinstance(content, str):
            out.append({"role": message["role"], "content": content})
        else:
            out += _turn(message["role"], _list(content, "messages"))
    return out


def _system(system: Any) -> str:
    if isinstance(system, str):
        return system
    blocks = _list(system, "system")
    if not all(
        isinstance(block, Mapping) and isinstance(block.get("text"), str) for block in blocks
    ):
        raise bad_request("system is no text and no list of text blocks", "system")
    return "\n".join(block["text"] for block in blocks)


def _turn(role: str, blocks: list[Any]) -> list[dict[str, Any]]:
    """One message of blocks: results of tools first, each a message of its own."""
    turn: dict[str, Any] = {"role": role, "content": []}
    results: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            call = {"id": block.get("id"), "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        elif kind == "tool_result":
            content = block.get("content") or ""
            parts = content if isinstance(content, str) else _list(content, "messages")
            told = parts if isinstance(parts, str) else [_part(part) for part in parts]
            results.append(
                {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": told}
            )
        elif kind == "thinking":
            turn["reasoning_content"] = str(block.get("thinking", ""))
        elif kind != "redacted_thinking":
            turn["content"].append(_part(block))
    is_empty = not turn["content"] and "tool_calls" not in turn
    return results if results and is_empty else [*results, turn]


def _part(block: Any) -> dict[str, Any]:
    """A block of text or a picture as OpenAI's part."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": block.get("text")}
    source = block.get("source") if kind in ("image", "document") else None
    if isinstance(source, Mapping):
        if source.get("type") == "text":
            return {"type": "text", "text": source.get("data")}
        if source.get("type") == "base64":
            url = f"data:{source.get('media_type')};base64,{source.get('data')}"
            return {"type": "image_url", "image_url": {"url": url}}
        if source.get("type") == "url":
            return {"type": "image_url", "image_url": {"url": source.get("url")}}
    raise bad_request(
        f"messages: a block of type {shown(kind)}; expected text, image or document (base64 or "
        "url), tool_use or tool_result",
        "messages",
    )


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("input_schema"), Mapping):
        raise bad_request("tools: expected objects with name and input_schema", "tools")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": tool["input_schema"],
    }
    return {"type": "function", "function": function}


def _choice(choice: Any) -> dict[str, Any]:
    """tool_choice and parallel_tool_calls, as a chat has them."""
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind != "tool" and (not isinstance(kind, str) or kind not in CHOICES):
        raise bad_request(
            'tool_choice: expected a type "auto", "any", "tool" or "none"', "tool_choice"
        )
    named = {"type": "function", "function": {"name": choice.get("name")}}
    is_single = choice.get("disable_parallel_tool_use") is True
    return {
        "tool_choice": named if kind == "tool" else CHOICES[kind],
        "parallel_tool_calls": not is_single,
    }


def _list(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list):
        raise bad_request(f"{param} is no list", param)
    return value


@dataclass
class MessageAnswer:
    """The objects of one answer to a client of Anthropic's."""

    model: str
    telling: Telling
    stops: tuple[str, ...]
    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._id = "msg_" + uuid.uuid4().hex
        self._block, self._open = -1, ""

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """A message object."""
        self.told = self.telling.begun(answers)
        (told,) = self.told
        async for _, chunk in answers.pieces():
            told.add(chunk)
        return {
            **self._head(_blocks(told), _usage(told)),
            "stop_reason": self._reason(told),
            "stop_sequence": self._stop(told),
        }

    async def streamed(self, answers: Answers) -> AsyncIterator[bytes]:
        """message_start, the blocks as they come, message_delta, message_stop."""
        self.told = self.telling.begun(answers)
        (told,) = self.told
        prompt = {"input_tokens": len(answers.prompts[0].input_ids), "output_tokens": 0}
        begun = {**self._head([], prompt), "stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message=begun)
        async for _, chunk in answers.pieces():
            for piece in told.add(chunk):
                for part in self._events(told, piece):
                    yield part
        for part in self._close():
            yield part
        ended = {"stop_reason": self._reason(told), "stop_sequence": self._stop(told)}
        yield _event("message_delta", delta=ended, usage=_usage(told))
        yield _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        return event(error_body(error), "error")

    def _events(self, told: Told, piece: Piece) -> list[bytes]:
        """Of a piece: another kind of text, or another call, is another block."""
        if piece.kind is Kind.CALL:
            call = told.calls[piece.call]
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            return [*self._close(), *self._start("tool_use", block)]
        if piece.kind is Kind.ARGUMENTS:
            return [self._delta({"type": "input_json_delta", "partial_json": piece.text})]
        name = "text" if piece.kind is Kind.TEXT else "thinking"
        begun = []
        if self._open != name:
            begun = [*self._close(), *self._start(name, {"type": name, name: ""})]
        return [*begun, self._delta({"type": f"{name}_delta", name: piece.text})]

    def _start(self, name: str, block: dict[str, Any]) -> list[bytes]:
        self._open, self._block = name, self._block + 1
        return [_event("content_block_start", index=self._block, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._block, delta=delta)

    def _close(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = ""
        return [_event("content_block_stop", index=self._block)]

    def _head(self, content: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self.model,
            "content": content, "usage": usage,
        }  # fmt: skip

    def _reason(self, told: Told) -> str:
        if told.reason == "length":
            return "max_tokens"
        if told.calls:
            return "tool_use"
        return "stop_sequence" if self._stop(told) is not None else "end_turn"

    def _stop(self, told: Told) -> str | None:
        return told.stop if told.stop in self.stops else None


def error_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's form around OpenAI's error object."""
    return {"type": "error", **error.body()}


def _blocks(told: Told) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if told.reasoning:
        blocks.append({"type": "thinking", "thinking": told.reasoning, "signature": ""})
    if told.text or not told.calls:
        blocks.append({"type": "text", "text": told.text})
    for call in told.calls:
        block = {"type": "tool_use", "id": call.id, "name": call.name}
        blocks.append({**block, "input": _input(call.arguments)})
    return blocks


def _input(arguments: str) -> Any:
    """The arguments as an object; what was cut off is no JSON and is told as it is."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {"partial_json": arguments}


def _usage(told: Told) -> dict[str, int]:
    usage = told.usage
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0}
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
