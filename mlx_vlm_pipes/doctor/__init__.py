"""What is in a model folder, and what is wrong with it, without reading a single tensor."""

from mlx_vlm_pipes.doctor.examine import examine
from mlx_vlm_pipes.doctor.report import Checkup, Finding

__all__ = ["Checkup", "Finding", "examine"]
