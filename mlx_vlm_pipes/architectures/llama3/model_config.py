"""Llama3Config: what the dense decoder of all text families reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from mlx_vlm_pipes.architectures.decoder_fields import DecoderFields
from mlx_vlm_pipes.architectures.llama3.facts import FACTS
from mlx_vlm_pipes.checkpoint.state import expanded_scales
from mlx_vlm_pipes.checkpoint.tie import tied_by_names
from mlx_vlm_pipes.config import (
    KVCacheConfig,
    KVCacheParams,
    MAXModelConfig,
    PipelineConfig,
    upper_bounded_default,
    weights_format,
)
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.errors import ConfigError, shown
from mlx_vlm_pipes.hf_config import (
    AutoConfig,
    activation_name,
    check_rope_keys,
    head_dim,
    lookup,
    position_limit,
    require,
    require_int,
    rope_dictionary,
    rope_theta,
    text_config,
)
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig
from mlx_vlm_pipes.nn.rope import Llama3RopeScalingParams, LongRoPEScalingParams
from mlx_vlm_pipes.nn.rope_scaling import (
    DynamicRope,
    LinearRope,
    RopeScaling,
    YarnRope,
    read_rope_scaling,
)
from mlx_vlm_pipes.quantization import (
    LoRAConfig,
    QuantConfig,
    QuantizationConfig,
    QuantizationEncoding,
)
from mlx_vlm_pipes.weights import WeightData

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_WINDOW = 2**30  # no sequence is longer, and masks count in int32
NormMethod = Literal["rms_norm", "layer_norm"]
# transformers modeling_phi3.py, prepare_inputs_for_generation; no other type does
RECOMPUTING_TYPES = ("phi3",)
NORMED_TYPES = ("qwen3",)  # with a norm on each head's queries and keys, whatever the weights say

ScalingT = TypeVar("ScalingT", bound=RopeScaling)


@dataclass(kw_only=True)
class Llama3Config(DecoderFields):
    """What the decoder reads. Sizes in elements, lengths in tokens.

    The fields below `data_parallel_degree` are ours; the documented ones stand above. norm_dtype
    is the type of the norms' weights after loading; what a norm gives has the type of its input.
    """

    has_qk_norm: ClassVar[bool] = False  # whatever the weights say
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    rope_theta: float
    rope_scaling_params: Llama3RopeScalingParams | None
    max_seq_len: int
    intermediate_size: int
    interleaved_rope_weights: bool
    vocab_size: int
    dtype: DType
    model_quantization_encoding: QuantizationEncoding | None
    quantization_config: QuantizationConfig | None
    kv_params: KVCacheParams
    return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN
    norm_method: NormMethod = "rms_norm"
    norm_dtype: DType | None = None
    attention_bias: bool = False
    rms_norm_eps: float | None = None
    tie_word_embeddings: bool = False
    stacked_mlp: bool = False
    stacked_qkv: bool = False
    attention_multiplier: float
    embedding_multiplier: float
    residual_multiplier: float
    devices: list[DeviceRef]
    clip_qkv: float | None
    quant_config: QuantConfig | None = None
    lora_config: LoRAConfig | None = None
    longrope_scaling_params: LongRoPEScalingParams | None = None
    logits_scaling: float = 1.0
    return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE
    use_subgraphs: bool = True
    data_parallel_degree: int = 1
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    output_bias: bool = False  # bias of o_proj, found in finalize
    mlp_bias: bool = False  # found in finalize
    hidden_act: str = "silu"
    qk_norm: bool = False
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False  # the axes take turns among the rotary pairs
    more_rope_scaling: LinearRope | YarnRope | DynamicRope | None = None
    recomputes: bool = False  # rows that outgrow LongRoPE's short factors are prefilled again
    turned_layers: tuple[bool, ...] | None = None  # those with rotary positions; None: all

    @classmethod
    def initialize(
        cls, pipeline_config: PipelineConfig, model_config: MAXModelConfig | None = None
    ) -> Self:
        model_config = model_config or pipeline_config.model
        config = model_config.require_huggingface_config()
        FACTS.check_overrides(model_config.vision_config_overrides)
        return cls.initialize_from_config(pipeline_config, config, model_config)

    @classmethod
    def initialize_from_config(
        cls,
        pipeline_config: PipelineConfig,
        huggingface_config: AutoConfig,
        model_config: MAXModelConfig | None = None,
        *,
        rope_keys: Collection[str] = (),
    ) -> Self:
        """From a text configuration.

        rope_keys: of the rope dictionary, that the architecture has besides those of its type.
        Raises: ConfigError for missing keys, a rope type or activation that we do not have, or
        an encoding that is not resolved yet; what `check` raises.
        """
        model_config = model_config or pipeline_config.model
        pipeline_config = replace(pipeline_config, model=model_config)
        cfg = huggingface_config
        cls.check(cfg)
        devices = model_config.devices
        check_rope_keys(cfg, rope_keys)
        window, window_layers = _sliding_window(cfg)
        return cls(
            hidden_size=require_int(cfg, "hidden_size"),
            num_attention_heads=require_int(cfg, "num_attention_heads"),
            num_key_value_heads=_num_kv_heads(cfg),
            num_hidden_layers=require_int(cfg, "num_hidden_layers"),
            **_rope_fields(cfg),
            max_seq_len=cls.calculate_max_seq_len(pipeline_config, cfg, model_config),
            intermediate_size=require_int(cfg, "intermediate_size"),
            interleaved_rope_weights=_is_interleaved(model_config),
            vocab_size=require_int(cfg, "vocab_size"),
            dtype=model_config.dtype,
            model_quantization_encoding=model_config.graph_quantization_encoding,
            quantization_config=model_config._quant,
            kv_params=cls.construct_kv_params(
                cfg, pipeline_config, devices, model_config.kv_cache, model_config.cache_dtype
            ),
            attention_multiplier=cls.calculate_attention_multiplier(cfg),
            embedding_multiplier=float(lookup(cfg, "embedding_multiplier", default=1.0)),
            residual_multiplier=float(lookup(cfg, "residual_multiplier", default=1.0)),
            logits_scaling=float(lookup(cfg, "logits_scaling", default=1.0)),
            devices=devices,
            clip_qkv=lookup(cfg, "clip_qkv"),
            lora_config=pipeline_config.lora,
            use_subgraphs=model_config.use_subgraphs,
            data_parallel_degree=model_config.data_parallel_degree,
            sliding_window=window,
            sliding_layers=window_layers,
            hidden_act=activation_name(cfg, "hidden_act", default="silu"),
        )

    @classmethod
    def check(cls, huggingface_config: AutoConfig) -> None:
        """Refuse what the architecture does not run, beyond what its keys' readers refuse."""
        del huggingface_config

    def finalize(
        self,
        huggingface_config: AutoConfig,
        state_dict: dict[str, WeightData],
        return_logits: ReturnLogits,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        norm_method: NormMethod = "rms_norm",
        attention_bias: bool = False,  # noqa: FBT001, FBT002  # documented so
    ) -> None:
        """Read what only the weights can say. Looks at names and dtypes, never at values.

        Raises: ConfigError when rms_norm_eps is missing, or a quantisation method is unknown.
        """
        names = decoder_names(state_dict)
        self.return_logits = return_logits
        self.return_hidden_states = return_hidden_states
        self.norm_method = norm_method
        norm = names.get("layers.0.input_layernorm.weight")
        self.norm_dtype = None if norm is None else norm.dtype
        self.rms_norm_eps = None
        if norm_method == "rms_norm":
            exaone = lookup(huggingface_config, "model_type") == "exaone"
            key = "layer_norm_epsilon" if exaone else "rms_norm_eps"
            self.rms_norm_eps = float(require(huggingface_config, key))
        attention = "layers.0.self_attn."
        biases = {f"{attention}q_proj.bias", f"{attention}qkv_proj.bias"}
        said = lookup(huggingface_config, "attention_bias", default=False)
        self.attention_bias = bool(attention_bias or said or biases & names.keys())
        self.output_bias = f"{attention}o_proj.bias" in names
        said = lookup(huggingface_config, "mlp_bias", default=False)
        self.mlp_bias = bool(said or "layers.0.mlp.down_proj.bias" in names)
        is_normed = self.has_qk_norm or lookup(huggingface_config, "model_type") in NORMED_TYPES
        self.qk_norm = is_normed or f"{attention}q_norm.weight" in names
        self.stacked_qkv = f"{attention}qkv_proj.weight" in names
        self.stacked_mlp = "layers.0.mlp.gate_up_proj.weight" in names
        text = text_config(huggingface_config)
        self.tie_word_embeddings = tied_by_names(huggingface_config, text, names)
        self.quant_config = expanded_scales(huggingface_config, state_dict)

    @staticmethod
    def calculate_attention_multiplier(huggingface_config: AutoConfig) -> float:
        """The scale of the scores: `attention_multiplier`, else 1 / sqrt(head_dim)."""
        given = lookup(huggingface_config, "attention_multiplier")
        return float(given) if given is not None else head_dim(huggingface_config) ** -0.5

    @staticmethod
    def calculate_max_seq_len(
        pipeline_config: PipelineConfig,
        huggingface_config: AutoConfig,
        model_config: MAXModelConfig | None = None,
    ) -> int:
        """The model's own limit, or the smaller one asked for. Raises: ConfigError above it."""
        model_config = model_config or pipeline_config.model
        limit = position_limit(huggingface_config)
        kind = lookup(huggingface_config, "model_type", default="llama")
        return bounded_max_seq_len(kind, limit, model_config.max_length)

    @staticmethod
    def construct_kv_params(
        huggingface_config: AutoConfig,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """One device holds the rows of all replicas: its cache is that of degree 1."""
        degree = 1 if len(devices) == 1 else pipeline_config.model.data_parallel_degree
        return kv_cache_config.to_params(
            dtype=cache_dtype,
            n_kv_heads=_num_kv_heads(huggingface_config),
            head_dim=Llama3Config.get_head_dim(huggingface_config),
            num_layers=Llama3Config.get_num_layers(huggingface_config),
            devices=devices,
            data_parallel_degree=degree,
        )

    @staticmethod
    def get_head_dim(huggingface_config: AutoConfig) -> int:
        return head_dim(huggingface_config)

    @staticmethod
    def get_num_layers(huggingface_config: AutoConfig) -> int:
        return require_int(text_config(huggingface_config), "num_hidden_layers")

    def decoder_config(self) -> DecoderConfig:
        """The same in the terms of the shared decoder."""
        plain = self.plain_decoder(self.kv_params.head_dim, self.intermediate_size)
        return replace(
            plain,
            rope=replace(
                plain.rope,
                interleaved=self.interleaved_rope_weights,
                recomputes=self.recomputes,
                mrope_section=self.mrope_section,
                mrope_interleaved=self.mrope_interleaved,
            ),
            norm_eps=self.rms_norm_eps,
            norm_dtype=None if self.norm_dtype is None else self.norm_dtype.to_mx(),
            o_bias=self.output_bias,
            qk_norm=self.qk_norm,
            clip_qkv=self.clip_qkv,
            stacked_qkv=self.stacked_qkv,
            stacked_mlp=self.stacked_mlp,
            embedding_multiplier=self.embedding_multiplier,
            residual_multiplier=self.residual_multiplier,
            logits_scaling=self.logits_scaling,
            turned_layers=self.turned_layers,
        )


def bounded_max_seq_len(kind: str, limit: int, wanted: int | None) -> int:
    """Raises: ConfigError naming the architecture and both numbers if wanted exceeds the limit."""
    try:
        return upper_bounded_default(limit, wanted)
    except ConfigError:
        raise ConfigError(
            f"{kind}: max_length {wanted} exceeds the model's max_position_embeddings {limit} "
            "(scaled as its rope type says); ask for less"
        ) from None


def decoder_names(state_dict: Mapping[str, WeightData]) -> dict[str, WeightData]:
    """Keys relative to the decoder: `language_model.`, then `model.`, stripped where present."""
    return {
        key.removeprefix("language_model.").removeprefix("model."): value
        for key, value in state_dict.items()
    }


def _num_kv_heads(cfg: AutoConfig) -> int:
    heads = require_int(cfg, "num_attention_heads")
    kv_heads = require_int(cfg, "num_key_value_heads", "num_attention_heads")
    if heads % kv_heads:
        raise ConfigError(f"{heads} attention heads do not divide among {kv_heads} KV heads")
    return kv_heads


def _rope_fields(cfg: AutoConfig) -> dict[str, Any]:
    """What says how the decoder turns queries and keys. Raises: as read_rope_scaling."""
    rope = rope_dictionary(cfg)
    positions = require_int(cfg, "max_position_embeddings")
    original = lookup(cfg, "original_max_position_embeddings")
    original = original or rope.get("original_max_position_embeddings") or positions
    scaling = read_rope_scaling(rope, original, positions)
    share = rope.get("partial_rotary_factor") or lookup(cfg, "partial_rotary_factor", default=1.0)
    section = rope.get("mrope_section")
    return {
        "rope_theta": rope_theta(cfg),
        "rope_scaling_params": _of_type(scaling, Llama3RopeScalingParams),
        "longrope_scaling_params": _of_type(scaling, LongRoPEScalingParams),
        "more_rope_scaling": _of_type(scaling, (LinearRope, YarnRope, DynamicRope)),
        "recomputes": lookup(cfg, "model_type") in RECOMPUTING_TYPES,
        "turned_layers": _turned_layers(cfg),
        "partial_rotary_factor": float(share),
        "mrope_section": None if section is None else tuple(int(n) for n in section),
        "mrope_interleaved": bool(rope.get("mrope_interleaved")),
    }


def _of_type(
    scaling: RopeScaling | None, kind: type[ScalingT] | tuple[type[ScalingT], ...]
) -> ScalingT | None:
    return scaling if isinstance(scaling, kind) else None


def _sliding_window(cfg: AutoConfig) -> tuple[int | None, tuple[bool, ...] | None]:
    """The window in tokens and the layers it holds for (None: all).

    Raises: ConfigError for layer_types that are not one known name for each layer.
    """
    kind = lookup(cfg, "model_type")
    if kind in ("llama", "granite", "olmo"):
        return None, None  # transformers reads no window there, whatever a file has left over
    is_for_all = kind in ("mistral", "phi3")  # and no layer_types nor use_sliding_window
    types = None if is_for_all else _layer_types(cfg)
    if lookup(cfg, "sliding_window") is None:
        return None, None
    is_switched = not is_for_all and (types is None or kind != "smollm3")
    if is_switched and lookup(cfg, "use_sliding_window", default=True) is False:
        return None, None
    window = min(require_int(cfg, "sliding_window"), MAX_WINDOW)
    if types is not None:
        return window, tuple(name == "sliding_attention" for name in types)
    count = require_int(cfg, "num_hidden_layers")
    turned = _turned_layers(cfg)
    if turned is not None:  # SmolLM3's windows are on the layers without positions
        return window, tuple(not turns for turns in turned)
    first = lookup(cfg, "max_window_layers")
    return window, None if first is None else tuple(i >= first for i in range(count))


def _layer_types(cfg: AutoConfig) -> Sequence[str] | None:
    """The kind of each layer's attention, where a file lists them. Raises: ConfigError."""
    types, count = lookup(cfg, "layer_types"), require_int(cfg, "num_hidden_layers")
    if types is None:
        return None
    if len(types) != count or not {*types} <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"layer_types is {shown(types)}, expected full_attention or sliding_attention for each"
            f" of {count} layers"
        )
    return types


def _turned_layers(cfg: AutoConfig) -> tuple[bool, ...] | None:
    """Which layers have rotary positions; None: all of them (every type but SmolLM3).

    Raises: ConfigError for a list that is shorter than the layers.
    Source: transformers configuration_smollm3.py.
    """
    if lookup(cfg, "model_type") != "smollm3":
        return None
    count, given = require_int(cfg, "num_hidden_layers"), lookup(cfg, "no_rope_layers")
    if given is None:
        every = require_int(cfg, "no_rope_layer_interval")
        return tuple((i + 1) % every != 0 for i in range(count))
    if len(given) < count:
        raise ConfigError(
            f"no_rope_layers has {len(given)} entries, expected one of {count} layers"
        )
    return tuple(bool(turns) for turns in given[:count])


def _is_interleaved(model_config: MAXModelConfig) -> bool:
    """Only GGUF files of Llama keep rotary pairs side by side."""
    paths = model_config.weight_path
    return bool(paths) and weights_format(paths) == "gguf" and model_config.rope_type == "normal"
