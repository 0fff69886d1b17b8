"""config.json as transformers 4 wrote it and as it lies on the hub today."""

import copy

from .case import Json

VERSIONS = {"qwen2_vl": "4.41.2", "qwen3_vl": "4.57.0.dev0"}  # that wrote the released files


def hub_config(config: Json, family: str, sparse: dict[str, tuple[str, ...]]) -> Json:
    """A version 5 config in version 4 spelling; `sparse` names keys to leave out, by section."""
    config = copy.deepcopy(config)
    for part in [config, *(config[k] for k in ("text_config", "vision_config") if k in config)]:
        if "dtype" in part and family != "qwen3_vl":  # younger than the new spelling
            part["torch_dtype"] = part.pop("dtype")
        spread_rope(part)
        for key in ("layer_types", "_name_or_path", "transformers_version"):
            part.pop(key, None)
    config["transformers_version"] = VERSIONS.get(family, "4.51.3")
    if "vision_config" in config:
        config = _hub_vision(config, family)
    for section, keys in sparse.items():
        for key in keys:
            config[section].pop(key, None)
    return config


def spread_rope(part: Json) -> None:
    """Replace `rope_parameters` by `rope_theta` and `rope_scaling`, in place."""
    rope = dict(part.pop("rope_parameters", None) or {})
    if not rope:
        return
    part["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    rope.pop("type", None)
    if "partial_rotary_factor" in rope:
        part["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if "mrope_interleaved" in rope:
        part["rope_scaling"] = {**rope, "rope_type": kind}
    elif "mrope_section" in rope and kind == "default":
        part["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    elif kind in ("default", "axial"):
        part["rope_scaling"] = None
    else:
        if kind == "longrope":
            rope.pop("original_max_position_embeddings", None)  # it stands one level up
        # Older kinds were written with the key `type`.
        part["rope_scaling"] = {"rope_type" if kind == "llama3" else "type": kind, **rope}


def _hub_vision(config: Json, family: str) -> Json:
    vision = config["vision_config"]
    vision.pop("rope_scaling", None)
    if family != "pixtral":
        vision.pop("rope_theta", None)
    if family == "idefics3":
        vision["model_type"] = "idefics3"
    if family == "qwen3_vl":
        vision["model_type"] = "qwen3_vl"
    if family in ("qwen2_vl", "qwen2_5_vl"):
        vision["in_chans"] = vision.pop("in_channels", 3)
        vision["spatial_patch_size"] = vision["patch_size"]
        vision["model_type"] = family
        vision.pop("initializer_range", None)
        text = config.pop("text_config")
        text.pop("model_type", None)
        config = {**text, **config}  # the text fields stood at the top level
    return config
