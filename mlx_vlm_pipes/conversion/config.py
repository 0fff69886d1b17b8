"""config.json of a written checkpoint: the source's, with what mlx-lm and mlx-vlm look for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mlx_vlm_pipes.conversion.recipe import Packing
from mlx_vlm_pipes.conversion.source import Source
from mlx_vlm_pipes.conversion.writer import without_code_keys
from mlx_vlm_pipes.hf_config import HuggingFaceConfig

_TEXT_KEYS = ("text_config", "llm_config")


def written_config(
    source: Source, packed: Mapping[str, Packing], dtype: str | None
) -> dict[str, Any]:
    """The configuration as plain data.

    Args: packed, written module path -> (group size, bits, mode). The commonest settings become
    the general ones, other modules get an entry of their own.
    """
    values = without_code_keys(copy.deepcopy(source.values))
    sections = [values, *(values[k] for k in _TEXT_KEYS if isinstance(values.get(k), dict))]
    for section in sections:
        for key in ("quantization", "quantization_config"):
            section.pop(key, None)
        if dtype is not None and ("dtype" in section or "torch_dtype" in section):
            section.update({"dtype": dtype, "torch_dtype": dtype})
    if dtype is not None:
        values["torch_dtype"] = dtype
    _rename_types(values, source.form.model_types)
    _spell_out(values, HuggingFaceConfig(source.values), HuggingFaceConfig(values))
    _spell_rope(sections[-1])
    if not source.tied or any("tie_word_embeddings" in section for section in sections):
        for section in sections:
            section["tie_word_embeddings"] = source.tied
    if source.form.flat_text:
        values = {**sections[-1], **values}
    if packed:
        values["quantization"] = quantization_entry(packed)
        values["quantization_config"] = values["quantization"]
    return values


def _rename_types(values: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give the model and its vision part the `model_type` that mlx-vlm knows them by."""
    vision = values.get("vision_config")
    for section in (values, *([vision] if isinstance(vision, dict) else [])):
        kind = str(section.get("model_type"))
        section["model_type"] = names.get(kind, section.get("model_type"))
        if section["model_type"] is None:
            del section["model_type"]


def _spell_out(values: dict[str, Any], old: HuggingFaceConfig, new: HuggingFaceConfig) -> None:
    """Write keys that the source leaves to its types where the renamed ones mean another value."""
    for key, value in old.implied.items():
        if new.implied.get(key) != value:
            values[key] = value
    for key, part in old.parts.items():
        _spell_out(values[key], part, new.parts[key])


def quantization_entry(packed: Mapping[str, Packing]) -> dict[str, Any]:
    """`{"group_size": 64, "bits": 4, "mode": "affine", "<module>": {...}, ...}`."""
    (common, _), *_ = Counter(packed.values()).most_common(1)
    others = {path: _entry(settings) for path, settings in packed.items() if settings != common}
    return {**_entry(common), **others}


def _entry(settings: Packing) -> dict[str, Any]:
    return dict(zip(("group_size", "bits", "mode"), settings, strict=True))


def _spell_rope(text: dict[str, Any]) -> None:
    """Add the names of transformers 4, which are the only ones that mlx-lm and mlx-vlm read."""
    rope = text.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return
    if "rope_theta" in rope:
        text.setdefault("rope_theta", rope["rope_theta"])
    rest = {key: value for key, value in rope.items() if key != "rope_theta"}
    kind = rest.get("rope_type", rest.get("type", "default"))
    if kind != "default" or "mrope_section" in rest:
        if "mrope_section" in rest:
            kind = "mrope"
        text.setdefault("rope_scaling", {**rest, "type": kind, "rope_type": kind})
