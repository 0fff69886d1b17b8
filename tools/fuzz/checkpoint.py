"""From knobs to a model folder, with the families of tools/make_fixtures."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tools.make_fixtures.case import Case, Json, Options, Prompt
from tools.make_fixtures.families import FAMILIES, Family
from tools.make_fixtures.families.family import Arrays, Pictures
from tools.make_fixtures.tokenizer import write_json

from .clips import CLIP_TEXT
from .knobs import QWEN_TEXT, TEXT
from .plain import PLAIN

IMAGE_PROCESSORS = {
    "idefics3": Idefics3ImageProcessorPil,
    "smolvlm": SmolVLMImageProcessorPil,
    "pixtral": PixtralImageProcessorPil,
    "internvl": GotOcr2ImageProcessorPil,
    "qwen2_vl": Qwen2VLImageProcessorPil,
    "qwen2_5_vl": Qwen2VLImageProcessorPil,
    "qwen3_vl": Qwen2VLImageProcessorPil,
}
# Keys of a section that stay even where they say what the class says anyway.
NEEDED = ("model_type", "architectures", "transformers_version", "image_processor_type",
          "processor_class")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder that transformers wrote, and the family that reads prompts for it."""

    family: Family
    folder: Path


def make(family: str, knobs: Json, folder: Path) -> Checkpoint:
    """Write the folder. Whatever transformers raises where it refuses the setting comes through."""
    folder.mkdir(parents=True)
    made = _family(family, knobs, folder)
    made.config().save_pretrained(folder)
    made.save_tokenizer()
    _turn_files(made, knobs)
    made.load_tokenizer()
    made.save_weights(made.new_model(seed=3))
    made.save_config()
    if knobs.get("file.sparse"):
        _drop_defaults(made)
    return Checkpoint(made, folder)


def _family(family: str, knobs: Json, folder: Path) -> Family:
    parts = copy.deepcopy(PLAIN[family])
    options = {"style": "qwen"} if family in QWEN_TEXT else {}
    for name, value in knobs.items():
        section, _, key = name.partition(".")
        if section in ("text", "vision"):
            parts[section].update(value if key.startswith("*") else {key: value})
        elif section == "part":
            parts[key] = value
        elif section == "options":
            options[key] = tuple(value) if isinstance(value, list) else value
    case = Case(family, family, "drawn", _fitted(family, parts), (), options=Options(**options))
    return _turned(FAMILIES[family], knobs)(case, folder)


