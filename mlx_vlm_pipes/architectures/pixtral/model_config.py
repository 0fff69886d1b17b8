"""PixtralConfig: a Pixtral tower, a projector and a Mistral decoder, in one flat class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.architectures.decoder_fields import DecoderFields
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config, bounded_max_seq_len
from mlx_vlm_pipes.architectures.pixtral.facts import FACTS
from mlx_vlm_pipes.architectures.pixtral.sizes import PatchSizes
from mlx_vlm_pipes.architectures.vision_language_config import VisionLanguageConfig
from mlx_vlm_pipes.checkpoint.tie import declared_tied
from mlx_vlm_pipes.config import KVCacheParams, MAXModelConfig, PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel, shown
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    activation_name,
    axial_theta,
    lookup,
    optional_int,
    position_limit,
    require,
    require_int,
    text_config,
)
from mlx_vlm_pipes.interfaces import ReturnLogits
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.rope import Llama3RopeScalingParams, LongRoPEScalingParams
from mlx_vlm_pipes.nn.rope_scaling import DynamicRope, LinearRope, YarnRope

if TYPE_CHECKING:
    from typing_extensions import Self

_TEXT_TYPES = ("mistral", "llama")


@dataclass(kw_only=True)
class PixtralConfig(DecoderFields, VisionLanguageConfig):
    """What the model reads. Sizes in elements, lengths in tokens, image and patch in pixels.

    The fields below `return_logits` are ours; the documented ones stand above. image_size is the
    stride of `vision_position_ids`, not a limit. vision_feature_layers: hidden states that the
    projector reads side by side, 0 being the tower's input and -1 its output.
    """

    facts = FACTS
    dtype: DType
    devices: list[DeviceRef]
    image_token_index: int
    hidden_size: int
    num_attention_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_seq_len: int
    num_hidden_layers: int
    head_dim: int
    num_key_value_heads: int
    feed_forward_length: int
    vocab_size: int
    kv_params: KVCacheParams
    attention_multiplier: float
    patch_size: int
    image_size: int
    num_channels: int
    vision_hidden_size: int
    vision_num_attention_heads: int
    vision_rope_theta: float
    vision_num_hidden_layers: int
    vision_intermediate_size: int
    vision_head_dim: int
    return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN
    hidden_act: str = "silu"
    rope_scaling_params: Llama3RopeScalingParams | None = None
    longrope_scaling_params: LongRoPEScalingParams | None = None
    more_rope_scaling: LinearRope | YarnRope | DynamicRope | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    vision_hidden_act: str = "gelu"
    vision_feature_layers: tuple[int, ...] = (-1,)
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True

    @classmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> Self:
        """From a LLaVA configuration with a Pixtral tower.

        Raises: ConfigError for missing keys and values that contradict each other,
        UnsupportedModel for another tower, decoder or way of selecting features.
        """
        cfg, text_cfg = huggingface_config, text_config(huggingface_config)
        max_seq_len = cls._bounded(cfg, pipeline_config.model)
        kind = lookup(text_cfg, "model_type", default="mistral")
        if kind not in _TEXT_TYPES:
            raise UnsupportedModel(
                f"pixtral: text_config of model_type {shown(kind)}; "
                f"supported: {', '.join(_TEXT_TYPES)}"
            )
        text = Llama3Config.initialize_from_config(pipeline_config, text_cfg)
        return cls(
            dtype=text.dtype,
            devices=text.devices,
            image_token_index=require_int(cfg, "image_token_index", "image_token_id", minimum=0),
            hidden_size=text.hidden_size,
            num_attention_heads=text.num_attention_heads,
            rms_norm_eps=float(require(text_cfg, "rms_norm_eps")),
            rope_theta=text.rope_theta,
            max_seq_len=max_seq_len,
            num_hidden_layers=text.num_hidden_layers,
            head_dim=text.kv_params.head_dim,
            num_key_value_heads=text.num_key_value_heads,
            feed_forward_length=text.intermediate_size,
            vocab_size=text.vocab_size,
            kv_params=text.kv_params,
            attention_multiplier=text.kv_params.head_dim**-0.5,
            hidden_act=text.hidden_act,
            rope_scaling_params=text.rope_scaling_params,
            longrope_scaling_params=text.longrope_scaling_params,
            more_rope_scaling=text.more_rope_scaling,
            partial_rotary_factor=text.partial_rotary_factor,
            sliding_window=text.sliding_window,
            sliding_layers=text.sliding_layers,
            attention_bias=bool(lookup(text_cfg, "attention_bias", default=False)),
            mlp_bias=bool(lookup(text_cfg, "mlp_bias", default=False)),
            tie_word_embeddings=declared_tied(cfg, text_cfg),
            **_vision_fields(cfg),
            **_projector_fields(cfg),
        )

    @staticmethod
    def calculate_max_seq_len(
        pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """The decoder's limit, or the smaller one asked for. Raises: ConfigError above it."""
        return PixtralConfig._bounded(huggingface_config, pipeline_config.model)

    @staticmethod
    def _bounded(huggingface_config: AutoConfig, model_config: MAXModelConfig) -> int:
        limit = position_limit(text_config(huggingface_config))
        return bounded_max_seq_len("Pixtral", limit, model_config.max_length)

    def decoder_config(self) -> DecoderConfig:
        """The text side in the terms of the shared decoder."""
        plain = self.plain_decoder(self.head_dim, self.feed_forward_length)
        return replace(plain, norm_eps=self.rms_norm_eps, o_bias=self.attention_bias)


