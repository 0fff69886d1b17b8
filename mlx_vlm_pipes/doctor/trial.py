"""Loading a model and looking at its logits: what no header can tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlx_vlm_pipes.conversion.measure import text_logits
from mlx_vlm_pipes.doctor.report import Checkup

FLAT = 1e-4  # spread of one position's logits, in units of nothing: a real model has several
ALIKE = 1e-5  # relative difference of all positions' logits


def try_out(folder: Path, checkup: Checkup) -> None:
    """Run the probe prompt, with a picture where the model takes one; findings only."""
    with checkup.collecting("run"):
        logits, _ = text_logits(folder)
        judge(logits, checkup)


def judge(logits: np.ndarray, checkup: Checkup) -> None:
    """Args: logits [n, V] of positions with different prompts before them."""
    broken = int((~np.isfinite(logits)).any(axis=-1).sum())
    if broken:
        checkup.error("run", f"logits are not finite at {broken} of {len(logits)} positions")
        return
    if float(logits.std(axis=-1).max()) < FLAT:
        checkup.error("run", "logits are flat: every token is as likely as any other")
        return
    spread = float(np.abs(logits - logits[:1]).max())
    if len(logits) > 1 and spread < ALIKE * float(np.abs(logits).max()):
        checkup.error("run", "logits are the same at every position: the prompt has no effect")
