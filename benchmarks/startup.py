"""Import time and cold start, beside mlx-lm and mlx-vlm where they are installed.

    python benchmarks/startup.py [--rounds 5]

Each round starts new processes, interleaved; medians. `cold start` is the whole command
`python -m mlx_vlm_pipes.generate` with the bundled model, from process start to its end.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "python (empty)": ["-c", "pass"],
    "import mlx.core": ["-c", "import mlx.core"],
    "import mlx_vlm_pipes": ["-c", "import mlx_vlm_pipes"],
    "from mlx_vlm_pipes import load": ["-c", "from mlx_vlm_pipes import load"],
    "import mlx_lm": ["-c", "import mlx_lm"],
    "import mlx_vlm": ["-c", "import mlx_vlm"],
    "cold start, picture to text": [
        "-m", "mlx_vlm_pipes.generate", "--image", "examples/images/shapes.png", "--quiet",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    known = {
        name: arguments
        for name, arguments in COMMANDS.items()
        if not name.startswith("import ")
        or importlib.util.find_spec(name.removeprefix("import ").split(".")[0])
    }
    times: dict[str, list[float]] = {name: [] for name in known}
    for i in range(rounds + 1):
        for name, arguments in known.items():
            begun = time.perf_counter()
            command = [sys.executable, *arguments]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
            if i:  # the first round fills the file cache
                times[name].append(time.perf_counter() - begun)
    for name, values in times.items():
        print(f"{name}: {statistics.median(values):.2f} s")


if __name__ == "__main__":
    main()
