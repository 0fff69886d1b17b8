"""README.md of a converted model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_vlm_pipes import __version__
from mlx_vlm_pipes.conversion.measure import Difference
from mlx_vlm_pipes.conversion.recipe import ConvertOptions, Packing


@dataclass(frozen=True)
class Report:
    """What a conversion made. elements: parameters; kept: matrices left as floats."""

    out: Path
    architecture: str
    elements: int
    nbytes: int
    source_bytes: int
    kept: int
    packed: Mapping[str, Packing]
    difference: Difference | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.elements, 1)

    def lines(self) -> list[str]:
        """The figures, one a line."""
        groups = Counter(self.packed.values())
        formats = ", ".join(f"{n} at {describe(kind)}" for kind, n in groups.most_common())
        lines = [
            f"{self.elements:,} parameters, {self.nbytes:,} bytes"
            f" ({self.bits_per_weight:.2f} bits a weight; source {self.source_bytes:,} bytes)",
            f"modules packed: {formats or 'none'}; matrices kept as floats: {self.kept}",
        ]
        if self.difference is not None:
            lines.append(measured(self.difference))
        return lines


def describe(settings: Packing) -> str:
    group_size, bits, mode = settings
    return f"{bits} bits ({mode}, groups of {group_size})"


def measured(difference: Difference) -> str:
    """The comparison in words."""
    seen = "with a picture" if difference.with_image else "of text"
    return (
        f"against the source, on a probe prompt {seen} ({difference.positions} text positions):"
        f" mean KL {difference.mean_kl:.3g} nats, same next token"
        f" at {100 * difference.same_top:.1f} %"
    )


def model_card(report: Report, options: ConvertOptions) -> str:
    """Markdown with the front matter that the hub reads."""
    base = str(options.model)
    is_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    name = Path(base).name
    front = ["---", "library_name: mlx", "pipeline_tag: image-text-to-text", "tags:", "- mlx"]
    front += [f"base_model: {base}"] if is_hub else []
    adapter = f", with the adapter {Path(options.lora).name} merged into it" if options.lora else ""
    rows = [f"- {line[0].upper()}{line[1:]}." for line in report.lines()]
    command = f'python -m mlx_vlm_pipes.generate --model {report.out.name} --prompt "..."'
    return "\n".join(
        [
            *front, "---", "",
            f"# {report.out.name}", "",
            f"Converted from `{name}` ({report.architecture}{adapter}) with"
            f" mlx_vlm_pipes {__version__}, for use with mlx_vlm_pipes, mlx-vlm and mlx-lm.", "",
            *rows, "",
            "```", command + " --image picture.png", "```", "",
        ]
    )  # fmt: skip


def as_dict(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    difference = report.difference
    return {
        "out": str(report.out),
        "parameters": report.elements,
        "bytes": report.nbytes,
        "source_bytes": report.source_bytes,
        "bits_per_weight": round(report.bits_per_weight, 3),
        "packed_modules": len(report.packed),
        "mean_kl": None if difference is None else difference.mean_kl,
        "same_top": None if difference is None else difference.same_top,
    }
