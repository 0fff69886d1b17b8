"""From a checkpoint to one in the form of mlx-lm and mlx-vlm: quantised, cast, merged, renamed."""

from mlx_vlm_pipes.conversion.job import Report, convert
from mlx_vlm_pipes.conversion.recipe import RECIPES, ConvertOptions

__all__ = ["RECIPES", "ConvertOptions", "Report", "convert"]
