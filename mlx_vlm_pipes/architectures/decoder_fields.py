"""What configurations share that have the decoder's sizes as their own fields."""

from __future__ import annotations

from mlx_vlm_pipes.config import KVCacheParams
from mlx_vlm_pipes.interfaces import ArchConfigWithKVCache
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.rope import Llama3RopeScalingParams, LongRoPEScalingParams, RopeSpec
from mlx_vlm_pipes.nn.rope_scaling import DynamicRope, LinearRope, RopeScaling, YarnRope


class DecoderFields(ArchConfigWithKVCache):
    """Each dataclass has these fields in its own documented order."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    rope_theta: float
    rope_scaling_params: Llama3RopeScalingParams | None
    longrope_scaling_params: LongRoPEScalingParams | None
    more_rope_scaling: LinearRope | YarnRope | DynamicRope | None
    partial_rotary_factor: float
    max_seq_len: int
    vocab_size: int
    kv_params: KVCacheParams
    attention_multiplier: float
    hidden_act: str
    sliding_window: int | None
    sliding_layers: tuple[bool, ...] | None
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """Whichever of the scalings the configuration has."""
        return self.rope_scaling_params or self.longrope_scaling_params or self.more_rope_scaling

    def get_kv_params(self) -> KVCacheParams:
        return self.kv_params

    def get_max_seq_len(self) -> int:
        return self.max_seq_len

    def plain_decoder(self, head_dim: int, intermediate_size: int) -> DecoderConfig:
        """These fields in the terms of the shared decoder."""
        return DecoderConfig(
            hidden_size=self.hidden_size,
            intermediate_size=intermediate_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=self.vocab_size,
            rope=RopeSpec(
                dims=int(head_dim * self.partial_rotary_factor),
                theta=self.rope_theta,
                scaling=self.rope_scaling,
            ),
            attention_scale=self.attention_multiplier,
            hidden_act=self.hidden_act,
            qkv_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            tie_word_embeddings=self.tie_word_embeddings,
            sliding_window=self.sliding_window,
            sliding_layers=self.sliding_layers,
        )
