"""What the dense decoder is built from."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_pipes.nn.rope import RopeSpec
from mlx_vlm_pipes.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What the decoder reads. Sizes in elements; the multipliers are Granite's."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope: RopeSpec
    attention_scale: float
    norm_eps: float | None = 1e-6  # None: layer norm without weights (OLMo)
    norm_dtype: mx.Dtype | None = None  # of the norms' weights; None: as they are stored
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    clip_qkv: float | None = None
    stacked_qkv: bool = False
    stacked_mlp: bool = False
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None  # None: all of them, where a window is given
    feature_layers: int = 0  # the first layers, behind which pictures add features (DeepStack)
    sliding_rope: RopeSpec | None = None  # of layers with a window; None: as all others (Gemma 3)
    post_norms: bool = False  # norms before each residual too (Gemma 3)
    embed_scale: float = 1.0  # of tokens only; pictures then take their places (Gemma 3)
    turned_layers: tuple[bool, ...] | None = None  # with rotary positions; None: all (SmolLM3)
    ranks: Ranks = ALONE  # with many, heads and inner width are this rank's own (nn.parallel)
    vocab_shares: tuple[tuple[int, int], ...] = ()  # each rank's rows of the head; (): all of it

    @property
    def head_rows(self) -> tuple[int, int]:
        """This rank's rows of the output head, from one to before the other."""
        return self.vocab_shares[self.ranks.rank] if self.vocab_shares else (0, self.vocab_size)

    def window(self, layer: int) -> int | None:
        """The layer's attention window in tokens, None for full attention."""
        if self.sliding_layers is not None and not self.sliding_layers[layer]:
            return None
        return self.sliding_window

    def turns(self, layer: int) -> bool:
        """Whether the layer's queries and keys are turned by their positions."""
        return self.turned_layers is None or self.turned_layers[layer]
