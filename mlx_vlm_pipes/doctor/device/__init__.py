"""What a machine computes, against stored numbers and against itself: whether it can be trusted."""

from mlx_vlm_pipes.doctor.device.parts import PARTS, run_part
from mlx_vlm_pipes.doctor.device.report import Check, DeviceReport, Recorder
from mlx_vlm_pipes.doctor.device.run import examine_device

__all__ = ["PARTS", "Check", "DeviceReport", "Recorder", "examine_device", "run_part"]
