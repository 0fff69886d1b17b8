"""Media that last: for the turns that follow, and as JSON. No MLX.

In JSON pictures stand by their absolute path, or as data URLs where they have none.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_vlm_pipes.errors import InputError, MediaError
from mlx_vlm_pipes.paths import user_path
from mlx_vlm_pipes.processing.fetch import MAX_BYTES, Access, is_url
from mlx_vlm_pipes.processing.images import describe, load_image, read_bytes
from mlx_vlm_pipes.processing.messages import SOURCE_KEYS

_MEDIA_KEYS = frozenset(key for keys in SOURCE_KEYS.values() for key in keys) - {"base64"}


def lasting(source: Any, access: Access) -> Any:
    """A picture or clip that can be read again and again, without the network.

    Raises: MediaError, as `read_bytes`, for what has to be read to that end.
    """
    if isinstance(source, (list, tuple)):
        return [lasting(frame, access) for frame in source]
    is_remote = isinstance(source, str) and is_url(source) and source[:4].lower() == "http"
    if is_remote or callable(getattr(source, "read", None)):
        return read_bytes(source, access)
    return source


def stored_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages in plain JSON types.

    PIL images and arrays become PNGs, as RGB. Raises: InputError for a picture that is too large to
    be read back from a data URL, and for a value that is neither JSON nor a picture.
    """
    return [
        {
            key: _content(value) if key == "content" else _plain(value, key)
            for key, value in m.items()
        }
        for m in messages
    ]


def _content(value: Any) -> Any:
    """A text; or parts, of which only those of pictures and clips name files."""
    if isinstance(value, Mapping):
        return _part(value)
    if isinstance(value, (list, tuple)):
        return [_part(part) if isinstance(part, Mapping) else _plain(part) for part in value]
    return _plain(value)


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(part.get("text"), str):
        return _plain(part)
    return {str(key): _source(value, str(key)) for key, value in part.items()}


def _source(value: Any, key: str) -> Any:
    """key: under which it stands in its part, or in the object that a part has for its source."""
    if key not in _MEDIA_KEYS or value is None:
        return _plain(value, key)
    if isinstance(value, (str, os.PathLike)):
        return _lasting_name(value)
    if isinstance(value, Mapping):  # such as {"url": ...}
        return {str(name): _source(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):  # the frames of a clip
        return [_source(frame, key) for frame in value]
    return _data_url(value)


def _plain(value: Any, key: str = "content") -> Any:
    """The value, which is JSON already. Raises: InputError for another."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, key) for item in value]
    raise InputError(f"{key!r} of a message is a {type(value).__name__}; expected JSON")


def _lasting_name(source: str | os.PathLike[str]) -> str:
    if isinstance(source, str) and is_url(source):
        return source
    return str(user_path(source).absolute())


def _data_url(source: Any) -> str:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, kind = bytes(source), ""
    else:
        file = io.BytesIO()
        load_image(source).save(file, "PNG")
        data, kind = file.getvalue(), "image/png"
    if len(data) > MAX_BYTES:
        raise MediaError(
            f"{describe(source)}: {len(data)} bytes, the limit of a data URL is {MAX_BYTES}; "
            "write it into a file and give its path"
        )
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
