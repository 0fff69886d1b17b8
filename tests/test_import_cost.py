"""Importing the package is cheap, and answering a prompt never imports torch or transformers."""

import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = (
    "torch", "transformers", "mlx_lm", "mlx_vlm", "PIL", "cv2", "tokenizers", "safetensors",
    "mlx.core",
)  # fmt: skip
NEVER = ("torch", "transformers", "mlx_lm", "mlx_vlm", "cv2")


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_is_cheap_and_light() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import mlx_vlm_pipes;"
        "spent = time.perf_counter() - t; mlx_vlm_pipes.__all__;"
        f"print(spent, [m for m in {HEAVY} if m in sys.modules])"
    )
    outputs = [run(code).split(maxsplit=1) for _ in range(3)]
    assert statistics.median(float(o[0]) for o in outputs) < 0.25
    assert all(o[1].strip() == "[]" for o in outputs)


def test_an_answer_needs_no_torch_even_where_it_is_installed() -> None:
    code = (
        "import sys; from mlx_vlm_pipes.generate import main;"
        "assert main(['--image', 'examples/images/shapes.png', '--quiet']) == 0;"
        f"print([m for m in {NEVER} if m in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "[]"


def test_commands_are_at_hand_at_once() -> None:
    # Ctrl-C is answered in main: a large import before it would leave a traceback instead
    names = ("generate", "chat", "convert", "check", "bench", "serve")
    imports = "; ".join(f"import mlx_vlm_pipes.{name}" for name in names)
    heavy = "[name for name in ('numpy', 'PIL', 'mlx') if name in sys.modules]"
    assert run(f"import sys; {imports}; print({heavy})").strip() == "[]"
