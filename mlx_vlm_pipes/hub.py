"""Models from the Hugging Face hub: what is downloaded of a repository, and what is said where
that cannot be.

The cache, the token and the server are huggingface_hub's: HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE. Never a pickle, never code: what is not listed here is not downloaded.
"""

from __future__ import annotations

import errno
import glob
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.errors import CheckpointError, CheckpointNotFound, PipesWarning, clip
from mlx_vlm_pipes.gguf.header import SUFFIX
from mlx_vlm_pipes.progress import DELAY_S, erase, style
from mlx_vlm_pipes.weights.files import find_weight_files
from mlx_vlm_pipes.weights.safetensors import INDEX_NAME, read_index

TEXTS = (".json", ".jinja")  # beside the weights: configuration, tokenizer, chat template
VOCABULARIES = ("tokenizer.model", "merges.txt", "vocab.txt")
WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_LISTED = 4  # names in one message
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


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
    except _Unreachable as error:
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


class _Unreachable(Exception):
    """The hub gives no answer now: a copy in the cache will do. is_wanted: the user said so."""

    def __init__(self, reason: str, advice: str, *, is_wanted: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.advice, self.is_wanted = reason, advice, is_wanted


@dataclass(frozen=True)
class Repository:
    """One model of the hub, at a revision (a branch, a tag or a commit; None: the main branch)."""

    name: str
    revision: str | None
    has_bar: bool

    def folder(self) -> Path:
        """Its folder, or its only GGUF file. Raises: CheckpointNotFound, _Unreachable."""
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
        """One file of it. Raises: CheckpointNotFound, _Unreachable."""
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

        with _explained(self):
            info = HfApi().model_info(self.name, revision=self.revision)
        return [sibling.rfilename for sibling in info.siblings or []]

    def _read_index(self) -> Sequence[str]:
        """The files that the index names. Raises: WeightsError for a broken one."""
        return sorted(set(read_index(self._fetch([INDEX_NAME]) / INDEX_NAME).values()))

    def _fetch(self, files: Sequence[str]) -> Path:
        """The folder in the cache, with these files in it."""
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(file) for file in files]
        with _explained(self), _bars(self) as bars:
            folder = _interruptible(
                lambda: snapshot_download(
                    self.name, revision=self.revision, allow_patterns=patterns, tqdm_class=bars
                ),
                bars,
            )
        return Path(folder)


def weight_files(files: Sequence[str], index: Callable[[], Sequence[str]] | None) -> list[str]:
    """What of a repository's files are the model's weights, in safetensors; empty for none.

    The index's, else `model.safetensors`, else what is called `model*`, else all that loading
    would take. Folders hold other layouts of the same model, or its parts for other programs.
    """
    if index is not None:
        return list(index())
    top = [file for file in files if file.endswith(WEIGHTS) and "/" not in file]
    if "model.safetensors" in top:
        return ["model.safetensors"]
    named = [file for file in top if file.startswith("model")]
    return named or [f for f in top if not f.startswith(("consolidated", "adapter", "."))]


def is_text(file: str) -> bool:
    return file.endswith(TEXTS) or file in VOCABULARIES


def no_weights(name: str, files: Sequence[str]) -> str:
    """What a repository without usable weights has instead, and what to do."""
    ggufs = [file for file in files if file.endswith(SUFFIX) and "mmproj" not in file]
    if ggufs:
        return (
            f"holds GGUF files ({some(ggufs)}); name one of them, as {name}/{clip(ggufs[0], 120)}"
        )
    adapters = [file for file in files if file.startswith("adapter") and file.endswith(WEIGHTS)]
    if adapters:
        return "is an adapter, not a model; download it, and give its folder as adapter="
    if any(file.startswith("consolidated") for file in files):
        return "has the maker's own layout only (consolidated); take the one for transformers"
    if any(file.endswith(WEIGHTS) for file in files):
        return "has weights in subfolders only; it is no single model for transformers or MLX"
    if any(file.endswith(PICKLES) for file in files):
        return (
            "has PyTorch pickles only, which are never read because they can run code; look for"
            " the same model in safetensors"
        )
    return f"has no weights in safetensors ({len(files)} files)"


