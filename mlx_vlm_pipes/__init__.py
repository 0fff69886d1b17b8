"""Vision-language models on Apple Silicon through MLX.

Importing the package costs nothing: each public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_vlm_pipes.config import KVCacheConfig, ModelConfig, PipelineConfig
    from mlx_vlm_pipes.contexts import SamplingParams
    from mlx_vlm_pipes.conversation import Conversation
    from mlx_vlm_pipes.engine.plan import Plan
    from mlx_vlm_pipes.engine.requests import Chunk, Handle, Timings, Usage
    from mlx_vlm_pipes.engine.saved_prefixes import SavedPrefix
    from mlx_vlm_pipes.engine.state import EngineConfig
    from mlx_vlm_pipes.errors import (
        CheckpointError,
        CheckpointNotFound,
        ConfigError,
        ContextTooLong,
        EngineClosed,
        ImageTokenMismatch,
        InputError,
        MediaError,
        OutOfBudget,
        PipesError,
        PipesWarning,
        PrefixError,
        ProcessorError,
        RankLost,
        RanksDiffer,
        UnknownAdapter,
        UnsupportedModel,
        WeightsError,
    )
    from mlx_vlm_pipes.loading import load
    from mlx_vlm_pipes.media.records import MediaRecord
    from mlx_vlm_pipes.options import GenerateOptions
    from mlx_vlm_pipes.pipeline import Pipeline
    from mlx_vlm_pipes.result import GenerationResult

__version__ = "0.1.0"
__all__ = [
    "CheckpointError", "CheckpointNotFound", "Chunk", "ConfigError", "ContextTooLong",
    "Conversation", "EngineClosed", "EngineConfig", "GenerateOptions", "GenerationResult", "Handle",
    "ImageTokenMismatch", "InputError", "KVCacheConfig", "MediaError", "MediaRecord", "ModelConfig",
    "OutOfBudget", "Pipeline", "PipelineConfig", "PipesError", "PipesWarning", "Plan",
    "PrefixError", "ProcessorError", "RankLost", "RanksDiffer", "SamplingParams", "SavedPrefix",
    "Timings", "UnknownAdapter", "UnsupportedModel", "Usage", "WeightsError", "load",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(__all__, "errors"),  # all that have no other below
    "Chunk": "engine.requests",
    "Conversation": "conversation",
    "EngineConfig": "engine.state",
    "GenerateOptions": "options",
    "GenerationResult": "result",
    "Handle": "engine.requests",
    "KVCacheConfig": "config",
    "MediaRecord": "media.records",
    "ModelConfig": "config",
    "Pipeline": "pipeline",
    "PipelineConfig": "config",
    "Plan": "engine.plan",
    "SamplingParams": "contexts",
    "SavedPrefix": "engine.saved_prefixes",
    "Timings": "engine.requests",
    "Usage": "engine.requests",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
