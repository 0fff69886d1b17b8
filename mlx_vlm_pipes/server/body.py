"""A request's body: bounded in size and time, and a JSON object."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from mlx_vlm_pipes.errors import clip, shown
from mlx_vlm_pipes.server.errors import ApiError, bad_request
from mlx_vlm_pipes.server.settings import ServerSettings

MAX_VALUES = 1_000_000  # commas, those of texts among them
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
    try:
        if raw.count(b",") > MAX_VALUES:
            raise bad_request(f"the body has more than {MAX_VALUES} values")
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be sent on
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is no JSON: {clip(error)}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body is a JSON {type(value).__name__}, expected an object")
    _require_plain(value)
    return value


def _require_plain(body: dict[str, Any]) -> None:
    """Raises: ApiError 400 for what is read but could be neither looked through nor sent back."""
    for param, value in body.items():
        level = [value] if isinstance(value, (dict, list)) else []
        for _ in range(MAX_DEPTH):
            inner = (v.values() if isinstance(v, dict) else v for v in level)
            level = [v for values in inner for v in values if isinstance(v, (dict, list))]
            if not level:
                break
        else:
            raise bad_request(f"{shown(param)} is nested more than {MAX_DEPTH} deep", param)
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            message = f"{shown(param)} holds a number that is not finite"
            raise bad_request(message, param) from None


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