def some(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(clip(name, 60) for name in names[:MAX_LISTED]) + more


# ---- errors


@contextmanager
def _explained(place: Repository) -> Iterator[None]:
    """Raises: CheckpointNotFound or _Unreachable for whatever the hub's library raises within."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of three HTTP libraries, by its version, and of Xet
        raise explain(error, place) from None


def explain(error: BaseException, place: Repository) -> Exception:
    """A sentence for an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2]
    cause = _cause(error)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return _Unreachable("HF_HUB_OFFLINE is set", "unset it to ask the hub", is_wanted=True)
    if isinstance(cause, errors.HFValidationError):
        return CheckpointNotFound(f"{place.name!r} is neither a folder nor a hub id")
    if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
        return _refused(cause, cause.response.status_code, place, host)
    if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
        return _unwritable(cause.strerror or "", constants.HF_HUB_CACHE)
    if "No space left" in str(cause):  # Xet's own error
        return _unwritable("No space left on device", constants.HF_HUB_CACHE)
    text = clip(" ".join(str(cause).split()), 100)
    return _Unreachable(
        f"{host} cannot be reached, or the connection broke ({type(cause).__name__}: {text})",
        "check the network and run it again, files that are whole are kept",
    )


def _refused(error: Exception, status: int, place: Repository, host: str) -> Exception:
    """A sentence for an answer of the hub that is none."""
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{place.name}"
    if isinstance(error, errors.GatedRepoError):
        way = "as the user of your token" if get_token() else f"and {LOG_IN}"
        return CheckpointNotFound(f"{place.name} is gated: accept its licence at {page} {way}")
    if isinstance(error, errors.DisabledRepoError):
        return CheckpointNotFound(f"{page} has been closed by the hub; take another model")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFound(
            f"{place.name} on the hub has no branch, tag or commit '{clip(place.revision)}'"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        way = "your token may not read it" if get_token() else LOG_IN
        return CheckpointNotFound(
            f"no folder {place.name!r} here, and no such model at {host}, or a private one: check"
            f" the name; for a private one {way}"
        )
    if status in (401, 403):
        return CheckpointNotFound(
            f"{host} refuses the token ({status}): renew it with `hf auth login` or in HF_TOKEN;"
            " public models need none"
        )
    if status == 429:
        return _Unreachable(f"{host} takes no more requests now (429)", f"wait, or {LOG_IN}")
    if status >= 500:
        return _Unreachable(f"{host} is out of order ({status})", "try again later")
    return CheckpointNotFound(f"{page}: the hub answers {status}")


def _cause(error: BaseException) -> BaseException:
    """What lies behind: the hub's library wraps one of its errors into another."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _unwritable(reason: str, cache: str) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"the cache {clip(cache, 120)} cannot be written ({reason}): make room there, or"
        " set HF_HOME to a folder on another disk"
    )


# ---- the bar, and Ctrl-C


@contextmanager
def _bars(place: Repository) -> Iterator[type[Any]]:
    """The class that the hub's library is to make its bars of: one is shown, that of the bytes."""
    from huggingface_hub.utils import tqdm

    made: list[Any] = []
    begun = time.monotonic()

    class Bytes(tqdm):
        is_cancelled = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            is_bytes = kwargs.get("unit") == "B" and "transfer" not in str(kwargs.get("name"))
            kwargs |= {"desc": f"downloading {place.name}", **style("B")}
            kwargs["disable"] = not (place.has_bar and is_bytes)
            super().__init__(*args, **kwargs)
            made.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            """Raises: InterruptedError, which ends the thread that downloads."""
            if type(self).is_cancelled:
                raise InterruptedError
            return super().update(n)

        def refresh(self, *args: Any, **kwargs: Any) -> Any:
            """What is in the cache already needs no bar."""
            if self.disable or time.monotonic() - begun < DELAY_S:
                return True
            return super().refresh(*args, **kwargs)

        def set_description(self, *_: Any, **__: Any) -> None:
            """It keeps its own."""

        set_description_str = set_postfix_str = set_description

    try:
        yield Bytes
    finally:
        for bar in made:
            erase(bar)


def _interruptible(work: Callable[[], str], bars: type[Any]) -> str:
    """What `work` returns, or raises. Ctrl-C cancels it through its bars: the hub's library itself
    would finish the files that it has begun, however large they are."""
    made: Future[str] = Future()

    def run() -> None:
        try:
            made.set_result(work())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return made.result()
    except KeyboardInterrupt:
        bars.is_cancelled = True
        with suppress(ImportError):  # Xet's threads, of huggingface_hub 2, are not Python's
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()
        raise
