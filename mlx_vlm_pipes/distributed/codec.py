"""Values as bytes and back: JSON with raw arrays behind it. Never pickle: what arrives is data.

A message is the length of its JSON (uint32, little endian), the JSON, and the arrays' bytes one
behind the other. What JSON does not know has a tag: {"array": 0}, {"tuple": [...]}, {"set": [...]},
{"dict": [[key, value], ...]}, {"blank": [dtype, shape]} and {"object": class, "fields": {...}}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

_WIDTHS = (8, 16, 32, 64)
DTYPES = frozenset(
    ("bool", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in _WIDTHS))
) - {"float8"}
MAX_DIMENSIONS = 8
_LENGTH = struct.Struct("<I")


class Malformed(ValueError):
    """Bytes that `pack` has not made."""


def class_name(kind: type) -> str:
    """What a class is called in messages."""
    return f"{kind.__module__}.{kind.__qualname__}"


def pack(value: Any, blank: Collection[str] = ()) -> bytes:
    """None, numbers, texts, lists, tuples, sets, dicts, arrays, and dataclasses of these.

    blank: fields of dataclasses whose arrays are not sent: the receiver gets zeros of their shape,
    all of them one number in memory. Raises: TypeError for anything else.
    """
    arrays: list[np.ndarray] = []
    tagged = _tagged(value, arrays, blank)
    forms = [[array.dtype.name, list(array.shape)] for array in arrays]
    text = json.dumps({"value": tagged, "arrays": forms}, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(array.tobytes() for array in arrays)])


def unpack(data: bytes, classes: Mapping[str, type] | None = None) -> Any:
    """What `pack` was given. classes: the dataclasses that may come, by `class_name`.

    Raises: Malformed for bytes of another form, and for a class that is not among them.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        begin = _LENGTH.size + length
        message = json.loads(data[_LENGTH.size : begin])
        arrays = _arrays(message["arrays"], data, begin)
        return _value(message["value"], arrays, classes or {})
    except Malformed:
        raise
    except (struct.error, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def _tagged(value: Any, arrays: list[np.ndarray], blank: Collection[str]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        _require_dtype(value.dtype.name, TypeError)
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_tagged(item, arrays, blank) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item, arrays, blank) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [_tagged(item, arrays, blank) for item in sorted(value)]}
    if isinstance(value, Mapping):
        pairs = [(key, _tagged(item, arrays, blank)) for key, item in value.items()]
        return {"dict": [[_tagged(key, arrays, blank), item] for key, item in pairs]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f.name: vars(value)[f.name] for f in dataclasses.fields(value) if f.init}
        fields = {
            name: _blank(item) if name in blank else _tagged(item, arrays, blank)
            for name, item in own.items()
        }
        return {"object": class_name(type(value)), "fields": fields}
    raise TypeError(f"a {type(value).__name__} cannot be sent to another rank")


def _blank(array: np.ndarray) -> dict[str, Any]:
    _require_dtype(array.dtype.name, TypeError)
    return {"blank": [array.dtype.name, list(array.shape)]}


def _arrays(forms: Any, data: bytes, begin: int) -> list[np.ndarray]:
    made = []
    for name, shape in forms:
        dtype = _dtype(name, shape)
        count = math.prod(shape)
        if begin + count * dtype.itemsize > len(data):
            raise Malformed("it ends within an array")
        made.append(np.frombuffer(data, dtype, count, begin).reshape(shape).copy())
        begin += count * dtype.itemsize
    if begin != len(data):
        raise Malformed(f"{len(data) - begin} bytes behind its end")
    return made


def _dtype(name: Any, shape: Any) -> np.dtype:
    """Raises: Malformed for what no array has."""
    _require_dtype(name, Malformed)
    sizes = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not all(type(size) is int and size >= 0 for size in shape):
        raise Malformed("a shape that no array has")
    return np.dtype(name)


def _require_dtype(name: Any, kind: type[Exception]) -> None:
    if not isinstance(name, str) or name not in DTYPES:
        raise kind(f"arrays of {name} are not sent")


def _value(tagged: Any, arrays: list[np.ndarray], classes: Mapping[str, type]) -> Any:
    if isinstance(tagged, list):
        return [_value(item, arrays, classes) for item in tagged]
    if not isinstance(tagged, dict):
        return tagged
    if "object" in tagged:
        kind = classes.get(tagged["object"])
        if kind is None:
            raise Malformed(f"an object of a class {tagged['object']!r}")
        return kind(**{k: _value(v, arrays, classes) for k, v in tagged["fields"].items()})
    ((tag, content),) = tagged.items()
    if tag == "array":
        return arrays[content]
    if tag == "blank":
        name, shape = content
        return np.broadcast_to(np.zeros((), _dtype(name, shape)), shape)
    items = [_value(item, arrays, classes) for item in content]
    if tag == "dict":
        return dict(items)
    if tag not in ("tuple", "set"):
        raise Malformed(f"a tag {tag!r}")
    return tuple(items) if tag == "tuple" else frozenset(items)
