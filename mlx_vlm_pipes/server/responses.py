"""/v1/responses: OpenAI's newer form of a chat, with answers that later requests go on from."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_pipes.errors import shown
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.server.answers import Answers, Question
from mlx_vlm_pipes.server.chat import Chat, Telling, chat_question
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.events import event
from mlx_vlm_pipes.server.fields import OWN, option_values, refuse_unknown, switch
from mlx_vlm_pipes.server.forms import schema_of
from mlx_vlm_pipes.server.settings import ServerSettings
from mlx_vlm_pipes.server.thinking import add_effort
from mlx_vlm_pipes.server.told import Told
from mlx_vlm_pipes.server.tools import forced_calls, manner, read_tools
from mlx_vlm_pipes.speech import Kind, Piece

KNOWN = frozenset({
    "input", "model", "stream", "instructions", "previous_response_id", "text", "tools",
    "tool_choice", "truncation", "background", "include", "reasoning", "stream_options",
})  # fmt: skip
# What OpenAI's clients call our options here.
NAMES = {**{name: name for name in OWN}, "max_output_tokens": "max_tokens"}
PROMPT = "input"
MAX_STORED, MAX_STORED_CHARACTERS = 1000, 64 * 2**20
Messages = list[dict[str, Any]]


class Store:
    """Answers that may be gone on from, the oldest forgotten first: in memory, bounded."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Messages, dict[str, Any], int]] = OrderedDict()
        self._size = 0

    def add(self, messages: Messages, response: dict[str, Any]) -> None:
        """Keep the messages of a conversation, the answer's own among them."""
        size = _size(messages)
        if size > MAX_STORED_CHARACTERS:
            return
        self._kept[response["id"]] = (messages, response, size)
        self._size += size
        while len(self._kept) > MAX_STORED or self._size > MAX_STORED_CHARACTERS:
            _, (_, _, gone) = self._kept.popitem(last=False)
            self._size -= gone

    def messages(self, name: str, param: str) -> Messages:
        return self._find(name, param)[0]

    def response(self, name: str) -> dict[str, Any]:
        return self._find(name, None)[1]

    def forget(self, name: str) -> None:
        self._size -= self._find(name, None)[2]
        del self._kept[name]

    def _find(self, name: str, param: str | None) -> tuple[Messages, dict[str, Any], int]:
        if name not in self._kept:
            message = f"no response {shown(name)} is kept here"
            raise ApiError(404, message, param, "response_not_found")
        return self._kept[name]


