"""Chat messages in one form, and the pictures and clips that belong to them, in order.

Accepted content: a text; or a list of parts, each a text, {"type": "text", "text": ...},
{"type": "image"}, {"type": "image", "image" | "url" | "path" | "base64": source},
{"type": "image_url", "image_url": {"url": ...}}, and the same with video; Anthropic's
{"type": "image", "source": {"type": "base64" | "url", ...}}; a document or file, which is a PDF,
as so many pictures as it has pages. Parts without a source take the next of the request's images
(videos). Messages without any image part get the request's
images in front of their first user turn, clips after images, as mlx-vlm and the Hugging Face
pipelines do; unless their text already holds as many placeholders as there are images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_pipes.errors import InputError, clip, shown
from mlx_vlm_pipes.processing.fetch import Access
from mlx_vlm_pipes.processing.pages import spread
from mlx_vlm_pipes.processing.types import PromptRequest

KINDS = ("image", "video")
SOURCE_KEYS = {
    "image": (
        "image", "image_url", "input_image", "url", "path", "base64", "source", "file",
        "file_data", "file_url",
    ),
    "video": ("video", "video_url", "url", "path", "base64"),
}  # fmt: skip
PART_TYPES = {
    "text": "text", "input_text": "text", "output_text": "text", "image": "image",
    "image_url": "image", "input_image": "image", "video": "video", "video_url": "video",
    "document": "image", "file": "image", "input_file": "image",
}  # fmt: skip

REASONING = ("reasoning_content", "thinking", "reasoning")  # names for the same, the usual first

Message = dict[str, Any]


@dataclass
class MediaPart:
    """A picture, a clip or a document in a message; sources: None where it has yet to be given."""

    kind: str
    sources: list[Any] | None


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
    Raises: InputError for a malformed message, or when pictures and image parts differ in number;
    MediaError for a document whose pages cannot be counted.
    """
    given = {
        "image": [spread(source, request.access) for source in request.images],
        "video": [[clip] for clip in request.videos],
    }
    messages = _messages(request)
    parts: dict[str, list[MediaPart]] = {"image": [], "video": []}
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [_part(part, request.access) for part in message["content"]]
            for part in message["content"]:
                if isinstance(part, MediaPart):
                    parts[part.kind].append(part)
    loose = [kind for kind in KINDS if given[kind] and not parts[kind]]
    sources = {kind: [source for sources in given[kind] for source in sources] for kind in loose}
    for kind in KINDS:
        if kind not in loose:
            sources[kind] = _filled(parts[kind], given[kind], kind)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [p for part in message["content"] for p in _plain(part)]
    written = {kind: _written(messages, (markers or {}).get(kind, ())) for kind in loose}
    front = [kind for kind in loose if written[kind] != len(sources[kind])]
    if front:
        parts_before = [{"type": kind} for kind in front for _ in sources[kind]]
        _first_user(messages)["content"][:0] = parts_before
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


def require_shown(
    messages: Sequence[Message], text: str, markers: Mapping[str, Sequence[str]]
) -> None:
    """Raises: InputError where the template leaves out pictures of tools' results and the like."""
    for kind in KINDS:
        roles = [
            message["role"]
            for message in messages
            for part in _pieces(message)
            if not isinstance(part, str) and part["type"] == kind
        ]
        others = sorted({*roles} - {"user"})
        if others and sum(text.count(marker) for marker in markers.get(kind, ())) < len(roles):
            raise InputError(
                f"this model's chat template shows no {kind}s in messages of the role "
                f"{clip(others[0])}; put them into a message of the user"
            )


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
    if isinstance(message, str):
        raise InputError(
            f"message {index} is a text; several prompts are for generate_batch, a message is "
            '{"role": "user", "content": ...}'
        )
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


def _part(part: Any, access: Access) -> MediaPart | dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part_kind(part)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError("a text part carries no text")
        return {"type": "text", "text": part["text"]}
    source = part_source(part, kind)
    if source is None:
        return MediaPart(kind, None)
    return MediaPart(kind, spread(source, access) if kind == "image" else [source])


def part_kind(part: Any) -> str:
    """ "text", "image" or "video". Raises: InputError for anything else."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise InputError(f"a content part is {type(part).__name__}; expected an object or a text")
    named = part.get("type") or next((key for key in PART_TYPES if key in part), None)
    kind = PART_TYPES.get(named) if isinstance(named, str) else None
    if kind is None:
        raise InputError(f"content part of type {shown(named)}; expected text, image or video")
    return kind


def part_source(part: Mapping[str, Any], kind: str) -> Any:
    """Where a picture or clip is to be had, None where its part does not say.

    Raises: InputError where it says nothing that can be reached.
    """
    for key in SOURCE_KEYS[kind]:
        value = part.get(key)
        if value is None:
            continue
        if isinstance(value, Mapping):
            return _inner_source(value, key)
        if key == "file_data":
            return _file_data(value)
        return f"data:;base64,{value}" if key == "base64" else value
    return None


def _inner_source(value: Mapping[str, Any], key: str) -> Any:
    """What {"url": ...} and {"file_data": ...} of OpenAI's API name, or a `source` of Anthropic's.

    Raises: InputError where nothing is there that can be reached.
    """
    if value.get("type") == "base64":
        return f"data:{value.get('media_type', '')};base64,{value.get('data')}"
    source = next((value[k] for k in ("url", "file_data") if value.get(k) is not None), None)
    if source is None:
        raise InputError(f"a part's {key} has {shown(list(value))}; expected a url, or base64 data")
    return _file_data(source) if value.get("url") is None else source


def _file_data(source: Any) -> Any:
    """OpenAI's file_data, a data: URL or, as its reference says, base64 alone."""
    is_bare = isinstance(source, str) and source[:5].lower() != "data:"
    return f"data:;base64,{source}" if is_bare else source


def _filled(parts: Sequence[MediaPart], given: Sequence[list[Any]], kind: str) -> list[Any]:
    """All sources in order, after parts without one have taken those that were given.

    A document is for one part, or each of its pages is.
    """
    empty = [part for part in parts if part.sources is None]
    pages = [[source] for sources in given for source in sources]
    groups = given if len(given) == len(empty) else pages
    if len(empty) != len(groups):
        raise InputError(
            f"{len(pages)} {kind}s for {len(empty)} {kind} parts without a source in the messages; "
            "give one for each"
        )
    for part, sources in zip(empty, groups, strict=True):
        part.sources = sources
    return [source for part in parts for source in part.sources or ()]


def _plain(part: MediaPart | dict[str, Any]) -> list[dict[str, Any]]:
    """A part as templates take it; a document as many parts as it has pages."""
    if isinstance(part, dict):
        return [part]
    return [{"type": part.kind} for _ in part.sources or ()]


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
