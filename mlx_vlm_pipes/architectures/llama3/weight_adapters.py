"""Tensor names of text checkpoints: Hugging Face, mlx-lm and mlx-vlm spell them nearly alike."""

from __future__ import annotations

from mlx_vlm_pipes.weights.layout import TEXT_LAYOUTS, MLXForm

LAYOUTS = TEXT_LAYOUTS
MLX_FORM = MLXForm(("huggingface",))
