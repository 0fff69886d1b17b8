"""`--prompt-cache FILE`: what is cached of a prompt is read from a file, or left in it.

`generate` and `chat` read the file and write it; `serve` reads files that they wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.command import say, terminable
from mlx_vlm_pipes.errors import ConfigError, PrefixError, clip
from mlx_vlm_pipes.options import PROMPT_OPTIONS, among
from mlx_vlm_pipes.paths import user_path

if TYPE_CHECKING:
    from mlx_vlm_pipes.engine.requests import Chunk, Usage
    from mlx_vlm_pipes.pipeline import Pipeline, Prompt

ENOUGH = 0.5  # of a prompt's tokens: a file that gave so many is left as it is


def prefix_files(given: str) -> list[Path]:
    """The file of this name, or those of a folder. Raises: ConfigError where there is none."""
    path = user_path(given)
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("[!.]*") if file.is_file()) if path.is_dir() else []
    if not found:
        raise ConfigError(f"--prompt-cache {clip(given, 200)}: no such file, nor a folder of files")
    return found


def read_prefixes(pipe: Pipeline, files: Sequence[Path]) -> None:
    """Requests that begin with what is in these files take it from there. Raises: PrefixError and
    OutOfBudget, as `Pipeline.load_prefix`."""
    for file in files:
        saved = pipe.load_prefix(file)
        say(f"prompt cache: {saved.tokens} tokens read from {file}")


class PromptCache:
    """A file with the prefix of a prompt; it need not be there yet.

    Raises: PrefixError where something lies that is no whole prefix.
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
        """Write the file after an answer that is complete, where it gave less than half of the
        prompt: it was not there, is of another model or of another prompt."""
        if self._usage is not None and not _gave_enough(self._usage):
            self.write(prompt, images, videos, options)

    def write(
        self,
        prompt: Prompt,
        images: Sequence[Any],
        videos: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:
        """Write the file, with all of this prompt. Raises: as `Pipeline.save_prefix`."""
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
