"""The shared processing pulls in neither MLX nor torch, and PIL and jinja2 only when used."""

import subprocess
import sys

SCRIPT = """
import sys
from mlx_vlm_pipes.processing import base, chat_template, fetch, images, video
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"mlx", "torch", "transformers", "PIL", "jinja2", "tokenizers", "av"}))
"""


def test_imports_stay_light() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
