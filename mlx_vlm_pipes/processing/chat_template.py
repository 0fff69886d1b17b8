"""A checkpoint's chat template: found, compiled once, rendered within bounds."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.errors import InputError, ProcessorError, clip, one_line
from mlx_vlm_pipes.processing.settings import read_json

JSON_PLACES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
TOOL_USE = "tool_use"  # the name of the template for requests with tools, where there is one
# What a template is given anyway, and where it comes from.
OWN_NAMES = {
    "messages": "they are the prompt",
    "tools": "they are an option of their own",
    "add_generation_prompt": "an answer is always asked for",
}
MAX_TEMPLATE_BYTES = 2**20


def find_template(folder: Path, *, with_tools: bool = False) -> tuple[str, str] | None:
    """(template, file name) of a model folder, or None.

    Looks in chat_template.jinja, chat_template.json, processor_config.json and
    tokenizer_config.json, in that order. Of several named templates, `default` is taken, else the
    only one; with tools `tool_use`, where there is one. Raises: ProcessorError for a broken file.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        named = folder / "additional_chat_templates" / f"{TOOL_USE}.jinja"
        return _read(named if with_tools and named.is_file() else path)
    for name in JSON_PLACES:
        values = read_json(folder / name) or {}
        template = _named(values.get("chat_template"), folder / name, with_tools=with_tools)
        if template is not None:
            return template, name
    return None


def _read(path: Path) -> tuple[str, str]:
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ProcessorError(f"{path}: larger than {MAX_TEMPLATE_BYTES} bytes")
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise ProcessorError(f"{path}: not readable as UTF-8 text") from error


def _named(value: Any, path: Path, *, with_tools: bool) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {str(item.get("name")): item.get("template") for item in value}
    if isinstance(value, Mapping):
        if with_tools and isinstance(value.get(TOOL_USE), str):
            return value[TOOL_USE]
        if isinstance(value.get("default"), str):
            return value["default"]
        texts = [text for text in value.values() if isinstance(text, str)]
        if len(texts) == 1:
            return texts[0]
    raise ProcessorError(f"{path}: chat_template is neither a text nor a list with a default")


class ChatTemplate:
    """One compiled template.

    Raises: ProcessorError if the source is longer than 256 Ki characters or does not compile.
    """

    def __init__(self, source: str, origin: str) -> None:
        self.source, self.origin = source, origin

    @functools.cached_property
    def _compiled(self) -> Any:
        from mlx_vlm_pipes.processing import sandbox

        if len(self.source) > sandbox.MAX_SOURCE_CHARS:
            raise ProcessorError(
                f"chat template in {self.origin}: {len(self.source)} characters; "
                f"the limit is {sandbox.MAX_SOURCE_CHARS}"
            )
        environment = sandbox.BoundedEnvironment()
        environment.start_clock()
        try:
            return environment.from_string(self.source)
        except (Exception, RecursionError) as error:
            raise ProcessorError(
                f"chat template in {self.origin} does not compile: {_reason(error)}"
            ) from error

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The variables that the template may read, some of its own among them.

        Raises: ProcessorError, as `check`.
        """
        import jinja2.meta

        return frozenset(jinja2.meta.find_undeclared_variables(self._tree))

    @property
    def settings(self) -> list[str]:
        """Those that it plainly leaves to the user: it never sets them, or asks if they are set."""
        from jinja2 import nodes

        own = {n.name for n in self._tree.find_all(nodes.Name) if n.ctx != "load"}
        own |= {n for n in self.names if n.endswith("_token")} | set(OWN_NAMES)
        tests = [t.node for t in self._tree.find_all(nodes.Test) if t.name == "defined"]
        asked = {node.name for node in tests if isinstance(node, nodes.Name)} - set(OWN_NAMES)
        return sorted(self.names & ((self.names - own) | asked))

    @property
    def _tree(self) -> Any:
        environment = self._compiled.environment
        environment.start_clock()
        return environment.parse(self.source)

    def require(self, variables: Mapping[str, Any]) -> None:
        """Raises: InputError for a variable that the template does not read."""
        if variables.get("tools") and "tools" not in self.names:
            known = f"it reads {', '.join(self.settings)}; " if self.settings else ""
            raise InputError(
                f"tools: this model's chat template takes none; {known}describe them in the system "
                "message, or take a model that was trained to call tools",
                param="tools",
            )
        for name in variables.keys() - {"tools"}:
            if name not in self.names:
                known = f"it reads {', '.join(self.settings)}" if self.settings else "leave it out"
                raise InputError(
                    "chat_template_kwargs: this model's chat template does not read "
                    f"{clip(name)}; {known}",
                    param="chat_template_kwargs",
                )

    def check(self) -> None:
        """Compile without rendering. Raises: ProcessorError."""
        _ = self._compiled

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text.

        Args: variables, what the template sees besides messages: bos_token, eos_token, tools, ...
        Raises: InputError with the template's own message if it refuses the messages;
        ProcessorError if it fails, prints more than 8 Mi characters or takes longer than 2 s.
        """
        from mlx_vlm_pipes.processing import sandbox

        template = self._compiled
        template.environment.start_clock()
        scope = {
            **{name: plain(value) for name, value in variables.items()},
            "messages": plain(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return sandbox.bounded_concat(template.generate(scope))
        except sandbox.RaisedByTemplate as error:
            raise InputError(f"the model's chat template refuses: {_reason(error)}") from error
        except (Exception, RecursionError) as error:
            raise ProcessorError(
                f"chat template in {self.origin} fails: {_reason(error)}"
            ) from error


def plain(value: Any) -> Any:
    """The value rebuilt from plain JSON types, so that a template meets no object's methods."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _reason(error: BaseException) -> str:
    text = one_line(error, 300)
    line = getattr(error, "lineno", None)
    return f"{text or type(error).__name__}{f' (line {line})' if line else ''}"
