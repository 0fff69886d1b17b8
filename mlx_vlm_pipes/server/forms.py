"""The form that a request wants its answer in, as an option of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_vlm_pipes.errors import shown
from mlx_vlm_pipes.server.errors import bad_request
from mlx_vlm_pipes.server.fields import Given

# vLLM's names for the same, and ours
GUIDED = {"guided_json": "schema", "guided_regex": "regex", "guided_grammar": "grammar"}
FORM_PARAMS = ("response_format", *GUIDED)
ANY_OBJECT = {"type": "object"}


def read_form(body: Mapping[str, Any], given: Given) -> None:
    """Add schema, regex or grammar, or none of them.

    Raises: ApiError 400 for a form that is no object or text, and for two of them.
    """
    found = {name: body[name] for name in FORM_PARAMS if body.get(name) is not None}
    if len(found) > 1:
        raise bad_request(f"{' and '.join(found)}: an answer has one form", next(iter(found)))
    for param, value in found.items():
        if param == "response_format":
            given.add(param, **_response_format(value))
        elif param == "guided_json":
            given.add(param, schema=_object(value, param))
        elif isinstance(value, str):
            given.add(param, **{GUIDED[param]: value})
        else:
            raise bad_request(f"{param} is no text", param)


def schema_of(form: Any, param: str) -> dict[str, Any]:
    """Of {"type": "text" | "json_object" | "json_schema", ...}: the option that it means."""
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"schema": ANY_OBJECT}
    if kind != "json_schema":
        expected = 'a type "text", "json_object" or "json_schema"'
        raise bad_request(f"{param} has the type {shown(kind)}, expected {expected}", param)
    return {"schema": _object(form.get("schema"), param)}


def _response_format(value: Any) -> dict[str, Any]:
    inner = value.get("json_schema") if isinstance(value, Mapping) else None
    flat = {**value, **inner} if isinstance(inner, Mapping) else value
    return schema_of(flat, "response_format")


def _object(schema: Any, param: str) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        raise bad_request(f"{param} holds no schema, which is a JSON object", param)
    return dict(schema)
