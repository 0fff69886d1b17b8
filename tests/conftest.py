"""Settings of the whole suite: real float32, one device (device.py), no network, colours, bars."""

import os

# Newer chips would otherwise round float32 products to TF32. MLX reads it when it is first used.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"  # a slow machine shall not draw bars into a notebook's outputs


def pytest_configure() -> None:
    from tests.device import use_device

    use_device()
