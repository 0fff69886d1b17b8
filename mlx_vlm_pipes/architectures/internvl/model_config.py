"""InternVLConfig and VisionConfig, from either configuration dialect (`sizes.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlx_vlm_pipes.architectures.internvl.facts import FACTS
from mlx_vlm_pipes.architectures.internvl.sizes import (
    TileSizes,
    has_original_keys,
    is_original,
    number,
    square,
)
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.architectures.qwen3.model_config import Qwen3Config
from mlx_vlm_pipes.architectures.vision_language_config import TwoPartConfig
from mlx_vlm_pipes.checkpoint.state import expanded_scales
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel, shown
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    activation_name,
    lookup,
    optional_int,
    require_vision_config,
    text_config,
)
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.weights import WeightData

if TYPE_CHECKING:
    from typing_extensions import Self

NormType = Literal["rms_norm", "layer_norm"]
O_PROJ_BIASES = (".attn.o_proj.bias", ".attn.proj.bias", ".attention.projection_layer.bias")
STACKED_QKV = ".attn.qkv.weight"
CHANNELS = 3
ORIGINAL_LAYERS = 48  # of InternVisionConfig, where the key is missing
QK_NORM_EPS = 1e-6  # transformers' module takes no other; the original reads layer_norm_eps

_TEXT_CLASSES: dict[str, type[Llama3Config]] = {
    "llama": Llama3Config,
    "qwen2": Llama3Config,
    "qwen3": Qwen3Config,
}
_CLASS_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass
class VisionConfig:
    """What the vision tower reads. Sizes in elements, image_size and patch_size in pixels.

    The fields below `o_proj_bias` are ours; the documented ones stand above.
    """

    hidden_size: int
    intermediate_size: int
    norm_type: NormType
    image_size: int
    patch_size: int
    num_attention_heads: int
    head_dim: int
    layer_norm_eps: float
    qk_normalization: bool
    qkv_bias: bool
    num_hidden_layers: int
    dtype: DType = DType.bfloat16
    o_proj_bias: bool = False  # found in finalize
    stacked_qkv: bool = field(default=False, kw_only=True)  # found in finalize
    qk_norm_eps: float = field(default=QK_NORM_EPS, kw_only=True)
    final_norm: bool = field(default=False, kw_only=True)
    hidden_act: str = field(default="gelu", kw_only=True)
    has_positions: bool = field(default=True, kw_only=True)

    @classmethod
    def initialize_from_config(
        cls, hf_vision_config: AutoConfig, *, original: bool | None = None
    ) -> Self:
        """From the vision part alone. original: which dialect, None to tell by its keys.

        Raises: ConfigError for missing keys, UnsupportedModel for towers that we do not have.
        """
        cfg = hf_vision_config
        if original is None:
            original = has_original_keys(cfg)
        _refuse_unknown_tower(cfg)
        hidden = optional_int(cfg, "hidden_size", default=1024)
        heads = optional_int(cfg, "num_attention_heads", default=16)
        if hidden % heads:
            raise ConfigError(f"vision hidden_size {hidden} does not divide among {heads} heads")
        eps = number(cfg, "layer_norm_eps", 1e-6)
        return cls(
            hidden_size=hidden,
            intermediate_size=optional_int(cfg, "intermediate_size", default=4096),
            norm_type=_norm_type(cfg, "rms_norm" if original else "layer_norm"),
            image_size=square(cfg, "image_size", 448),
            patch_size=square(cfg, "patch_size", 14),
            num_attention_heads=heads,
            head_dim=hidden // heads,
            layer_norm_eps=eps,
            qk_normalization=bool(
                lookup(cfg, "qk_normalization", default=True)
                if original
                else lookup(cfg, "use_qk_norm", default=False)
            ),
            qkv_bias=bool(lookup(cfg, "qkv_bias" if original else "attention_bias", default=False)),
            num_hidden_layers=optional_int(
                cfg, "num_hidden_layers", default=ORIGINAL_LAYERS if original else 24
            ),
            qk_norm_eps=eps if original else QK_NORM_EPS,
            final_norm=not original and lookup(cfg, "use_mean_pooling", default=True) is False,
            hidden_act=activation_name(cfg, "hidden_act", default="gelu"),
            has_positions=bool(lookup(cfg, "use_absolute_position_embeddings", default=True)),
        )

    def finalize(self, dtype: DType, state_dict: dict[str, WeightData]) -> None:
        """Read what only the weights can say: names, never values."""
        self.dtype = dtype
        self.o_proj_bias = any(name.endswith(O_PROJ_BIASES) for name in state_dict)
        self.stacked_qkv = any(name.endswith(STACKED_QKV) for name in state_dict)


@dataclass(kw_only=True)
class InternVLConfig(TwoPartConfig):
    """What the whole model reads.

    num_image_token: vision rows of one tile. The fields below `llm_config` are ours.
    """

    facts = FACTS
    devices: list[DeviceRef]
    downsample_ratio: float
    num_image_token: int
    vision_config: VisionConfig
    llm_config: Llama3Config | Qwen3Config
    vision_feature_layer: int = -1  # index of a hidden state; 0 is the embeddings
    projector_hidden_act: str = "gelu"

    @property
    def shuffle_factor(self) -> int:
        """1 / downsample_ratio: patches in a row of the block that becomes one vision row."""
        return round(1 / self.downsample_ratio)

    @classmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> Self:
        """From the whole configuration, of either dialect.

        Raises: ConfigError for missing or contradictory keys, UnsupportedModel for a text model,
        pixel shuffle or feature selection that we do not have.
        """
        cfg = huggingface_config
        sizes = TileSizes.read(cfg, pipeline_config.model.vision_config_overrides)
        vision = VisionConfig.initialize_from_config(
            require_vision_config(cfg), original=is_original(cfg)
        )
        text = text_config(cfg)
        _refuse_unknown_projection(cfg)
        return cls(
            devices=pipeline_config.model.devices,
            downsample_ratio=sizes.downsample_ratio,
            num_image_token=sizes.tokens(sizes.side_px),
            vision_config=vision,
            llm_config=llm_config_class(text).initialize_from_config(pipeline_config, text),
            vision_feature_layer=_feature_layer(cfg, vision.num_hidden_layers),
            projector_hidden_act=activation_name(cfg, "projector_hidden_act", default="gelu"),
        )

    def finalize(
        self,
        huggingface_config: AutoConfig,
        llm_state_dict: dict[str, WeightData],
        vision_state_dict: dict[str, WeightData],
        dtype: DType,
        return_logits: ReturnLogits,
        norm_method: NormType = "rms_norm",
    ) -> None:
        """Read what only the weights can say. Looks at names and dtypes, never at values."""
        text = text_config(huggingface_config)
        self.vision_config.finalize(dtype, vision_state_dict)
        self.llm_config.finalize(
            text,
            llm_state_dict,
            return_logits,
            ReturnHiddenStates.NONE,
            norm_method,
            attention_bias=_text_type(text) == "qwen2",
        )
        self.llm_config.quant_config = expanded_scales(huggingface_config, llm_state_dict)


def llm_config_class(text: AutoConfig) -> type[Llama3Config]:
    """The config class of a text model. Raises: UnsupportedModel naming another kind of it."""
    kind = _text_type(text)
    if kind not in _TEXT_CLASSES:
        raise UnsupportedModel(
            f"InternVL with a text model of type {shown(kind)}; "
            f"supported: {', '.join(_TEXT_CLASSES)}"
        )
    return _TEXT_CLASSES[kind]


def _text_type(text: AutoConfig) -> str:
    """By model_type, then by `architectures`; transformers' default is Qwen2."""
    names = lookup(text, "architectures", default=[])
    kind = lookup(text, "model_type") or (names[0] if names else "qwen2")
    return _CLASS_TYPES.get(kind, kind)


