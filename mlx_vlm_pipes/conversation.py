"""Conversation: what `pipe.chat()` gives. It remembers its turns, saves and loads them.

Every turn sends the whole history again, of which the engine computes what is new: the prefix
cache holds the earlier turns, answers included, and the picture cache their pictures. Where a chat
template changes earlier turns (some leave out an old answer's thinking), the engine computes from
the first change on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mlx_vlm_pipes.errors import InputError, clip
from mlx_vlm_pipes.given_media import listed, named_media
from mlx_vlm_pipes.options import OPTIONS, GenerateOptions, own_names, read_options, shows, unfit
from mlx_vlm_pipes.paths import user_path, write_whole
from mlx_vlm_pipes.processing.fetch import Access
from mlx_vlm_pipes.processing.keeping import lasting, stored_messages

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from mlx_vlm_pipes.engine.plan import Plan
    from mlx_vlm_pipes.engine.requests import Chunk, ChunkIterator
    from mlx_vlm_pipes.given_media import Media
    from mlx_vlm_pipes.media.records import MediaRecord
    from mlx_vlm_pipes.result import GenerationResult

Message = dict[str, Any]
FORMAT, VERSION = "mlx_vlm_pipes conversation", 1
MAX_FILE_BYTES = 2**30


class Answerer(Protocol):
    """Whoever answers messages: a Pipeline."""

    def generate(
        self,
        prompt: list[Message],
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult: ...
    def stream(
        self,
        prompt: list[Message],
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> ChunkIterator: ...
    def plan(
        self,
        prompt: list[Message],
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> Plan: ...


class Conversation:
    """Turns with a model. For one thread at a time.

    history: the messages so far, as `generate` takes them; it may be read and changed between turns
    (messages of the role `tool`, say, are appended to it). options: what holds for every turn.
    """

    def __init__(self, pipe: Answerer, options: GenerateOptions) -> None:
        given = read_options(options, OPTIONS)
        self.history: list[Message] = []
        self._is_answering = False
        self.system = given.pop("system", None)
        self.options: dict[str, Any] = given
        self._pipe = pipe

    def __repr__(self) -> str:
        return f"Conversation({len(self.history)} messages)"

    @property
    def system(self) -> str | None:
        """The system message; a new one holds from the next turn on, None removes it."""
        first = self.history[0] if self.history else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if not (text is None or isinstance(text, str)):
            raise unfit("system", text, "a text or None")
        self._require_rest()  # the answer brings its own history
        if self.history and self.history[0]["role"] == "system":
            del self.history[0]
        if text is not None:
            self.history.insert(0, {"role": "system", "content": text})

    @shows(OPTIONS)
    def send(
        self,
        text: str | None = None,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> GenerationResult:
        """Say something, and wait for the answer; both are then part of the history.

        text None: answer the history as it stands: what was appended to it, or the last question
        once more, whose answer is replaced. Whatever is raised, the history stays as it was.
        Raises: InputError for anything wrong with the turn; ContextTooLong, OutOfBudget where the
        conversation has outgrown the model or the memory.
        """
        messages, given = self._turn(text, images, videos, options)
        result = self._pipe.generate(messages, **given)
        self._keep(messages, result.text)
        return result

    @shows(OPTIONS)
    def stream(
        self,
        text: str | None = None,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> AnswerStream:
        """As `send`, the answer as it is made.

        An answer that is closed or interrupted part way is kept as far as it came; before its first
        words, or where the request fails, the history stays as it was. Raises: as `send`, at once.
        """
        messages, given = self._turn(text, images, videos, options)
        chunks = self._pipe.stream(messages, **given)
        self._is_answering = True

        def settle(answer: str | None) -> None:
            self._is_answering = False
            if answer is not None:
                self._keep(messages, answer)

        return AnswerStream(chunks, settle)

    def retry(self, **options: Unpack[GenerateOptions]) -> GenerationResult:
        """Answer the last question once more, for instance with another seed: `send(None)`."""
        return self.send(None, **options)

    def plan(
        self,
        text: str | None = None,
        images: Media = (),
        videos: Media = (),
        **options: Unpack[GenerateOptions],
    ) -> Plan:
        """What this turn would need, the whole history included; runs nothing."""
        messages, given = self._turn(text, images, videos, options)
        return self._pipe.plan(messages, **given)

    def undo(self) -> list[Message]:
        """Take the last turn back; returns its messages, the user's first.

        Raises: InputError where there is none.
        """
        self._require_rest()
        asked = [i for i, message in enumerate(self.history) if message["role"] == "user"]
        if not asked:
            raise InputError("nothing to take back; the conversation has no turn yet")
        taken = self.history[asked[-1] :]
        del self.history[asked[-1] :]
        return taken

    def reset(self) -> None:
        """Forget all turns; the system message and the options stay."""
        self._require_rest()
        system = self.system
        self.history.clear()
        self.system = system

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history as JSON, whole or not at all; a file of this name is replaced.

        Pictures stand in it by their absolute path, or as data URLs where they have none. Options
        are not saved. Raises: InputError for what cannot be written.
        """
        try:
            messages = stored_messages(self.history)
            values = {"format": FORMAT, "version": VERSION, "messages": messages}
            text = json.dumps(values, ensure_ascii=False, indent=1).encode()
        except RecursionError:
            raise InputError(f"{clip(path, 200)}: messages too deep to be written") from None
        except UnicodeEncodeError as error:
            raise InputError(f"{clip(path, 200)}: cannot be written ({clip(error)})") from None
        write_whole(path, text)

    def load(self, path: str | os.PathLike[str]) -> Self:
        """Take the history that `save` wrote, its system message too, in place of this one.

        Raises: InputError for a file that is no such thing; the history then stays as it was.
        """
        self._require_rest()
        self.history[:] = _read_messages(path)
        return self

    def _turn(
        self, text: str | None, images: Media, videos: Media, options: Mapping[str, object]
    ) -> tuple[list[Message], Any]:
        """The messages to answer, and the options to answer them with."""
        self._require_rest()
        images, videos, named = named_media(images, videos, options)
        own = own_names(named)
        if "system" in own:
            raise InputError("a turn has no system message of its own; set the conversation's")
        given = read_options({**self.options, **own}, OPTIONS)
        access = Access(given.get("local_files", True), given.get("allow_private", False))
        media = [
            {"type": kind, kind: lasting(source, access)}
            for kind, sources in (("image", images), ("video", videos))
            for source in listed(sources)
        ]
        return self._messages(text, media), given

    def _messages(self, text: str | None, media: list[dict[str, Any]]) -> list[Message]:
        if text is not None and not isinstance(text, str):
            raise unfit("text", text, "a text, or None to answer the history as it stands")
        if text or media:
            parts = [*media, {"type": "text", "text": text}] if text else media
            return [*self.history, {"role": "user", "content": parts if media else text}]
        messages = list(self.history)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if text == "" or not messages or messages[-1]["role"] == "system":
            raise InputError("nothing to answer; give a text, or pictures")
        return messages

    def _keep(self, messages: list[Message], answer: str) -> None:
        # Idefics3 answers begin with a space, which its template writes before earlier ones itself
        self.history[:] = [*messages, {"role": "assistant", "content": answer.lstrip()}]

    def _require_rest(self) -> None:
        if self._is_answering:
            raise InputError("an answer is still being streamed; read it to its end, or close it")


