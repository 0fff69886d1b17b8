"""Qwen3VLConfig and VisionConfig: what Qwen3-VL reads from config.json and the weights.

Source: transformers configuration_qwen3_vl.py. The text part is Qwen3's; its three axes take
turns among the rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mlx_vlm_pipes.architectures.grid_config import GridTowerConfig
from mlx_vlm_pipes.architectures.grid_facts import TOKEN_IDS
from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.architectures.qwen3.model_config import Qwen3Config
from mlx_vlm_pipes.architectures.qwen3_vl.facts import FACTS
from mlx_vlm_pipes.architectures.qwen3_vl.sizes import VisionSizes
from mlx_vlm_pipes.architectures.vision_language_config import TwoPartConfig
from mlx_vlm_pipes.checkpoint.blueprint import Checkpoint
from mlx_vlm_pipes.checkpoint.state import VISION, stored_dtype
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    activation_name,
    lookup,
    require_int,
    require_vision_config,
    rope_dictionary,
    text_config,
)
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from typing_extensions import Self

MROPE_SECTION = (24, 20, 20)
DEEPSTACK_INDEXES = (8, 16, 24)


@dataclass
class VisionConfig(GridTowerConfig):
    """What the vision tower reads. patch_size in pixels.

    deepstack_visual_indexes: blocks behind which rows for the decoder's first layers are made.
    num_surplus_rows: of those, the last ones, which no layer of the decoder takes; left out.
    """

    dtype: DType
    llm_dtype: DType
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    hidden_size: int
    num_attention_heads: int
    depth: int
    intermediate_size: int
    out_hidden_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: list[int]
    hidden_act: str = "gelu_pytorch_tanh"
    rope_theta: float = 10000.0
    num_surplus_rows: int = 0

    @property
    def tapped_blocks(self) -> list[int]:
        """The blocks whose rows the decoder takes, in the order of its layers."""
        blocks = sorted(self.deepstack_visual_indexes)
        return blocks[: len(blocks) - self.num_surplus_rows]

    @classmethod
    def initialize_from_config(cls, hf_vision_config: AutoConfig) -> Self:
        """From `vision_config`.

        Raises: ConfigError for missing keys, heads that do not divide the width, indexes of blocks
        that are not there, or an activation or rope type that we do not have.
        """
        cfg, sizes = hf_vision_config, VisionSizes.read(hf_vision_config)
        config = cls(
            **cls.shared_fields(cfg),
            patch_size=sizes.patch_size,
            temporal_patch_size=sizes.temporal_patch_size,
            spatial_merge_size=sizes.spatial_merge_size,
            num_position_embeddings=sizes.table_side**2,
            deepstack_visual_indexes=_tapped_blocks(cfg),
            hidden_act=activation_name(cfg, "hidden_act", default="gelu_pytorch_tanh"),
        )
        config.check_heads()
        return config


@dataclass(kw_only=True)
class Qwen3VLConfig(TwoPartConfig):
    """Both halves of the model."""

    facts = FACTS
    devices: list[DeviceRef]
    image_token_id: int
    video_token_id: int
    mrope_section: tuple[int, ...]
    vision_config: VisionConfig
    llm_config: Llama3Config  # a Qwen3Config

    @classmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> Self:
        """As the base says. Raises: UnsupportedModel for mixture-of-experts layers too."""
        cfg, text_cfg = huggingface_config, text_config(huggingface_config)
        vision = VisionConfig.initialize_from_config(require_vision_config(cfg))
        llm = Qwen3Config.initialize_from_config(
            pipeline_config, text_cfg, rope_keys=("mrope_section", "mrope_interleaved")
        )
        vision.check_width(llm.hidden_size)
        surplus = max(0, len(vision.tapped_blocks) - llm.num_hidden_layers)
        vision = replace(vision, num_surplus_rows=surplus)
        return cls(
            devices=pipeline_config.model.devices,
            image_token_id=lookup(cfg, "image_token_id", default=TOKEN_IDS["image_token_id"]),
            video_token_id=lookup(cfg, "video_token_id", default=TOKEN_IDS["video_token_id"]),
            mrope_section=_mrope_section(text_cfg),
            vision_config=vision,
            llm_config=llm,
        )

    def finalize(self, checkpoint: Checkpoint) -> None:
        """Read what only the weights can say: dtypes, biases, the tied head.

        Raises: ConfigError without one of the two tensors whose dtype decides, or for a
        quantisation that we do not know.
        """
        outer, tensors = checkpoint.outer, checkpoint.text
        self.vision_config.dtype = stored_dtype(checkpoint.tower(VISION), "patch_embed.proj")
        self.vision_config.llm_dtype = stored_dtype(tensors, "embed_tokens")
        self.llm_config.finalize(text_config(outer), tensors, *checkpoint.modes)
        self.finalize_outer(outer, tensors)

    def decoder_config(self) -> DecoderConfig:
        """The same in the terms of the shared decoder."""
        config = self.llm_config.decoder_config()
        rope = replace(config.rope, mrope_section=self.mrope_section, mrope_interleaved=True)
        return replace(config, rope=rope, feature_layers=len(self.vision_config.tapped_blocks))


def _tapped_blocks(vision_cfg: AutoConfig) -> list[int]:
    given = lookup(vision_cfg, "deepstack_visual_indexes")
    blocks: list[int] = [*(DEEPSTACK_INDEXES if given is None else given)]
    depth = require_int(vision_cfg, "depth", "num_hidden_layers")
    if len(set(blocks)) < len(blocks) or not all(0 <= block < depth for block in blocks):
        raise ConfigError(
            f"deepstack_visual_indexes {blocks}; expected different blocks from 0 to {depth - 1}"
        )
    return blocks


def _mrope_section(text_cfg: AutoConfig) -> tuple[int, ...]:
    """Rotary pairs of the time, height and width axis; RopeSpec holds their sum to the head."""
    rope = rope_dictionary(text_cfg)
    if rope.get("mrope_interleaved") is False:
        raise ConfigError("mrope_interleaved is false; Qwen3-VL's axes always take turns")
    given = rope.get("mrope_section")
    section = tuple(int(n) for n in (MROPE_SECTION if given is None else given))
    if len(section) != 3:
        raise ConfigError(f"mrope_section {list(section)}; expected three numbers")
    return section
