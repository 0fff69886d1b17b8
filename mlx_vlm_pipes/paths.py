"""Paths as people write them, and as what is being written lies beside them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_vlm_pipes.errors import InputError, PipesError, clip

_WRITING = threading.Lock()  # one thread at a time: the hidden names are the process's


def user_path(name: str | os.PathLike[str]) -> Path:
    """The path, with `~` as the home folder; taken as it stands where no such home is known.

    Office calls its lock files `~$name`, and a process may run for a user without a home.
    """
    return Path(os.path.expanduser(name))


def is_there(path: Path, error: type[PipesError]) -> bool:
    """Whether a path of a model names something.

    Raises: `error`, one line, where the system will not say, and for names that are not UTF-8: the
    libraries that read models take no others.
    """
    try:
        str(path).encode()
        os.stat(path)
    except UnicodeEncodeError:
        raise error(f"{clip(path, 200)}: not a name in UTF-8; rename it") from None
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as reason:
        raise error(f"{clip(path, 200)}: cannot be opened ({reason.strerror})") from None
    except ValueError:
        raise error(f"{clip(path, 200)}: cannot be the name of a file") from None
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; it becomes `path` at the end, or disappears.

    A file of this name is replaced, nothing else is. Raises: InputError where it cannot be written,
    and for a device or a folder of this name.
    """
    with _WRITING:
        if is_there(path, InputError) and not path.is_file():
            name = clip(path, 200)
            raise InputError(f"{name} is there and no plain file; choose another name")
        partial = unfinished_path(path)
        try:
            yield partial
            partial.replace(path)
        except OSError as error:
            name = clip(path, 200)
            raise InputError(f"{name}: cannot be written ({error.strerror})") from None
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file by the name that a person gave, whole or not at all. Raises: as `whole_file`."""
    with whole_file(user_path(path).absolute()) as partial:
        partial.write_bytes(data)


def unfinished_path(out: Path) -> Path:
    """A hidden name beside `out` for a file or folder that is not whole yet.

    What killed processes have left under such names for the same `out` is removed.
    """
    prefix = f".{out.name}.incomplete-"
    with suppress(OSError):  # no such parent yet, or one that cannot be listed
        for path in out.parent.iterdir():
            number = path.name.removeprefix(prefix)
            if number == path.name or not number.isdecimal() or _is_running(int(number)):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return out.parent / f"{prefix}{os.getpid()}"


def _is_running(process: int) -> bool:
    """Whether there is such a process, this one not counted: it has not begun."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's
    return True
