"""What the pipeline models of all rooms do alike: read a checkpoint into modules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.nn as nn

from mlx_vlm_pipes.checkpoint.canonical import canonical_state
from mlx_vlm_pipes.checkpoint.modules import load_decoder, load_module
from mlx_vlm_pipes.checkpoint.state import LANGUAGE, StateDict, part, tower_state
from mlx_vlm_pipes.config import KVCacheConfig, KVCacheParams, PipelineConfig
from mlx_vlm_pipes.contexts import TextAndVisionContext
from mlx_vlm_pipes.dtypes import DeviceRef, DType
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.interfaces import (
    ContextT,
    InferenceSession,
    LogProbabilitiesMixin,
    Model,
    PipelineModelWithKVCache,
    ReturnHiddenStates,
    ReturnLogits,
)
from mlx_vlm_pipes.nn.decoder import DecoderConfig
from mlx_vlm_pipes.nn.language_model import LanguageModel
from mlx_vlm_pipes.weights.layout import Layout, Transform


class CheckpointModel(LogProbabilitiesMixin, PipelineModelWithKVCache[ContextT]):
    """A pipeline model that is loaded when it is made.

    A room says which config class and tensor layouts are its own, what config.json implies
    (`read_config`) and which modules a checkpoint needs (`blueprint`).
    """

    config_class: ClassVar[Any]
    layouts: ClassVar[Sequence[Layout]]
    tower_prefix: ClassVar[str] = ""  # of the tower's parameters among the canonical names

    @classmethod
    def get_kv_params(
        cls,
        huggingface_config: AutoConfig,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """What the room's config class makes of the same arguments."""
        return cls.config_class.construct_kv_params(
            huggingface_config, pipeline_config, devices, kv_cache_config, cache_dtype
        )

    @classmethod
    @abstractmethod
    def read_config(cls, pipeline_config: PipelineConfig) -> tuple[Any, tuple[Transform, ...]]:
        """What config.json alone says, and the changes of values that it implies."""

    @classmethod
    @abstractmethod
    def blueprint(
        cls,
        config: Any,
        pipeline_config: PipelineConfig,
        state: StateDict,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    ) -> tuple[nn.Module | None, DecoderConfig]:
        """The tower, if any, and the decoder's sizes for a canonical state dict.

        Nothing is read and no weights are in; `config` is finalised.
        """

    def load_parts(self, session: InferenceSession) -> tuple[Model | None, Model]:
        """Read the weights through the adapter; tower and language model, evaluated.

        Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
        """
        config, changes = self.read_config(self.pipeline_config)
        state = canonical_state(
            self.weights, self.adapter, self.layouts, self.pipeline_config, changes
        )
        tower, decoder_config = self.blueprint(
            config, self.pipeline_config, state, self.return_logits, self.return_hidden_states
        )
        vision = None
        if tower is not None:
            vision = load_module(session, tower, tower_state(state, self.tower_prefix))
        decoder, loaded = load_decoder(session, decoder_config, part(state, LANGUAGE))
        self.model_config = config
        self.language = LanguageModel(
            decoder,
            self.kv_params,
            self.return_logits,
            self.return_hidden_states,
            compile=session.compile,
        )
        return vision, Model(self.language, loaded.weights)


class VisionLanguageModel(
    CheckpointModel[TextAndVisionContext], PipelineModelWithKVCache[TextAndVisionContext]
):
    """A tower and a decoder."""

    vision_model: Model
    language_model: Model

    def install(self, session: InferenceSession) -> None:
        self.vision_model, self.language_model = self.load_model(session)

    def load_model(self, session: InferenceSession) -> tuple[Model, Model]:
        """Vision and language model, with their weights in.

        Raises: WeightsError naming missing, unexpected and mis-shaped tensors.
        """
        vision, language = self.load_parts(session)
        assert vision is not None
        return vision, language