def _vision_fields(cfg: AutoConfig) -> dict[str, Any]:
    """The tower's fields. Raises: ConfigError, UnsupportedModel for a tower that is not Pixtral."""
    sizes, vision = PatchSizes.read(cfg), cfg.vision_config
    kind = lookup(vision, "model_type", default="pixtral")
    if kind != "pixtral":
        raise UnsupportedModel(f"vision_config of model_type {shown(kind)}; supported: 'pixtral'")
    hidden = optional_int(vision, "hidden_size", default=1024)
    heads = optional_int(vision, "num_attention_heads", default=16)
    head_dim = optional_int(vision, "head_dim", default=hidden // heads)
    if head_dim % 4:
        raise ConfigError(f"vision head_dim {head_dim}; two rotary axes need a multiple of 4")
    layers = optional_int(vision, "num_hidden_layers", default=24)
    return {
        "patch_size": sizes.patch_size,
        "image_size": sizes.image_size,
        "num_channels": optional_int(vision, "num_channels", default=3),
        "vision_hidden_size": hidden,
        "vision_num_attention_heads": heads,
        "vision_rope_theta": axial_theta(vision),
        "vision_num_hidden_layers": layers,
        "vision_intermediate_size": optional_int(vision, "intermediate_size", default=4096),
        "vision_head_dim": head_dim,
        "vision_hidden_act": activation_name(vision, "hidden_act", default="gelu"),
        "vision_feature_layers": _feature_layers(cfg, layers),
    }


def _projector_fields(cfg: AutoConfig) -> dict[str, Any]:
    act = activation_name(cfg, "projector_hidden_act", default="gelu")
    bias = lookup(cfg, "multimodal_projector_bias", default=True)
    return {"projector_hidden_act": act, "projector_bias": bool(bias)}


def _feature_layers(cfg: AutoConfig, num_layers: int) -> tuple[int, ...]:
    """The hidden states that the projector reads. Raises: ConfigError for one out of range.

    A file that says nothing means what transformers' LlavaConfig defaults to, "default" and -2,
    which is for towers with a class token: released Pixtral checkpoints say "full" and -1.
    """
    strategy = lookup(cfg, "vision_feature_select_strategy", default="default")
    if strategy != "full":
        raise UnsupportedModel(
            f"vision_feature_select_strategy {shown(strategy)} drops a class token, which a "
            "Pixtral tower does not have; config.json must say 'full'"
        )
    said = lookup(cfg, "vision_feature_layer", default=-2)
    layers = tuple(said) if isinstance(said, (list, tuple)) else (said,)
    for layer in layers:
        if type(layer) is not int or not -num_layers - 1 <= layer <= num_layers:
            raise ConfigError(
                f"vision_feature_layer {shown(said)} with {num_layers} vision layers; expected "
                f"{-num_layers - 1} to {num_layers}"
            )
    if not layers:
        raise ConfigError("vision_feature_layer is empty; expected at least one layer")
    return layers