def _norm_type(vision: AutoConfig, default: NormType) -> NormType:
    value = lookup(vision, "norm_type", default=default)
    if value not in ("rms_norm", "layer_norm"):
        raise UnsupportedModel(f"vision norm_type {shown(value)}; supported: rms_norm, layer_norm")
    return value


def _refuse_unknown_tower(vision: AutoConfig) -> None:
    channels = lookup(vision, "num_channels", default=CHANNELS)
    if channels != CHANNELS:
        raise UnsupportedModel(f"vision num_channels {channels}; only RGB (3) is supported")


def _refuse_unknown_projection(config: AutoConfig) -> None:
    version = lookup(config, "ps_version", default="v2")
    if version != "v2":
        raise UnsupportedModel(f"ps_version {shown(version)}; only pixel shuffle 'v2' is supported")
    strategy = lookup(config, "vision_feature_select_strategy", default="default")
    if strategy != "default":
        raise UnsupportedModel(
            f"vision_feature_select_strategy {shown(strategy)}; only 'default' (without the class"
            " token) is supported"
        )


def _feature_layer(config: AutoConfig, layers: int) -> int:
    """Raises: UnsupportedModel for several layers, ConfigError for one that is not there."""
    layer = lookup(config, "vision_feature_layer", "select_layer", default=-1)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise UnsupportedModel(f"vision_feature_layer {shown(layer)}; expected one layer number")
    if not -layers - 1 <= layer <= layers:
        raise ConfigError(f"vision_feature_layer {layer} of a tower of {layers} layers")
    return layer
