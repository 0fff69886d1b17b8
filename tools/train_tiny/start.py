"""Begin a training with the weights of another checkpoint, where the two architectures agree."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText

from .family import Family

# Pixel normalisation of the two ViTs that share a tower: mean, standard deviation.
SIGLIP_PIXELS = (0.5, 0.5)
IMAGENET_PIXELS = (torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225)))

DECODER_PREFIX = r"^model\.(text_model|language_model)\."
IDEFICS3_TO_INTERNVL = (
    (r"^model\.vision_model\.", "model.vision_tower."),
    (r"encoder\.layers\.", "encoder.layer."),
    (r"self_attn\.out_proj", "attention.projection_layer"),
    (r"self_attn\.", "attention."),
    (r"layer_norm1", "layernorm_before"),
    (r"layer_norm2", "layernorm_after"),
    (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
)
QWEN_TO_PIXTRAL = (
    (r"^model\.visual\.blocks\.", "model.vision_tower.transformer.layers."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.", ".feed_forward."),
    (r"\.norm1\.", ".attention_norm."),
    (r"\.norm2\.", ".ffn_norm."),
    (r"^model\.visual\.patch_embed\.proj\.", "model.vision_tower.patch_conv."),
)


def start_from(model: torch.nn.Module, family: Family, source: Path) -> int:
    """Copy what agrees in name (after renaming) and shape; embeddings are matched by token.

    Returns: how many parameters were set.
    """
    other = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    given = _renamed(other.state_dict(), other.config.model_type, family.name)
    old_ids = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    pairs = [(i, old_ids[t]) for t, i in family.tokenizer.get_vocab().items() if t in old_ids]
    new_rows, old_rows = (torch.tensor(side) for side in zip(*pairs, strict=True))
    count = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = given.get(re.sub(DECODER_PREFIX, "decoder.", name))
            if value is None:
                continue
            if "embed_tokens" in name or "lm_head" in name:
                parameter[new_rows] = value[old_rows]
            elif value.shape == parameter.shape:
                parameter.copy_(value)
            else:
                continue
            count += 1
    return count


def _renamed(state: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    """State by the target's names; decoders under one name."""
    rules = ()
    if (source, target) == ("idefics3", "internvl"):
        state, rules = _internvl_tower(state), IDEFICS3_TO_INTERNVL
    if (source, target) == ("qwen2_5_vl", "pixtral"):
        state, rules = _pixtral_tower(state), QWEN_TO_PIXTRAL
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in ((DECODER_PREFIX, "decoder."), *rules):
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _internvl_tower(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SigLIP's patch embedding for pixels of another normalisation, layer scales of one."""
    state = dict(state)
    (old_mean, old_std), (mean, std) = SIGLIP_PIXELS, IMAGENET_PIXELS
    stem = "model.vision_model.embeddings."
    weight = state[stem + "patch_embedding.weight"]
    shift = (weight * ((mean - old_mean) / old_std)[:, None, None]).sum((1, 2, 3))
    state[stem + "patch_embedding.weight"] = weight * (std / old_std)[:, None, None]
    state[stem + "patch_embedding.bias"] = state[stem + "patch_embedding.bias"] + shift
    places = state[stem + "position_embedding.weight"]
    first = torch.zeros(1, places.shape[1])  # the class token, which SigLIP lacks
    state["model.vision_tower.embeddings.position_embeddings"] = torch.cat([first, places])[None]
    for name in [n for n in state if n.endswith("layer_norm1.weight")]:
        for which in ("lambda_1", "lambda_2"):
            scale = torch.ones(places.shape[1])
            state[name.replace("layer_norm1.weight", which)] = scale
    return state


def _pixtral_tower(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen's fused projection in three parts, its two equal frames as one."""
    split = dict(state)
    for name, value in state.items():
        if name.endswith("attn.qkv.weight"):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                split[name.replace("qkv", f"{letter}_proj")] = part
    stem = "model.visual.patch_embed.proj.weight"
    split[stem] = state[stem].sum(2)
    return split
