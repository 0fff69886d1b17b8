"""Chat messages in one form, and the pictures and clips that belong to them, in order.

Accepted content: a text; or a list of parts, each a text, {"type": "text", "text": ...},
{"type": "image"}, {"type": "image", "image" | "url" | "path" | "base64": source},
{"type": "image_url", "image_url": {"url": ...}}, and the same with video. Parts without a source
take the next of the request's images (videos). Messages without any image part get the request's
images in front of their first user turn, clips after images, as mlx-vlm and the Hugging Face
pipelines do; unless their text already holds as many placeholders as there are images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.errors import InputError, shown
from mlx_vlm_pipes.processing.chat_template import plain
from mlx_vlm_pipes.processing.types import PromptRequest

KINDS = ("image", "video")
SOURCE_KEYS = {
    "image": ("image", "image_url", "input_image", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
}
PART_TYPES = {
    "text": "text", "input_text": "text", "output_text": "text", "image": "image",
    "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
}  # fmt: skip

REASONING = ("reasoning_content", "thinking", "reasoning")  # names for the same, the usual first

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages whose media parts are plain {"type": kind}, and the sources in order."""

    messages: list[Message]
    images: list[Any]
    videos: list[Any]


def conversation(
    request: PromptRequest, markers: Mapping[str, Sequence[str]] | None = None
) -> Conversation:
    """Normalise a request that is not raw.

    Args: markers, by kind, placeholders that a user may have written into the text.
    Raises: InputError for a malformed message, or when pictures and image parts differ in number.
    """
    given = {"image": list(request.images), "video": list(request.videos)}
    messages = _messages(request)
    inline: dict[str, list[Any]] = {"image": [], "video": []}
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [_part(part, inline) for part in message["content"]]
    loose = [kind for kind in KINDS if given[kind] and not inline[kind]]
    written = {kind: _written(messages, (markers or {}).get(kind, ())) for kind in loose}
    front = [kind for kind in loose if written[kind] != len(given[kind])]
    if front:
        parts = [{"type": kind} for kind in front for _ in given[kind]]
        _first_user(messages)["content"][:0] = parts
    sources = {
        kind: given[kind] if kind in loose else _filled(inline[kind], given[kind], kind)
        for kind in KINDS
    }
    return Conversation(messages, sources["image"], sources["video"])


def as_lists(messages: Sequence[Message]) -> list[Message]:
    """The same messages, every text content as a list of one text part."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str)
        else m
        for m in messages
    ]


def as_texts(messages: Sequence[Message], markers: Mapping[str, str]) -> list[Message]:
    """The same messages, list contents joined to one text; markers stand for pictures and clips.

    Contents with a kind that has no marker stay lists.
    """
    out = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list) and all(
            p["type"] == "text" or p["type"] in markers for p in content
        ):
            pieces = [p["text"] if p["type"] == "text" else markers[p["type"]] for p in content]
            message = {**message, "content": "".join(pieces)}
        out.append(message)
    return out


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


def user_texts(messages: Sequence[Message]) -> list[str]:
    """Every text of the user and system turns, stripped; what a template must not lose."""
    found = []
    for message in messages:
        if message["role"] not in ("user", "system"):
            continue
        found += [p if isinstance(p, str) else p.get("text", "") for p in _pieces(message)]
    return [text.strip() for text in found if text.strip()]


def _messages(request: PromptRequest) -> list[Message]:
    if isinstance(request.prompt, str):
        messages = [{"role": "user", "content": [{"type": "text", "text": request.prompt}]}]
    else:
        messages = [_message(m, i) for i, m in enumerate(request.prompt)]
    if not messages:
        raise InputError("the list of messages is empty")
    if request.system is not None:
        if messages[0]["role"] == "system":
            raise InputError("a system prompt is given twice, as an option and as a message")
        text = {"type": "text", "text": request.system}
        messages.insert(0, {"role": "system", "content": [text]})
    return messages


def _message(message: Any, index: int) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {index} is not an object with a text as its role")
    content = message.get("content")
    if isinstance(content, Mapping):
        content = [content]
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise InputError(
            f"message {index}: content is {type(content).__name__}; expected a text or a list"
        )
    if isinstance(content, (list, tuple)):
        content = list(content)
    return {**_with_reasoning(message), "content": "" if content is None else content}


def _with_reasoning(message: Mapping[str, Any]) -> Message:
    """An earlier answer's reasoning under each of the names that templates read.

    Source: transformers utils/chat_template_utils.py, _alias_reasoning_fields.
    """
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if found is None:
        return dict(message)
    return {"thinking": found, **message, "reasoning_content": found}


def _part(part: Any, inline: dict[str, list[Any]]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"a content part is {type(part).__name__}; expected an object or a text")
    named = part.get("type") or next((key for key in PART_TYPES if key in part), None)
    kind = PART_TYPES.get(named) if isinstance(named, str) else None
    if kind is None:
        raise InputError(f"content part of type {shown(named)}; expected text, image or video")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError("a text part carries no text")
        return {"type": "text", "text": part["text"]}
    inline[kind].append(_source(part, kind))
    return {"type": kind}


def _source(part: Mapping[str, Any], kind: str) -> Any:
    for key in SOURCE_KEYS[kind]:
        value = part.get(key)
        if value is None:
            continue
        if isinstance(value, Mapping):
            value = value.get("url")
        return f"data:;base64,{value}" if key == "base64" else value
    return None


def _filled(inline: list[Any], given: list[Any], kind: str) -> list[Any]:
    empty = sum(source is None for source in inline)
    if empty != len(given):
        raise InputError(
            f"{len(given)} {kind}s for {empty} {kind} parts without a source in the messages; "
            "give one for each"
        )
    rest = iter(given)
    return [next(rest) if source is None else source for source in inline]


def _written(messages: Sequence[Message], markers: Sequence[str]) -> int:
    """How many placeholders the messages' texts hold."""
    texts = [p if isinstance(p, str) else p.get("text", "") for m in messages for p in _pieces(m)]
    return sum(text.count(marker) for text in texts for marker in markers)


def _pieces(message: Message) -> list[Any]:
    content = message["content"]
    return [content] if isinstance(content, str) else content


def _first_user(messages: list[Message]) -> Message:
    for message in messages:
        if message["role"] == "user":
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            return message
    raise InputError("images or videos need a user message to stand in")
