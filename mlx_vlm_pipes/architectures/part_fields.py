"""Fields of an outer configuration that are stored in one of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class PartField(Generic[T]):
    """A dataclass field without a place of its own: reading and writing go to a part.

    Whatever is set on the outer configuration is then what the part's user reads. The class must
    also be a `WithPartFields`.

    Args: part, name: of the part, and of its field; read, write: from the part's value to the
    outer one's and back, where their types differ.
    """

    def __init__(
        self,
        part: str,
        name: str,
        read: Callable[[Any], T] | None = None,
        write: Callable[[T], Any] | None = None,
    ) -> None:
        self._part, self._name = part, name
        self._read, self._write = read, write

    @overload
    def __get__(self, config: None, owner: type) -> PartField[T]: ...
    @overload
    def __get__(self, config: object, owner: type) -> T: ...
    def __get__(self, config: object | None, owner: type) -> Any:
        if config is None:
            raise AttributeError(self._name)  # to a dataclass: no default
        value = vars(vars(config)[self._part])[self._name]
        return value if self._read is None else self._read(value)

    def __set__(self, config: object, value: T) -> None:
        stored = value if self._write is None else self._write(value)
        if self._part in vars(config):
            setattr(vars(config)[self._part], self._name, stored)
        else:  # the constructor sets the fields in their order, and may come to the part later
            vars(config).setdefault("_waiting", []).append((self._part, self._name, stored))


class WithPartFields:
    """A dataclass with PartFields; what its constructor was given goes to the parts."""

    def __post_init__(self) -> None:
        for part, name, value in vars(self).pop("_waiting", ()):
            setattr(vars(self)[part], name, value)
