"""Whether MLX can compile on this machine's CPU, tried once in a process.

MLX's CPU backend writes C++ into the folder of temporary files and runs g++ on it, at the first
use of every compiled function; what is in the way would end every request.
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings
import zlib
from pathlib import Path

import mlx.core as mx

from mlx_vlm_pipes.errors import PipesWarning, clip

TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # as std::filesystem asks for them


@functools.cache
def cpu_compiles() -> bool:
    """False without g++, and where it or the folder of temporary files fails; that is said once.

    In that case MLX is told not to compile at all, in the whole process: mlx.nn's own activations
    are compiled functions too, and would fail. (Without g++ MLX does so by itself.)
    """
    compiler = shutil.which("g++")
    if compiler is None:
        return False
    try:
        _try(compiler)
    except (OSError, RuntimeError) as error:
        said = str(error).rpartition("the output is: ")[2]  # g++'s own words, where there are any
        reason = clip(" ".join(said.split()), 160)
        warnings.warn(
            f"MLX cannot compile on this CPU ({reason}); decoding runs uncompiled and slower",
            PipesWarning,
            stacklevel=2,
        )
        mx.disable_compile()
        return False
    return True


def _try(compiler: str) -> None:
    """Compile a kernel that is this compiler's own: MLX keeps what it has compiled for good."""
    folder = Path(next((os.environ[n] for n in TEMPORARY if os.environ.get(n)), "/tmp"))
    kept = folder / "mlx" / mx.__version__ / "cpu"  # pyright: ignore[reportAttributeAccessIssue]  # not in the stubs
    if kept.is_dir() and not os.access(kept, os.W_OK | os.X_OK):
        raise PermissionError(f"{kept} is not writable")
    found = os.stat(compiler)
    identity = zlib.crc32(f"{compiler} {found.st_size} {found.st_mtime_ns}".encode())
    scale = 1 + identity % 2**20 / 2**20
    with mx.stream(mx.cpu):
        kernel = mx.compile(lambda x: mx.abs(x * scale + 1))
        mx.eval(kernel(mx.zeros(3)))