def read_response(
    body: Mapping[str, Any], store: Store, tokenizer: Tokenizer, settings: ServerSettings
) -> tuple[Question, Telling, Messages]:
    """The question, how it is told, and its messages without the instructions.

    Raises: ApiError 400 naming the parameter that is wrong, 404 for a previous response that is
    not kept.
    """
    refuse_unknown(body, KNOWN, NAMES)
    _refuse_modes(body)
    messages = []
    if body.get("previous_response_id") is not None:
        messages = list(store.messages(str(body["previous_response_id"]), "previous_response_id"))
    messages += _items(body.get("input"))
    given = option_values(body, NAMES)
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise bad_request("instructions is no text", "instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    text = body.get("text")
    format = text.get("format") if isinstance(text, Mapping) else text
    if format is not None:
        given.add("text", **schema_of(format, "text"))
    add_effort(given, _effort(body), "reasoning", tokenizer)
    chat = _tools(body)
    tools = read_tools(chat)
    telling = Telling(switch(body, "stream"), manner(tokenizer, tools))
    forced = forced_calls(chat, tools, tokenizer)
    asked = Chat([*system, *messages], PROMPT, tools, forced)
    return chat_question(asked, given, telling, settings), telling, messages


def _refuse_modes(body: Mapping[str, Any]) -> None:
    """Raises: ApiError 400 for what would change the answer and is not done here."""
    if body.get("truncation") not in (None, "disabled"):
        raise bad_request("truncation: nothing is cut off here; send less", "truncation")
    if switch(body, "background"):
        raise bad_request("background: answers are waited for here", "background")
    if body.get("include"):
        raise bad_request("include: there is nothing more to tell", "include")


def _effort(body: Mapping[str, Any]) -> Any:
    """reasoning.effort. Raises: ApiError 400 for a summary: the reasoning itself is told."""
    reasoning = body.get("reasoning")
    if reasoning is None:
        return None
    if not isinstance(reasoning, Mapping):
        raise bad_request("reasoning is no object with an effort", "reasoning")
    for name, value in reasoning.items():
        if name != "effort" and value not in (None, "auto"):
            message = f"reasoning: {shown(name)} is not done here; reasoning is told as it is"
            raise bad_request(message, "reasoning")
    return reasoning.get("effort")


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """tools and tool_choice as a chat has them."""
    chat: dict[str, Any] = {}
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise bad_request("tools is no list", "tools")
    if tools:
        for tool in tools:
            if not isinstance(tool, Mapping) or tool.get("type") != "function":
                raise bad_request("tools: this server knows functions only", "tools")
        names = ("name", "description", "parameters")
        functions = [{name: tool[name] for name in names if name in tool} for tool in tools]
        chat["tools"] = [{"type": "function", "function": function} for function in functions]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and "name" in choice:
        choice = {"type": "function", "function": {"name": choice["name"]}}
    if choice is not None and (tools or choice != "auto"):
        chat["tool_choice"] = choice
    return {**chat, "parallel_tool_calls": body.get("parallel_tool_calls")}


def _items(given: Any) -> Messages:
    """The items of an input as messages of a chat."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise bad_request("input is no text and no list of items", PROMPT)
    messages: Messages = []
    for item in given:
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1].get("tool_calls"):
                messages[-1]["tool_calls"].append(call)  # calls of one turn
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            content, call_id = _content(item.get("output")), item.get("call_id")
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        elif kind != "reasoning":
            raise bad_request(f"input: an item of type {shown(kind)} is not known here", PROMPT)
    return messages


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [_part(part) for part in content]


def _part(part: Any) -> Any:
    if isinstance(part, Mapping) and part.get("type") == "input_image":
        if not isinstance(part.get("image_url"), str):
            raise bad_request("input: an input_image carries no image_url", PROMPT)
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return part


@dataclass
class ResponseAnswer:
    """The objects of one answer, and what is kept of it."""

    model: str
    telling: Telling
    body: Mapping[str, Any]
    messages: Messages
    store: Store
    told: list[Told] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._id, self._created = "resp_" + uuid.uuid4().hex, int(time.time())
        self._sequence = -1
        self._items: list[dict[str, Any]] = []

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """A response object."""
        self.told = self.telling.begun(answers)
        (told,) = self.told
        async for _, chunk in answers.pieces():
            for piece in told.add(chunk):
                for _ in self._events(told, piece):
                    pass  # builds the items
        for _ in self._close():
            pass
        return self._finished(told)

    async def streamed(self, answers: Answers) -> AsyncIterator[bytes]:
        """response.created, the items as they come, response.completed or .incomplete."""
        self.told = self.telling.begun(answers)
        (told,) = self.told
        yield self._event("response.created", response=self._head("in_progress"))
        yield self._event("response.in_progress", response=self._head("in_progress"))
        async for _, chunk in answers.pieces():
            for piece in told.add(chunk):
                for part in self._events(told, piece):
                    yield part
        for part in self._close():
            yield part
        done = self._finished(told)
        yield self._event(f"response.{done['status']}", response=done)

    def failed(self, error: ApiError) -> bytes:
        told = error.body()["error"]
        told["type"] = "error"
        return self._event("error", **{k: v for k, v in told.items() if k != "type"})

    def _finished(self, told: Told) -> dict[str, Any]:
        """The whole response; kept, unless the request said not to."""
        cut = told.reason == "length"
        done = {
            **self._head("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._items,
            "usage": _usage(told),
        }
        if self.body.get("store") is not False:
            self.store.add([*self.messages, _message(told)], done)
        return done

    def _events(self, told: Told, piece: Piece) -> list[bytes]:
        if piece.kind is Kind.CALL:
            call = told.calls[piece.call]
            item = {
                "type": "function_call", "id": "fc_" + uuid.uuid4().hex, "call_id": call.id,
                "name": call.name, "arguments": "", "status": "in_progress",
            }  # fmt: skip
            return [*self._close(), *self._start(item)]
        if piece.kind is Kind.ARGUMENTS:
            item = self._items[-1]
            item["arguments"] += piece.text
            return [self._delta("function_call_arguments.delta", piece.text)]
        kind = "message" if piece.kind is Kind.TEXT else "reasoning"
        begun: list[bytes] = []
        if not self._items or self._items[-1]["type"] != kind or self._is_closed:
            begun = [*self._close(), *self._start(_new_item(kind)), *self._start_part(kind)]
        item = self._items[-1]
        item["content"][0]["text"] += piece.text
        name = "output_text.delta" if kind == "message" else "reasoning_text.delta"
        return [*begun, self._delta(name, piece.text, content_index=0)]

    @property
    def _is_closed(self) -> bool:
        return not self._items or self._items[-1].get("status") == "completed"

    def _start(self, item: dict[str, Any]) -> list[bytes]:
        self._items.append(item)
        place = len(self._items) - 1
        bare = {**item, "content": []} if "content" in item else dict(item)
        return [self._event("response.output_item.added", output_index=place, item=bare)]

    def _start_part(self, kind: str) -> list[bytes]:
        if kind != "message":
            return []
        return [self._part_event("response.content_part.added", _text_part(""))]

    def _close(self) -> list[bytes]:
        """The closing events of the item that is open."""
        if self._is_closed:
            return []
        item = self._items[-1]
        item["status"] = "completed"
        place = len(self._items) - 1
        events = []
        if item["type"] == "message":
            text = item["content"][0]["text"]
            events.append(
                self._delta("output_text.done", text, "text", content_index=0, logprobs=[])
            )
            events.append(self._part_event("response.content_part.done", _text_part(text)))
        elif item["type"] == "reasoning":
            text = item["content"][0]["text"]
            events.append(self._delta("reasoning_text.done", text, "text", content_index=0))
        else:
            events.append(
                self._delta("function_call_arguments.done", item["arguments"], "arguments")
            )
        done = self._event("response.output_item.done", output_index=place, item=dict(item))
        return [*events, done]

    def _part_event(self, kind: str, part: dict[str, Any]) -> bytes:
        place = len(self._items) - 1
        return self._event(
            kind, output_index=place, item_id=self._items[place]["id"], content_index=0, part=part
        )

    def _delta(self, kind: str, text: str, name: str = "delta", **more: Any) -> bytes:
        place = len(self._items) - 1
        item = self._items[place]["id"]
        fields = {"output_index": place, "item_id": item, name: text, **more}
        if kind == "output_text.delta":
            fields["logprobs"] = []
        return self._event(f"response.{kind}", **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return event({"type": kind, "sequence_number": self._sequence, **fields}, kind)

    def _head(self, status: str) -> dict[str, Any]:
        """What every response object holds; the request's own values where it named some."""
        body = self.body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": body.get("previous_response_id"),
            "store": body.get("store") is not False,
            "temperature": body.get("temperature"),
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p"),
            "truncation": "disabled",
            "usage": None,
        }


def _new_item(kind: str) -> dict[str, Any]:
    if kind == "message":
        return {
            "type": "message", "id": "msg_" + uuid.uuid4().hex, "role": "assistant",
            "status": "in_progress", "content": [_text_part("")],
        }  # fmt: skip
    return {
        "type": "reasoning", "id": "rs_" + uuid.uuid4().hex, "summary": [],
        "status": "in_progress", "content": [{"type": "reasoning_text", "text": ""}],
    }  # fmt: skip


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(told: Told) -> dict[str, Any]:
    """The answer as a turn of the conversation that goes on."""
    message: dict[str, Any] = {"role": "assistant", "content": told.text}
    if told.reasoning:
        message["reasoning_content"] = told.reasoning
    if told.calls:
        message["tool_calls"] = [call.as_dict() for call in told.calls]
    return message


def _usage(told: Told) -> dict[str, Any] | None:
    usage = told.usage
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _size(value: Any) -> int:
    """Characters that a JSON value holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _size(item) for key, item in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 8
