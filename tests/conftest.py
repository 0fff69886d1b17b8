"""Settings of the whole suite: real float32, no network, no colours."""

import os

# Newer chips would otherwise round float32 products to TF32.
os.environ["MLX_ENABLE_TF32"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
