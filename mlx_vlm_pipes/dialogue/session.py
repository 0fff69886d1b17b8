"""A conversation in the terminal: answers on standard output, everything else on standard error."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.arguments import figures_lines
from mlx_vlm_pipes.command import INTERRUPTED, USER_MISTAKE, put, say
from mlx_vlm_pipes.dialogue.dropped import (
    dropped_files,
    first_word,
    is_clip,
    is_media,
    leading_files,
)
from mlx_vlm_pipes.display.view import shown_answer
from mlx_vlm_pipes.errors import ContextTooLong, InputError, OutOfBudget, PipesError, clip
from mlx_vlm_pipes.options import PROMPT_OPTIONS, among
from mlx_vlm_pipes.paths import user_path
from mlx_vlm_pipes.processing.fetch import Access, is_url
from mlx_vlm_pipes.processing.images import describe
from mlx_vlm_pipes.processing.keeping import lasting

if TYPE_CHECKING:
    from mlx_vlm_pipes.conversation import AnswerStream, Conversation
    from mlx_vlm_pipes.dialogue.lines import Lines
    from mlx_vlm_pipes.engine.requests import Chunk
    from mlx_vlm_pipes.media.records import MediaRecord
    from mlx_vlm_pipes.pipeline import Pipeline

ALMOST_FULL = 0.9  # of what the model holds
COMMANDS = {
    "/image": ("PATH ...", "pictures for the next message, which may follow them"),
    "/video": ("PATH ...", "clips: a film, an animation or a folder of frames"),
    "/system": ("TEXT", "the system message from now on; - for none"),
    "/undo": ("", "take back the pictures that wait, else the last turn"),
    "/retry": ("", "answer the last message once more"),
    "/reset": ("", "begin anew"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/load": ("FILE", "go on with one that was saved"),
    "/history": ("", "show the conversation"),
    "/plan": ("TEXT", "what a message would take; runs nothing"),
    "/show": ("FILE.png", "write what the model saw, or would see of what waits"),
    "/stats": ("", "tokens, speed and memory of the last answer"),
    "/help": ("", "this list"),
    "/exit": ("", "leave; as Ctrl-D"),
}
HINTS = """\
Drag pictures or clips into the line, or paste their paths, with words or alone.
A backslash at the end continues a line; \"\"\" begins and ends several lines.
Ctrl-C stops an answer and keeps what was said; twice at the prompt it leaves."""


@dataclass(frozen=True)
class Attachment:
    """A picture or clip for the next message. kind: "image" or "video"."""

    kind: str
    source: Any


class Session:
    """What a line typed by the user does. has_limit: whether --max-length made the model's own."""

    def __init__(
        self, pipe: Pipeline, chat: Conversation, lines: Lines, *, has_limit: bool
    ) -> None:
        self._pipe, self._chat, self._lines, self._has_limit = pipe, chat, lines, has_limit
        self._waiting: list[Attachment] = []
        self._last: Chunk | None = None
        self._seen: tuple[str, Sequence[MediaRecord]] = "", ()  # the last answer, and its media
        self._had_mistake = False
        self._runs: dict[str, Callable[[str], object]] = {
            "/image": lambda rest: self._attach_named("image", rest),
            "/video": lambda rest: self._attach_named("video", rest),
            "/system": self._system,
            "/undo": self._undo,
            "/retry": lambda _: self._answer(None),
            "/reset": self._reset,
            "/save": self._save,
            "/load": self.load,
            "/history": self._history,
            "/plan": self._plan,
            "/show": self._show,
            "/stats": self._stats,
            "/help": self._help,
        }

    @property
    def has_answered(self) -> bool:
        """Whether an answer was given to its end."""
        return self._last is not None

    def run(self) -> int:
        """Read messages until the user leaves.

        Returns: 0; 130 after Ctrl-C twice, and where the input is no terminal 2 if anything in it
        was refused. Raises: KeyboardInterrupt where the input is no terminal.
        """
        was_interrupted = False
        while True:
            try:
                text = self._lines.read(self._sign())
            except KeyboardInterrupt:
                if not self._lines.is_terminal:
                    raise
                if was_interrupted:
                    say("")
                    return INTERRUPTED
                was_interrupted = True
                say("\nCtrl-C once more, or Ctrl-D, leaves")
                continue
            was_interrupted = False
            if text is None or text.strip() in ("/exit", "/quit"):
                return USER_MISTAKE if self._had_mistake and not self._lines.is_terminal else 0
            self._take_safely(text)

    def attach(self, kind: str, sources: Sequence[Any]) -> None:
        """Keep pictures or clips for the next message, all or none, and say what they are to the
        model. Raises: PipesError where one cannot be read, or the model takes none.
        """
        options = self._chat.options
        reading = among(options, PROMPT_OPTIONS)
        access = Access(allow_private=options.get("allow_private", False))
        added = [Attachment(kind, lasting(source, access)) for source in sources]
        for one, source in zip(added, sources, strict=True):
            media = {f"{kind}s": [one.source]}
            for record in self._pipe.encode("", **media, **reading).media:
                width, height = record.source_size
                frames = f", {record.num_frames} frames" if kind == "video" else ""
                name = os.path.basename(str(source)) if not is_url(str(source)) else source
                say(f"{clip(name)}: {width}x{height}{frames}, {record.num_tokens} tokens")
        self._waiting += added

    def load(self, name: str) -> None:
        self._chat.load(_file_name(name, "/load FILE"))
        self._waiting.clear()
        say(f"{self._described()}; /history shows it")

    def _take_safely(self, text: str) -> None:
        """Do what a line asks; what is wrong with it is one line, and the conversation goes on."""
        before = list(self._waiting)
        try:
            self._take(text)
        except KeyboardInterrupt:
            if not self._lines.is_terminal:
                raise
            self._waiting = before
            say("\nstopped before an answer")
        except PipesError as error:
            self._waiting = before  # the line will be typed again, with its pictures
            self._had_mistake = True
            say(f"error: {' '.join(self._advised(error).split())}")

    def _advised(self, error: PipesError) -> str:
        """What is wrong, and what to do about it here."""
        ways = "/undo takes a turn back, /reset begins anew"
        if isinstance(error, ContextTooLong):
            limit = ", --max-length can be larger" if self._has_limit else ""
            held = self._pipe.max_seq_len
            return f"this would be longer than the {held} tokens that fit; {ways}{limit}"
        return f"{error}; {ways}" if isinstance(error, OutOfBudget) else str(error)

    def _take(self, text: str) -> None:
        name, _, rest = text.strip().partition(" ")
        if name in self._runs:
            self._runs[name](rest.strip())
            return
        words, paths = dropped_files(text)
        if paths:
            self._attach_dropped(paths)
            text = words
        elif re.fullmatch(r"/[a-z?]+", name):
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
            raise InputError(f"no command {name}; {hint}")
        elif name.startswith(("/", "~/", "'/", '"/', "file:")) and _names_media(text):
            raise InputError(f"{describe(first_word(text.strip()))}: no such file")
        if text.strip():
            self._answer(text)

    def _attach_named(self, kind: str, rest: str) -> None:
        if not rest:
            raise InputError(f"/{kind} needs a path or a URL")
        word = first_word(rest)
        if is_url(word) and not word.lower().startswith("file:"):
            sources, words = [word], rest[len(word) :].strip()
        else:
            sources, words = leading_files(rest)
        if not sources:
            raise InputError(f"{describe(word)}: no such file")
        self.attach(kind, sources)
        if words:
            self._answer(words)

    def _attach_dropped(self, paths: list[Path]) -> None:
        for path in paths:
            self.attach("video" if is_clip(path) else "image", [path])

    def _sources(self, kind: str) -> list[Any]:
        return [one.source for one in self._waiting if one.kind == kind]

    def _answer(self, text: str | None) -> None:
        """Print the answer as it comes. text None: to the last message, once more."""
        stream = (
            self._chat.stream(None)
            if text is None
            else self._chat.stream(text, self._sources("image"), self._sources("video"))
        )
        try:
            last = _print(stream)
        except KeyboardInterrupt:
            stream.close()
            is_kept = bool(stream.text.strip())
            if is_kept:
                put("\n")
            if not is_kept or not self._lines.is_terminal:
                raise
            say("stopped; the answer is kept as far as it came")
        else:
            put("\n")
            self._last = last
            self._say_limits(last)
        self._seen = stream.text, stream.media
        if text is not None:
            self._waiting.clear()
        if self._lines.is_terminal:
            say("")

    def _say_limits(self, last: Chunk) -> None:
        """Why an answer was cut, and how full the model is."""
        assert last.usage is not None
        used, held = last.usage.prompt_tokens + last.usage.completion_tokens, self._pipe.max_seq_len
        if last.finish_reason == "length" and used < held:
            new = _counted(last.usage.completion_tokens, "token")
            say(f"cut after {new}; begin with a larger --max-tokens for longer answers")
        if used >= ALMOST_FULL * held:
            say(f"{min(used, held)} of the {held} tokens that fit are used; /reset begins anew")

    def _sign(self) -> str:
        counts = [(len(self._sources(kind)), name) for kind, name in _NAMES.items()]
        waiting = ", ".join(_counted(count, name) for count, name in counts if count)
        return f"[{waiting}] > " if waiting else "> "

    def _system(self, text: str) -> None:
        if text:
            self._chat.system = None if text == "-" else text
        say(f"system: {self._chat.system or 'none'}")

    def _undo(self, _: str) -> None:
        if self._waiting:
            self._waiting.clear()
            say("the pictures and clips that waited are dropped")
            return
        taken = self._chat.undo()
        say(f"taken back: {clip(' '.join(_text_of(taken[0]).split()), 60)}")

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._waiting.clear()
        say(
            "the conversation begins anew"
            + (", the system message stays" * bool(self._chat.system))
        )

    def _save(self, name: str) -> None:
        self._chat.save(_file_name(name, "/save FILE"))
        say(f"{self._described()} saved in {name}")

    def _history(self, _: str) -> None:
        for message in self._chat.history:
            sign = "> " if message["role"] == "user" else ""
            name = "" if message["role"] in ("user", "assistant") else f"{message['role']}: "
            say(f"{sign}{name}{_text_of(message)}")
        if not self._chat.history:
            say("nothing was said yet")

    def _plan(self, text: str) -> None:
        plan = self._chat.plan(text or "?", self._sources("image"), self._sources("video"))
        for line in str(plan).split("; "):
            say(line)

    def _show(self, name: str) -> None:
        path = _file_name(name, "/show FILE.png")
        if self._waiting:
            view = self._pipe.show(self._sources("image"), self._sources("video"))
        elif self._seen[1]:
            view = shown_answer(*self._seen)
        else:
            raise InputError("no picture to show; /image PATH gives one")
        view.save(path)
        say(f"written to {path}")

    def _stats(self, _: str) -> None:
        last = self._last
        if last is None or last.usage is None or last.timings is None:
            say("no whole answer yet")
            return
        memory = self._pipe.peak_memory_bytes()
        for line in figures_lines(last.finish_reason, last.usage, last.timings, memory):
            say(line)
        used = last.usage.prompt_tokens + last.usage.completion_tokens
        say(f"{self._described()}, {used} of {self._pipe.max_seq_len} tokens")

    def _help(self, _: str) -> None:
        for name, (argument, about) in COMMANDS.items():
            say(f"  {f'{name} {argument}':17}{about}")
        say(HINTS)

    def _described(self) -> str:
        roles = [message["role"] for message in self._chat.history]
        media = [part for m in self._chat.history for part in _media_of(m)]
        counts = [(roles.count("user"), "turn")]
        counts += [(sum(p["type"] == kind for p in media), name) for kind, name in _NAMES.items()]
        said = ", ".join(_counted(count, name) for count, name in counts if count)
        return f"conversation of {said or 'no turns'}"


_NAMES = {"image": "picture", "video": "clip"}


def _print(stream: AnswerStream) -> Chunk:
    """Print chunks as they come; returns the last, which has the figures."""
    last, is_begun = None, False
    for chunk in stream:
        text = chunk.text if is_begun else chunk.text.lstrip()  # Idefics3 begins with a space
        is_begun = is_begun or bool(text)
        put(text)
        last = chunk
    assert last is not None
    return last


def _names_media(text: str) -> bool:
    return is_media(Path(first_word(text.strip())))


def _file_name(name: str, usage: str) -> Path:
    """The one file that a command names. Raises: InputError without any."""
    if not name:
        raise InputError(f"which file? {usage}")
    return user_path(first_word(name) if name[0] in "'\"" or "\\ " in name else name)


def _media_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") in _NAMES]


def _text_of(message: dict[str, Any]) -> str:
    """A message in words: [picture] for each of its pictures, then its texts."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else content
    words = [
        f"[{_NAMES[part['type']]}]" if part.get("type") in _NAMES else part.get("text", "")
        for part in (p if isinstance(p, dict) else {"text": p} for p in parts)
    ]
    return " ".join(words)


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" + "s" * (count != 1)
