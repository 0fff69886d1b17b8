"""`generate --prompt-cache FILE`: a prompt's prefix is read from a file, or left in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.command import terminable
from mlx_vlm_pipes.errors import PrefixError
from mlx_vlm_pipes.options import OPTIONS, PROMPT_OPTIONS, read_options
from mlx_vlm_pipes.paths import user_path

if TYPE_CHECKING:
    from mlx_vlm_pipes.engine.requests import Chunk
    from mlx_vlm_pipes.pipeline import Pipeline

WORTH_KEEPING = 0.5  # of a prompt: a file that gave so much of it is left as it is


def stream_with_cache(  # noqa: PLR0913  # a request, and where its prefix lies
    pipe: Pipeline,
    file: str,
    prompt: Any,
    images: list[Any],
    videos: list[Any],
    options: dict[str, Any],
    tell: Callable[[str], None],
) -> Iterator[Chunk]:
    """`pipe.stream`, with what a file holds of the prompt; else the file is written behind it.

    Raises: InputError where something lies there that is no prefix, and as `Pipeline.stream`.
    """
    path = user_path(file)
    _read(pipe, path, tell)
    cached = total = 0
    for chunk in pipe.stream(prompt, images, videos, **options):
        yield chunk
        if chunk.usage is not None:
            cached, total = chunk.usage.cached_tokens, chunk.usage.prompt_tokens
    if cached >= WORTH_KEEPING * total:
        return
    given = read_options(options, OPTIONS)
    reading = {name: value for name, value in given.items() if name in PROMPT_OPTIONS}
    with terminable():
        saved = pipe.save_prefix(
            path, prompt, images, videos, adapter=given.get("adapter"), **reading
        )
    tell(f"prompt cache: {saved.tokens} tokens, {saved.nbytes / 1e6:.1f} MB written to {file}")


def _read(pipe: Pipeline, path: Path, tell: Callable[[str], None]) -> None:
    """Load the file where there is one that fits; one that does not will be written anew."""
    from mlx_vlm_pipes.engine.prefix_file import is_vacant, require_replaceable

    require_replaceable(path)  # before a token is computed
    if is_vacant(path):
        return
    try:
        pipe.load_prefix(path)
    except PrefixError as error:
        tell(f"prompt cache not used: {error}")
