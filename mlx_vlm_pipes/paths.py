"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_vlm_pipes.errors import PipesError, clip


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
