"""A request's body: bounded in size and time, and a JSON object."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import anyio.to_thread
from starlette.requests import ClientDisconnect, Request

from mlx_vlm_pipes.errors import clip, shown
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.settings import ServerSettings

MAX_VALUES = 1_000_000  # commas, those of texts among them
SMALL_BYTES = 1 << 16  # smaller bodies are parsed at once
MAX_DEPTH = 64  # of a JSON value: our own code and templates go down by calls


async def read_object(request: Request, settings: ServerSettings) -> dict[str, Any]:
    """The JSON object in a body.

    Raises: ApiError 413 above the limit, 408 where it does not come in time, 400 for anything that
    is no JSON object.
    """
    try:
        raw = await asyncio.wait_for(_bytes(request, settings), settings.timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took longer than {settings.timeout_s:g} s") from None
    except ClientDisconnect:
        raise bad_request("the body ended early") from None
    if len(raw) < SMALL_BYTES:
        return parsed(raw)
    return await anyio.to_thread.run_sync(parsed, raw)  # meanwhile others get their tokens


class _NotFinite(Exception):
    pass


def parsed(raw: bytes) -> dict[str, Any]:
    """The object. Raises: ApiError 400, as `read_object`."""
    if raw.count(b",") > MAX_VALUES:
        raise bad_request(f"the body has more than {MAX_VALUES} values")
    try:
        text = raw.decode()
        try:
            value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except _NotFinite:
            raise _infinite(json.loads(text)) from None
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate cannot be sent on
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is no JSON: {clip(error)}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body is a JSON {type(value).__name__}, expected an object")
    _require_flat(value)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotFinite
    return value


def _infinite(value: Any) -> ApiError:
    """The refusal that names the parameter with a number that is not finite."""
    for param, inner in value.items() if isinstance(value, dict) else ():
        try:
            json.dumps(inner, allow_nan=False)
        except ValueError:
            return bad_request(f"{shown(param)} holds a number that is not finite", param)
    return bad_request("the body holds a number that is not finite")


def _require_flat(body: dict[str, Any]) -> None:
    """Raises: ApiError 400 for what could not be looked through."""
    for param, value in body.items():
        level = [value] if isinstance(value, (dict, list)) else []
        for _ in range(MAX_DEPTH):
            inner = (v.values() if isinstance(v, dict) else v for v in level)
            level = [v for values in inner for v in values if isinstance(v, (dict, list))]
            if not level:
                break
        else:
            raise bad_request(f"{shown(param)} is nested more than {MAX_DEPTH} deep", param)


async def _bytes(request: Request, settings: ServerSettings) -> bytes:
    limit = settings.max_body_bytes
    too_large = ApiError(
        413, f"the body has more than {limit} bytes, the limit of this server (--max-body-mb)"
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > limit:
            raise too_large
    return b"".join(parts)
