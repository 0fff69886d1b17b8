"""A Python function as the JSON description that chat templates print, as transformers makes it.

Types come from the annotations, texts from a docstring in Google's form.
Source: transformers utils/chat_template_utils.py, get_json_schema.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mlx_vlm_pipes.errors import InputError, shown

Schema = dict[str, Any]

PLAIN: dict[Any, Schema] = {
    int: {"type": "integer"}, float: {"type": "number"}, str: {"type": "string"},
    bool: {"type": "boolean"}, type(None): {"type": "null"}, list: {"type": "array"},
    tuple: {"type": "array"}, dict: {"type": "object"}, Any: {},
}  # fmt: skip
SCALARS = (int, float, str, bool, type(None))
SECTION = r"(?:Args|Returns|Raises):"
ARGUMENT = re.compile(r"([ \t]*)(\w+):\s*(.*)", re.DOTALL)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


class _Unclear(Exception):
    """A function does not say what a description needs; the text says what is missing."""


def tool_schema(function: Callable[..., Any]) -> Schema:
    """{"type": "function", "function": {"name", "description", "parameters"}} of a function.

    Raises: InputError where the docstring, a type or the text of an argument is missing.
    """
    name = getattr(function, "__name__", "tool")
    try:
        return {"type": "function", "function": _described(function, name)}
    except _Unclear as error:
        raise InputError(
            f"tools: {name} {error}; give it types and a docstring with Args, or a JSON description"
        ) from None


def _described(function: Callable[..., Any], name: str) -> Schema:
    doc = inspect.getdoc(function)
    if not doc or not doc.strip():
        raise _Unclear("has no docstring")
    description, texts, returns = _read_docstring(doc.strip())
    hints = _hints(function)
    parameters = _parameters(function)
    properties = {}
    for parameter in parameters:
        if parameter.name not in hints:
            raise _Unclear(f"has no type for {parameter.name}")
        if parameter.name not in texts:
            raise _Unclear(f"says nothing of {parameter.name} in its docstring")
        properties[parameter.name] = _property(hints[parameter.name], texts[parameter.name])
    schema: Schema = {"type": "object", "properties": properties}
    required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    if required:
        schema["required"] = required
    made: Schema = {"name": name, "description": description, "parameters": schema}
    returned = _returned(hints, returns)
    return made if returned is None else {**made, "return": returned}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except Exception as error:  # annotations are text that may name anything
        raise _Unclear(f"has types that cannot be read ({shown(error)})") from None


def _parameters(function: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    """All but the receiver of a method, which has no type."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        raise _Unclear("has no signature") from None
    first = parameters[0] if parameters else None
    if first is not None and first.name in ("self", "cls"):
        return parameters[1:] if first.annotation is inspect.Parameter.empty else parameters
    return parameters


def _property(hint: Any, text: str) -> Schema:
    """An argument's type and text; `(choices: [...])` at the end of the text is an enum."""
    schema = _schema(hint)
    choices = CHOICES.search(text)
    if choices is not None:
        try:
            values = json.loads(choices.group(1))
        except ValueError:
            raise _Unclear(
                f"has choices that are no JSON list: {shown(choices.group(1))}"
            ) from None
        schema["enum"] = [v.strip() if isinstance(v, str) else v for v in values]
        text = text[: choices.start()].strip()
    return {**schema, "description": text}


def _returned(hints: dict[str, Any], text: str | None) -> Schema | None:
    """What it returns; nothing where the type has no JSON form, since templates rarely ask."""
    if "return" not in hints:
        return None
    try:
        schema = _schema(hints["return"])
    except _Unclear:
        return None
    return schema if text is None else {**schema, "description": text}


def _schema(hint: Any) -> Schema:
    """The JSON schema of a type. Raises: _Unclear for one that has none."""
    origin, parts = get_origin(hint), list(get_args(hint))
    if origin in (Union, types.UnionType):
        return _union(parts)
    if origin is Literal:
        return _choice(parts, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice([member.value for member in hint], hint)
    kind = hint if origin is None else origin  # typing.List without a part has an origin
    if not parts and kind in PLAIN:
        return dict(PLAIN[kind])
    if origin is list:
        return {"type": "array", "items": _schema(parts[0])}
    if origin is tuple and len(parts) > 1 and Ellipsis not in parts:
        return {"type": "array", "prefixItems": [_schema(part) for part in parts]}
    if origin is dict and len(parts) == 2:
        return {"type": "object", "additionalProperties": _schema(parts[1])}
    raise _Unclear(f"has a type without a JSON form, {shown(hint)}")


def _choice(values: list[Any], hint: Any) -> Schema:
    if not values or any(type(value) not in SCALARS for value in values):
        raise _Unclear(f"has choices without a JSON form, {shown(hint)}")
    names = list(dict.fromkeys(PLAIN[type(value)]["type"] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _union(parts: Sequence[Any]) -> Schema:
    """One type as it is, plain ones as a list of their names, others as anyOf; None: nullable."""
    schemas = [_schema(part) for part in parts if part is not type(None)]
    if len(schemas) == 1:
        made = schemas[0]
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
        names = sorted({s["type"] for s in schemas})
        made = {"type": names[0] if len(names) == 1 else names}
    else:
        made = {"anyOf": schemas}
    return {**made, "nullable": True} if type(None) in parts else made


def _read_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """(what it does, text of each argument, what it returns)."""
    head = re.split(rf"\s*{SECTION}", doc, maxsplit=1)[0].strip()
    args = re.search(r"\n\s*Args:\n(.*?)\s*(?:Returns:|Raises:|\Z)", doc, re.DOTALL)
    returns = re.search(r"\n\s*Returns:\n\s*(.*?)\s*(?:Raises:|\Z)", doc, re.DOTALL)
    texts = _argument_texts(args.group(1)) if args else {}
    return head, texts, returns.group(1).strip() if returns else None


def _argument_texts(block: str) -> dict[str, str]:
    """Each `name: text`, which goes on over lines that are indented deeper."""
    entries: list[tuple[str, list[str]]] = []
    indent = None
    texts: dict[str, str] = {}
    for line in filter(str.strip, block.split("\n")):
        found = ARGUMENT.match(line)
        if found is not None and (indent is None or len(found.group(1)) <= indent):
            indent = len(found.group(1))
            entries.append((found.group(2), [found.group(3).strip()]))
        elif entries:
            entries[-1][1].append(line.strip())
    for name, lines in entries:
        texts[name] = " ".join(part for part in lines if part)
    return texts
