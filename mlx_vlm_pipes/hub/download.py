"""Models from the Hugging Face hub: what is downloaded of a repository.

The cache, the token and the server are huggingface_hub's: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE. Never a pickle, never code: what `files.py` does not list is not downloaded.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_vlm_pipes.errors import CheckpointNotFound, PipesWarning, clip
from mlx_vlm_pipes.gguf.header import SUFFIX
from mlx_vlm_pipes.hub.bars import download_bars, interruptible
from mlx_vlm_pipes.hub.failures import Unreachable, explained
from mlx_vlm_pipes.hub.files import is_text, no_weights, some, weight_files
from mlx_vlm_pipes.weights.files import find_weight_files
from mlx_vlm_pipes.weights.safetensors import INDEX_NAME, read_index


def is_hub_name(name: str) -> bool:
    """Whether a name may be of the hub: `owner/name`, or `owner/name/FILE.gguf`."""
    slashes = name.count("/")
    return (slashes == 1 or (slashes > 1 and name.endswith(SUFFIX))) and not name.startswith(
        (".", "/", "~")
    )


def download(name: str, revision: str | None, *, has_bar: bool) -> Path:
    """The folder in the cache that holds a model, downloaded where it is not there yet.

    Args: name as `is_hub_name` has it; with a file's name the file's path is returned, as it is
    for a repository whose only weights are one GGUF file. has_bar: whether to show a bar.
    Where the hub cannot be reached, a copy in the cache is taken, and a warning says so.
    Raises: CheckpointNotFound, one line for each reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without widgets tqdm.auto asks for them
        import huggingface_hub.utils  # noqa: F401  # first imported here
    owner, repo, *rest = name.split("/", 2)
    place = Repository(f"{owner}/{repo}", revision, has_bar)
    try:
        return place.file(rest[0]) if rest else place.folder()
    except Unreachable as error:
        cached = place.cached_file(rest[0]) if rest else place.cached_folder()
        if cached is None:
            raise CheckpointNotFound(
                f"no folder {name!r} here; {error.reason}, and no copy is in the cache:"
                f" {error.advice}"
            ) from None
        if not error.is_wanted:
            warnings.warn(
                f"{error.reason}; using the copy in the cache", PipesWarning, stacklevel=3
            )
        return cached


@dataclass(frozen=True)
class Repository:
    """One model of the hub, at a revision (a branch, a tag or a commit; None: the main branch)."""

    name: str
    revision: str | None
    has_bar: bool

    def folder(self) -> Path:
        """Its folder, or its only GGUF file. Raises: CheckpointNotFound, Unreachable."""
        files = self._list()
        chosen = weight_files(files, self._read_index if INDEX_NAME in files else None)
        ggufs = [file for file in files if file.endswith(SUFFIX) and "mmproj" not in file]
        if not chosen and len(ggufs) == 1:
            return self.file(ggufs[0])
        if not chosen:
            raise CheckpointNotFound(f"{self.name} on the hub {no_weights(self.name, files)}")
        beside = [file for file in files if "/" not in file and is_text(file)]
        return self._fetch([*chosen, *beside])

    def file(self, name: str) -> Path:
        """One file of it. Raises: CheckpointNotFound, Unreachable."""
        files = self._list()
        if name not in files:
            ggufs = [file for file in files if file.endswith(SUFFIX)]
            found = f"it has {some(ggufs)}" if ggufs else "it has no GGUF files"
            raise CheckpointNotFound(f"{self.name} on the hub has no file {clip(name)}; {found}")
        return self._fetch([name]) / name

    def cached_folder(self) -> Path | None:
        """What an earlier download has left, if it is whole."""
        from huggingface_hub import snapshot_download

        try:
            found = snapshot_download(
                self.name, revision=self.revision, allow_patterns=["config.json"],
                local_files_only=True,
            )  # fmt: skip
            folder = Path(found)
            ggufs = sorted(folder.rglob(f"*{SUFFIX}"))
            if not (folder / "config.json").is_file() and len(ggufs) == 1:
                return ggufs[0]
            find_weight_files(folder)
        except (OSError, ValueError):  # ValueError: a CheckpointError of ours, or a name's
            return None
        return folder

    def cached_file(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download

        try:
            found = hf_hub_download(self.name, name, revision=self.revision, local_files_only=True)
        except (OSError, ValueError):
            return None
        return Path(found)

    def _list(self) -> list[str]:
        """Its files."""
        from huggingface_hub import HfApi

        with explained(self.name, self.revision):
            info = HfApi().model_info(self.name, revision=self.revision)
        return [sibling.rfilename for sibling in info.siblings or []]

    def _read_index(self) -> Sequence[str]:
        """The files that the index names. Raises: WeightsError for a broken one."""
        return sorted(set(read_index(self._fetch([INDEX_NAME]) / INDEX_NAME).values()))

    def _fetch(self, files: Sequence[str]) -> Path:
        """The folder in the cache, with these files in it."""
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(file) for file in files]
        with (
            explained(self.name, self.revision),
            download_bars(self.name, is_on=self.has_bar) as bars,
        ):
            folder = interruptible(
                lambda: snapshot_download(
                    self.name, revision=self.revision, allow_patterns=patterns, tqdm_class=bars
                ),
                bars,
            )
        return Path(folder)