class AnswerStream(Iterator["Chunk"]):
    """The chunks of an answer. Closing or dropping it ends the answer, whose words are kept.

    text: the answer so far. settle: called once, with it, or with None where none is to be kept.
    """

    def __init__(self, chunks: ChunkIterator, settle: Callable[[str | None], None]) -> None:
        self._chunks = chunks
        self._settle: Callable[[str | None], None] | None = settle
        self.text = ""

    @property
    def media(self) -> tuple[MediaRecord, ...]:
        """What the model saw of all pictures and clips of the conversation."""
        return self._chunks.media

    def __next__(self) -> Chunk:
        try:
            chunk = next(self._chunks)
        except (StopIteration, KeyboardInterrupt):
            self.close()
            raise
        except BaseException:
            self._end(None)
            raise
        self.text += chunk.text
        if chunk.finish_reason is not None:
            self._end(self.text)
        return chunk

    def close(self) -> None:
        self._end(self.text if self.text.strip() else None)

    def __del__(self) -> None:
        self.close()

    def _ipython_display_(self) -> None:
        """Show the answer in a cell as it comes; it is then part of the conversation."""
        try:
            self._chunks._ipython_display_()
        finally:
            for _ in self:  # what was shown can be read once more
                pass

    def _end(self, answer: str | None) -> None:
        self._chunks.close()
        settle, self._settle = self._settle, None
        if settle is not None:
            settle(answer)


def _read_messages(path: str | os.PathLike[str]) -> list[Message]:
    file, name = user_path(path), clip(path, 200)
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else clip(error)
        raise InputError(f"{name}: cannot be read ({reason})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise InputError(f"{name}: more than {MAX_FILE_BYTES} bytes; expected a saved conversation")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{name}: no conversation; expected a file that `save` has written")
    if values.get("version") != VERSION:
        raise InputError(
            f"{name}: a conversation of format {clip(values.get('version'))}, this release reads "
            f"{VERSION}; update mlx_vlm_pipes"
        )
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise InputError(f"{name}: damaged; its messages are no list of roles with contents")
    return messages


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if message["role"] == "system" and not isinstance(content, (str, list)):
        return False
    return content is None or isinstance(content, str) or all(map(_is_part, listed(content)))


def _is_part(part: object) -> bool:
    if isinstance(part, dict):
        return all(isinstance(part.get(key, ""), str) for key in ("type", "text"))
    return isinstance(part, str)
