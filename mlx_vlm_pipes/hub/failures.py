"""What is said where the hub gives no model: one line for each reason."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_vlm_pipes.errors import CheckpointError, CheckpointNotFound, clip

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Unreachable(Exception):
    """The hub gives no answer now: a copy in the cache will do. is_wanted: the user said so."""

    def __init__(self, reason: str, advice: str, *, is_wanted: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.advice, self.is_wanted = reason, advice, is_wanted


@contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """Raises: CheckpointNotFound or Unreachable for whatever the hub's library raises within."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of three HTTP libraries, by its version, and of Xet
        raise explain(error, name, revision) from None


def explain(error: BaseException, name: str, revision: str | None) -> Exception:
    """A sentence for an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    host = constants.ENDPOINT.partition("://")[2]
    cause = _cause(error)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return Unreachable("HF_HUB_OFFLINE is set", "unset it to ask the hub", is_wanted=True)
    if isinstance(cause, errors.HFValidationError):
        return CheckpointNotFound(f"{name!r} is neither a folder nor a hub id")
    if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
        return _refused(cause, cause.response.status_code, name, revision, host)
    if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
        return _unwritable(cause.strerror or "", constants.HF_HUB_CACHE)
    if "No space left" in str(cause):  # Xet's own error
        return _unwritable("No space left on device", constants.HF_HUB_CACHE)
    text = clip(" ".join(str(cause).split()), 100)
    return Unreachable(
        f"{host} cannot be reached, or the connection broke ({type(cause).__name__}: {text})",
        "check the network and run it again, files that are whole are kept",
    )


def _refused(
    error: Exception, status: int, name: str, revision: str | None, host: str
) -> Exception:
    """A sentence for an answer of the hub that is none."""
    from huggingface_hub import constants, errors, get_token

    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        way = "as the user of your token" if get_token() else f"and {LOG_IN}"
        return CheckpointNotFound(f"{name} is gated: accept its licence at {page} {way}")
    if isinstance(error, errors.DisabledRepoError):
        return CheckpointNotFound(f"{page} has been closed by the hub; take another model")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFound(
            f"{name} on the hub has no branch, tag or commit '{clip(revision)}'"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        way = "your token may not read it" if get_token() else LOG_IN
        return CheckpointNotFound(
            f"no folder {name!r} here, and no such model at {host}, or a private one: check"
            f" the name; for a private one {way}"
        )
    if status in (401, 403):
        return CheckpointNotFound(
            f"{host} refuses the token ({status}): renew it with `hf auth login` or in HF_TOKEN;"
            " public models need none"
        )
    if status == 429:
        return Unreachable(f"{host} takes no more requests now (429)", f"wait, or {LOG_IN}")
    if status >= 500:
        return Unreachable(f"{host} is out of order ({status})", "try again later")
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
