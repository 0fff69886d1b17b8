"""What the configurations of vision-language models do alike."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mlx_vlm_pipes.architectures.llama3.model_config import Llama3Config
from mlx_vlm_pipes.checkpoint.state import expanded_scales
from mlx_vlm_pipes.checkpoint.tie import declared_tied
from mlx_vlm_pipes.config import KVCacheConfig, KVCacheParams, MAXModelConfig, PipelineConfig
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.facts import RoomFacts
from mlx_vlm_pipes.hf_config import AutoConfig, text_config
from mlx_vlm_pipes.interfaces import ArchConfigWithKVCache
from mlx_vlm_pipes.weights import WeightData

if TYPE_CHECKING:
    from typing_extensions import Self


class VisionLanguageConfig(ArchConfigWithKVCache):
    """A tower and a decoder, whose part of config.json is read as Llama's."""

    facts: ClassVar[RoomFacts]

    @classmethod
    def initialize(
        cls, pipeline_config: PipelineConfig, model_config: MAXModelConfig | None = None
    ) -> Self:
        """From config.json. model_config: in place of the pipeline's own.

        Raises: ConfigError without a config.json, for overrides that the architecture does not
        have, and what `initialize_from_config` raises.
        """
        model_config = model_config or pipeline_config.model
        config = model_config.require_huggingface_config()
        cls.facts.check_overrides(model_config.vision_config_overrides)
        return cls.initialize_from_config(replace(pipeline_config, model=model_config), config)

    @classmethod
    @abstractmethod
    def initialize_from_config(
        cls, pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> Self:
        """From a whole configuration.

        Raises: ConfigError without a vision_config, for missing or contradicting keys, and for
        values that we do not run.
        """

    @staticmethod
    def calculate_max_seq_len(
        pipeline_config: PipelineConfig, huggingface_config: AutoConfig
    ) -> int:
        """The decoder's limit, or the smaller one asked for. Raises: ConfigError above it."""
        return Llama3Config.calculate_max_seq_len(pipeline_config, text_config(huggingface_config))

    @staticmethod
    def construct_kv_params(
        huggingface_config: AutoConfig,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        return Llama3Config.construct_kv_params(
            text_config(huggingface_config), pipeline_config, devices, kv_cache_config, cache_dtype
        )

    @staticmethod
    def get_num_layers(huggingface_config: AutoConfig) -> int:
        return Llama3Config.get_num_layers(huggingface_config)


class TwoPartConfig(VisionLanguageConfig):
    """One that holds its decoder's configuration as a part."""

    llm_config: Llama3Config

    @property
    def decoder(self) -> Llama3Config:
        """The text part, `llm_config` unless its documented name is another."""
        return self.llm_config

    def finalize_outer(
        self, huggingface_config: AutoConfig, llm_state_dict: dict[str, WeightData]
    ) -> None:
        """Take what the whole config.json says of the decoder: scaled weights, the tied head.

        Raises: UnsupportedModel for a quantisation method that is not read.
        """
        self.decoder.quant_config = expanded_scales(huggingface_config, llm_state_dict)
        if declared_tied(huggingface_config, text_config(huggingface_config)):
            self.decoder.tie_word_embeddings = True  # either part may say it

    def get_kv_params(self) -> KVCacheParams:
        return self.decoder.get_kv_params()

    def get_max_seq_len(self) -> int:
        return self.decoder.get_max_seq_len()
