"""Idefics3Config: a SigLIP tower, a connector and a Llama decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.architectures.idefics3.facts import FACTS
from mlx_vlm_pipes.architectures.idefics3.sizes import FrameSizes
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config, NormMethod
from mlx_vlm_pipes.architectures.part_fields import PartField, WithPartFields
from mlx_vlm_pipes.architectures.vision_language_config import TwoPartConfig
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, UnsupportedModel, shown
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    activation_name,
    lookup,
    optional_int,
    require_int,
    text_config,
)
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.weights import WeightData

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGE_TOKEN_ID = 128257  # where config.json names none
_VISION_TYPES = ("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision")
_TEXT_TYPES = ("llama", "mistral", "granite", "phi3", "qwen2", "qwen3")


@dataclass
class Idefics3VisionConfig:
    """What tower and connector read. Sizes in elements, image_size and patch_size in pixels.

    initializer_range is kept for people who train; inference does not look at it.
    """

    dtype: DType
    hidden_size: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    num_attention_heads: int
    head_dim: int
    layer_norm_eps: float
    hidden_act: str
    num_hidden_layers: int
    initializer_range: float
    scale_factor: int
    text_config_hidden_size: int

    @classmethod
    def initialize_from_config(
        cls,
        pipeline_config: PipelineConfig,
        huggingface_config: AutoConfig,
        text_config_hidden_size: int,
    ) -> Self:
        """From the outer configuration.

        Raises: ConfigError for sizes that do not divide, UnsupportedModel for another tower.
        """
        sizes, vision = FrameSizes.read(huggingface_config), huggingface_config.vision_config
        _check_type("vision", vision, _VISION_TYPES)
        hidden = require_int(vision, "hidden_size")
        heads = require_int(vision, "num_attention_heads")
        if hidden % heads:
            raise ConfigError(f"vision hidden_size {hidden} does not divide among {heads} heads")
        return cls(
            dtype=pipeline_config.model.dtype,
            hidden_size=hidden,
            intermediate_size=optional_int(vision, "intermediate_size", default=3072),
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            num_channels=optional_int(vision, "num_channels", default=3),
            num_attention_heads=heads,
            head_dim=hidden // heads,
            layer_norm_eps=float(lookup(vision, "layer_norm_eps", default=1e-6)),
            hidden_act=activation_name(vision, "hidden_act", default="gelu_pytorch_tanh"),
            num_hidden_layers=optional_int(vision, "num_hidden_layers", default=12),
            initializer_range=_initializer_range(vision),
            scale_factor=sizes.scale_factor,
            text_config_hidden_size=text_config_hidden_size,
        )

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(kw_only=True)
class Idefics3Config(WithPartFields, TwoPartConfig):
    """Tower, connector and decoder. scale_factor: patches a side that become one token."""

    facts = FACTS
    devices: list[DeviceRef]
    scale_factor: PartField[int] = PartField("vision_config", "scale_factor")  # noqa: RUF009  # a descriptor
    image_token_id: int
    vision_config: Idefics3VisionConfig
    text_config: Llama3Config

    @property
    def decoder(self) -> Llama3Config:
        return self.text_config

    @property
    def image_seq_len(self) -> int:
        """Tokens of one frame."""
        return self.vision_config.patches_per_side**2 // self.scale_factor**2

    @classmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> Self:
        """As the base says. Raises: UnsupportedModel for another kind of tower or decoder too."""
        cfg = huggingface_config
        _check_type("text", text_config(cfg), _TEXT_TYPES)
        text = Llama3Config.initialize_from_config(pipeline_config, text_config(cfg))
        vision = Idefics3VisionConfig.initialize_from_config(pipeline_config, cfg, text.hidden_size)
        return cls(
            devices=pipeline_config.model.devices,
            scale_factor=vision.scale_factor,
            image_token_id=optional_int(
                cfg, "image_token_id", "image_token_index", default=IMAGE_TOKEN_ID, minimum=0
            ),
            vision_config=vision,
            text_config=text,
        )

    def finalize(
        self,
        huggingface_config: AutoConfig,
        llm_state_dict: dict[str, WeightData],
        return_logits: ReturnLogits,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        norm_method: NormMethod = "rms_norm",
    ) -> None:
        """Read what only the decoder's weights can say. Looks at names and dtypes, not values."""
        self.text_config.finalize(
            text_config(huggingface_config),
            llm_state_dict,
            return_logits,
            return_hidden_states,
            norm_method,
            attention_bias=False,
        )
        self.finalize_outer(huggingface_config, llm_state_dict)


def _check_type(part: str, config: Any, known: tuple[str, ...]) -> None:
    kind = lookup(config, "model_type", default=known[0])
    if kind not in known:
        raise UnsupportedModel(
            f"idefics3: {part}_config of model_type {shown(kind)}; supported: {', '.join(known)}"
        )


def _initializer_range(vision: AutoConfig) -> float:
    """What the file says, or transformers' default where that is no number: nobody reads it."""
    value = lookup(vision, "initializer_range")
    return float(value) if type(value) in (int, float) else 0.02
