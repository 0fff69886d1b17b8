"""The layout of the original InternVLChatModel repositories; the model that runs is the same."""

import torch
import transformers
from safetensors.torch import load_file, save_file

from ..case import Json
from ..hub_config import spread_rope
from ..tokenizer import write_json
from .internvl import InternVL

# Transformers names and the original ones. Order matters: longer prefixes first.
HEADS = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("model.vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    ("model.vision_tower.embeddings.position_embeddings",
     "vision_model.embeddings.position_embedding"),
    ("model.vision_tower.embeddings.patch_embeddings.projection.",
     "vision_model.embeddings.patch_embedding."),
    ("model.vision_tower.encoder.layer.", "vision_model.encoder.layers."),
)  # fmt: skip
LAYER_PARTS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "attention": "attn",
    "projection_layer": "proj",
}
LLM_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def original_name(name: str) -> str:
    """The original name of a tensor; q, k and v keep names of their own until they are fused."""
    head, new_head = next(pair for pair in HEADS if name.startswith(pair[0]))
    tail = name.removeprefix(head)
    if new_head == "vision_model.encoder.layers.":
        tail = ".".join(LAYER_PARTS.get(part, part) for part in tail.split("."))
    return new_head + tail


class InternVLChat(InternVL):
    style = "internvl_chat"
    processor_class = None
    template_in = "tokenizer_config"
    placeholder = "<image>"

    def template_messages(self, messages: list[Json]) -> list[Json]:
        """The original template takes strings, with `<image>` and a line break for an image."""
        return [{**m, "content": _flat(m["content"])} for m in messages]

    def write_processor(self) -> None:
        size = {"crop_size": self.tile_px, "size": self.tile_px}
        settings = {
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
        }
        write_json(self.folder / "preprocessor_config.json", {**settings, **size})

    def save_weights(self, model: transformers.PreTrainedModel) -> None:
        tensors = {}
        for name, value in model.state_dict().items():
            if not (self.is_tied and name == "lm_head.weight"):
                tensors[original_name(name)] = value.to(getattr(torch, self.options.dtype))
        for q_name in [n for n in tensors if n.startswith("vision_model") and ".q_proj." in n]:
            three = [tensors.pop(q_name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            tensors[q_name.replace("q_proj", "qkv")] = torch.cat(three)
        path = self.folder / "model.safetensors"
        save_file(tensors, str(path), metadata={"format": "pt"})
        path.chmod(0o644)

    def save_config(self) -> None:
        super().save_config()  # for generation_config.json
        text = self.config().text_config.to_dict()
        spread_rope(text)
        for key in ("layer_types", "dtype", "transformers_version", "_name_or_path"):
            text.pop(key, None)
        text["torch_dtype"] = self.options.dtype
        text["architectures"] = [LLM_CLASSES[text["model_type"]]]
        text["tie_word_embeddings"] = self.is_tied
        module = "modeling_internvl_chat.InternVLChatModel"
        config = {
            "architectures": ["InternVLChatModel"],
            "auto_map": {"AutoModel": module, "AutoModelForCausalLM": module},
            "downsample_ratio": 0.5,
            "dynamic_image_size": True,
            "force_image_size": self.tile_px,
            "llm_config": text,
            "max_dynamic_patch": self.options.max_patches,
            "min_dynamic_patch": 1,
            "model_type": "internvl_chat",
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": "internvl2_5",
            "tie_word_embeddings": self.is_tied,
            "torch_dtype": self.options.dtype,
            "transformers_version": None,
            "use_thumbnail": True,
            "vision_config": self._vision(),
        }
        write_json(self.folder / "config.json", config)

    def _vision(self) -> Json:
        fields = self.case.config["vision"]
        same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        return {
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            "image_size": self.tile_px,
            "layer_norm_eps": fields["layer_norm_eps"],
            "model_type": "intern_vit_6b",
            "norm_type": fields["norm_type"],
            "num_channels": 3,
            "patch_size": fields["patch_size"][0],
            "qk_normalization": fields.get("use_qk_norm", False),
            "qkv_bias": fields["attention_bias"],
            "torch_dtype": self.options.dtype,
            "use_flash_attn": True,
            **{key: fields[key] for key in same},
        }

    def reload(self) -> transformers.PreTrainedModel:
        config = self.config()
        config._attn_implementation = "eager"
        model = transformers.InternVLForConditionalGeneration._from_config(config).float().eval()
        stored = load_file(str(self.folder / "model.safetensors"))
        for name in [n for n in stored if ".qkv." in n]:
            for letter, part in zip("qkv", stored.pop(name).chunk(3), strict=True):
                stored[name.replace("qkv", f"{letter}_proj")] = part
        if self.is_tied:
            tied = stored["language_model.model.embed_tokens.weight"]
            stored["language_model.lm_head.weight"] = tied
        names = {original_name(name): name for name in model.state_dict()}
        model.load_state_dict({names[name]: value for name, value in stored.items()})
        return model


def _flat(content: str | list[Json]) -> str:
    if isinstance(content, str):
        return content
    return "".join("<image>\n" if p["type"] == "image" else p["text"] for p in content)
