"""Pictures and clips as a caller gives them: a list, one alone, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlx_vlm_pipes.errors import InputError


class Array(Protocol):
    """An array that numpy can read: its own, MLX's."""

    def __array__(self) -> Any: ...


if TYPE_CHECKING:
    import os
    from typing import BinaryIO, TypeAlias

    from PIL.Image import Image

    # A list of pictures or clips, one of them alone, or none.
    Media: TypeAlias = Sequence[Any] | Image | Array | os.PathLike[str] | BinaryIO | None


def named_media(
    images: Media, videos: Media, options: Mapping[str, object]
) -> tuple[Media, Media, dict[str, Any]]:
    """The media and the other options; `image` and `video` are the same as `images` and `videos`.

    Raises: InputError where both are given.
    """
    rest: dict[str, Any] = dict(options)
    found = {"images": images, "videos": videos}
    for name, own in found.items():
        alias = name[:-1]
        if alias in rest:
            if listed(own):
                raise InputError(f"{alias} and {name} are the same option; give one of them")
            found[name] = rest.pop(alias)
    return found["images"], found["videos"], rest


def listed(media: Media) -> tuple[Any, ...]:
    """Pictures or clips: one given alone counts as a list of one, None as an empty one."""
    if media is None:
        return ()
    return tuple(media) if isinstance(media, (list, tuple)) else (media,)