def _fitted(family: str, parts: Json) -> Json:
    """Fields that follow from others: Qwen's tower ends at the width of the decoder."""
    text = parts["text"]
    head = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    rope = text["rope_parameters"]
    if rope["rope_type"] == "longrope":
        rope["short_factor"] = [1.0 + 0.1 * i for i in range(head // 2)]
        rope["long_factor"] = [1.1 + 0.9 * i * i for i in range(head // 2)]
    if family in ("qwen2_vl", "qwen2_5_vl") and sum(rope.get("mrope_section", ())) != head // 2:
        rope["mrope_section"] = [head // 8, head // 8, head // 2 - 2 * (head // 8)]
    if family in TEXT:
        return text
    if family.startswith("qwen"):
        vision = parts["vision"]
        rows = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
        vision[rows] = parts["text"]["hidden_size"]
        for key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if key in vision:
                vision[key] = [i for i in vision[key] if i < vision["depth"]]
    if parts.get("llm") == "LlamaConfig":
        text.setdefault("attention_bias", False)
        # Llama knows no window, but the cache of transformers' `generate` cuts off at one anyway.
        for key in ("use_sliding_window", "sliding_window", "max_window_layers"):
            text.pop(key, None)
    return parts


def _with_settings(base: type[Family], knobs: Json) -> type[Family]:
    class WithSettings(base):
        @property
        def tile_px(self) -> int:
            frame = knobs.get("image.max_image_size")
            return frame["longest_edge"] if frame else super().tile_px

        def settings(self) -> Json:
            return {**super().settings(), **section(knobs, "image")}

        def video_settings(self) -> Json:
            if self.case.family == "smolvlm" and not self.options.nested_processor:
                return self.settings()  # one flat file for both
            return {**self.settings(), **section(knobs, "video")}

    return WithSettings


def _turned(base: type[Family], knobs: Json) -> type[Family]:
    """The family with its processors' settings turned, its whole config and its clips."""

    class Turned(_with_settings(base, knobs)):
        def config(self) -> transformers.PretrainedConfig:
            config = super().config()
            for key, value in section(knobs, "outer").items():
                setattr(config, key, value)
            return config

        def reload(self) -> transformers.PreTrainedModel:
            model = super().reload()
            if self.case.family == "internvl_chat":
                _widen_qk_norms(model, self.case.config["vision"]["layer_norm_eps"])
            return model

        def template_messages(self, messages: list[Json]) -> list[Json]:
            messages = super().template_messages(messages)
            if self.case.family == "smolvlm":  # whose templates know no part of type video
                return [{**m, "content": [_as_text(p) for p in m["content"]]} for m in messages]
            return messages

        def expand(self, text: str, prompt: Prompt, pictures: Pictures) -> tuple[str, Arrays]:
            if not pictures.videos or self.case.family not in CLIP_TEXT:
                return super().expand(text, prompt, pictures)
            return CLIP_TEXT[self.case.family](self, text, prompt, pictures)

    return Turned


def _widen_qk_norms(model: transformers.PreTrainedModel, eps: float) -> None:
    """The original code gives these norms `layer_norm_eps`; transformers' module always 1e-6."""
    for name, module in model.named_modules():
        if "vision_tower" in name and name.endswith((".q_norm", ".k_norm")):
            module.variance_epsilon = eps


def _as_text(part: Json) -> Json:
    return {"type": "text", "text": "<video>"} if part["type"] == "video" else part


def section(knobs: Json, name: str) -> Json:
    """The turned fields of one section, those of starred knobs one by one."""
    fields: Json = {}
    for key, value in knobs.items():
        head, _, tail = key.partition(".")
        if head == name:
            fields.update(value if tail.startswith("*") else {tail: value})
    return fields


def _turn_files(family: Family, knobs: Json) -> None:
    """Settings that the family does not write by itself, in whichever file it keeps them."""
    if family.case.family == "internvl_chat":
        path = family.folder / "preprocessor_config.json"
        write_json(path, {**json.loads(path.read_text()), **section(knobs, "image")})
    if knobs.get("file.sparse_processor"):
        _thin_processor(family)
    if "file.size" in knobs and not family.options.nested_processor:
        _write_edges(family.folder / "preprocessor_config.json", knobs["file.size"])
    turned = section(knobs, "video")
    flat = family.folder / "video_preprocessor_config.json"
    nested = family.folder / "processor_config.json"
    if turned and flat.exists():
        write_json(flat, {**json.loads(flat.read_text()), **turned})
    elif turned and nested.exists():
        whole = json.loads(nested.read_text())
        if "video_processor" in whole:
            whole["video_processor"].update(turned)
            write_json(nested, whole)


def _write_edges(path: Path, form: str) -> None:
    """Qwen's limits as edges; `both`: the older keys stay and win over stale edges."""
    whole = json.loads(path.read_text())
    edges = {"shortest_edge": whole["min_pixels"], "longest_edge": whole["max_pixels"]}
    if form == "edges":
        del whole["min_pixels"], whole["max_pixels"]
    else:
        edges = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    write_json(path, {**whole, "size": edges})


def _thin_processor(family: Family) -> None:
    """Leave every key out that the class of the image processor has by itself."""
    defaults = IMAGE_PROCESSORS[family.case.family]().to_dict()
    flat = family.folder / "preprocessor_config.json"
    path = flat if flat.exists() else family.folder / "processor_config.json"
    whole = json.loads(path.read_text())
    _thin(whole if path == flat else whole["image_processor"], defaults)
    write_json(path, whole)


def _drop_defaults(family: Family) -> None:
    """Leave every key out of config.json that says what its class says by itself."""
    path = family.folder / "config.json"
    config = json.loads(path.read_text())
    made = family.config()
    _thin(config, type(made)().to_dict())
    for name in ("text_config", "vision_config"):
        if name in config:
            _thin(config[name], type(getattr(made, name))().to_dict())
    write_json(path, config)


def _thin(given: Json, defaults: Json) -> None:
    for key in [k for k in given if k not in NEEDED and not isinstance(given[k], dict)]:
        if key in defaults and defaults[key] == given[key]:
            del given[key]
