"""What a model class is given to plan a model from, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.nn as nn

from mlx_vlm_pipes.checkpoint.state import LANGUAGE, StateDict, below, tower_state
from mlx_vlm_pipes.config import PipelineConfig
from mlx_vlm_pipes.hf_config import AutoConfig
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.nn.decoder_config import DecoderConfig


@dataclass(frozen=True)
class Checkpoint:
    """A canonical state dict, how it is to be read, and what steps are to return."""

    pipeline_config: PipelineConfig
    state: StateDict
    return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN
    return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE

    @property
    def outer(self) -> AutoConfig:
        """The whole config.json. Raises: ConfigError when it cannot be read."""
        return self.pipeline_config.model.require_huggingface_config()

    @property
    def modes(self) -> tuple[ReturnLogits, ReturnHiddenStates]:
        """What steps return, as `finalize` takes it."""
        return self.return_logits, self.return_hidden_states

    @property
    def text(self) -> StateDict:
        """The decoder's tensors, named relative to it."""
        return below(self.state, LANGUAGE)

    def tower(self, prefix: str) -> StateDict:
        """The others, named relative to `prefix`, which may be empty."""
        return tower_state(self.state, prefix)


class Blueprint(NamedTuple):
    """The tower, if any, without weights, and the decoder's sizes."""

    tower: nn.Module | None
    decoder: DecoderConfig


def blueprint(model_class: Any, checkpoint: Checkpoint) -> Blueprint:
    """What a model class makes of a checkpoint, by config.json alone and then by its tensors."""
    config, _ = model_class.read_config(checkpoint.pipeline_config)
    return model_class.blueprint(config, checkpoint)
