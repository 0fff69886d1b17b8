"""`generate --prompt-cache FILE`: what is cached of a prompt is read from a file, or left in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.command import say, terminable
from mlx_vlm_pipes.errors import PrefixError
from mlx_vlm_pipes.options import PROMPT_OPTIONS, among
from mlx_vlm_pipes.paths import user_path

if TYPE_CHECKING:
    from mlx_vlm_pipes.engine.requests import Chunk, Usage
    from mlx_vlm_pipes.pipeline import Pipeline

ENOUGH = 0.5  # of a prompt's tokens: a file that gave so many is left as it is


class PromptCache:
    """A file with the prefix of a prompt; it need not be there yet.

    It is written anew where it gave less than half of a prompt: it was not there, is of another
    model or of another prompt. Raises: PrefixError where something lies that is no whole prefix.
    """

    def __init__(self, pipe: Pipeline, file: str, *, quiet: bool) -> None:
        """quiet: nothing is said of it."""
        from mlx_vlm_pipes.engine.prefix_file import is_vacant, require_replaceable

        self._pipe, self._file, self._path = pipe, file, user_path(file)
        self._is_quiet = quiet
        self._usage: Usage | None = None
        require_replaceable(self._path)  # before anything is computed
        if not is_vacant(self._path):
            try:
                pipe.load_prefix(self._path)
            except PrefixError as error:
                self._say(f"prompt cache not used: {error}")

    def watch(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The same chunks; `keep` then knows what the file gave."""
        for chunk in chunks:
            self._usage = chunk.usage or self._usage
            yield chunk

    def keep(
        self,
        prompt: str,
        images: Sequence[Any],
        videos: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        """Write the file, where it gave too little to an answer that is complete."""
        if self._usage is None or _gave_enough(self._usage):
            return
        reading: Any = among(options, PROMPT_OPTIONS)
        with terminable():
            saved = self._pipe.save_prefix(self._path, prompt, images, videos, **reading)
        size = f"{saved.nbytes / 1e6:.3g} MB"
        self._say(f"prompt cache: {saved.tokens} tokens, {size} written to {self._file}")

    def _say(self, line: str) -> None:
        if not self._is_quiet:
            say(line)


def _gave_enough(usage: Usage) -> bool:
    return usage.cached_tokens >= ENOUGH * usage.prompt_tokens
