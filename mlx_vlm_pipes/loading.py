"""From a folder or a hub id to a Pipeline."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes import __version__
from mlx_vlm_pipes.command import RANK_LOST, USER_MISTAKE, ignoring_interrupts
from mlx_vlm_pipes.config import KVCacheConfig, ModelConfig, PipelineConfig
from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.distributed.joining import join_group
from mlx_vlm_pipes.distributed.team import Team, meet
from mlx_vlm_pipes.dtypes import Device, DeviceRef, DeviceSpec, DType, default_device
from mlx_vlm_pipes.encoding import COMPUTE_TYPES, dominant_type
from mlx_vlm_pipes.engine.draft_model import Drafter
from mlx_vlm_pipes.engine.engine import Engine
from mlx_vlm_pipes.engine.identity import adapters_digest, files_digest, values_digest
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.engine.worker import OwnerThread
from mlx_vlm_pipes.errors import (
    CheckpointError,
    CheckpointNotFound,
    ConfigError,
    PipesError,
    PipesWarning,
    RankLost,
    RanksDiffer,
    clip,
    shown,
)
from mlx_vlm_pipes.gguf.header import is_gguf, only_gguf
from mlx_vlm_pipes.hf_config import HuggingFaceConfig, read_config
from mlx_vlm_pipes.hub.download import download, is_hub_name
from mlx_vlm_pipes.interfaces import InferenceSession, PipelineModelWithKVCache, ReturnLogits
from mlx_vlm_pipes.launcher import is_follower, launched_rank, launched_size
from mlx_vlm_pipes.options import Option, unfit
from mlx_vlm_pipes.paths import is_there, user_path
from mlx_vlm_pipes.pipeline import Pipeline
from mlx_vlm_pipes.processing.base import TextProcessor
from mlx_vlm_pipes.processing.tokenizer import require_same_tokens
from mlx_vlm_pipes.processing.types import ProcessedPrompt
from mlx_vlm_pipes.progress import Watch, bar, is_wanted
from mlx_vlm_pipes.quantization import LoRAConfig
from mlx_vlm_pipes.ranks import ALONE, Ranks
from mlx_vlm_pipes.registry import Room, find_room
from mlx_vlm_pipes.weights import Weights, find_weight_files, load_weights

LAST_WORD_S = 1.0  # for rank 0 to say what is wrong, before another rank ends
BUNDLED = Path(__file__).parent / "assets" / "tiny-idefics3"


def load(  # noqa: PLR0913  # the options a user may say, all but one by keyword only
    path: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    draft: str | Path | None = None,
    max_length: int | None = None,
    kv_bits: int | None = None,
    engine: EngineConfig | None = None,
    compile: bool = True,
    vision_config_overrides: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    distributed: str | mx.distributed.Group | None = None,
) -> Pipeline:
    """Open a checkpoint: a folder, GGUF file or hub id, or (None) the small model in the package.

    Args: dtype "auto" is the checkpoint's own on a GPU and float32 on a CPU; device "cpu" or
    "gpu"; adapter a LoRA folder, or several (`name=folder`), of which each request names one
    (one that changes the vision tower too is loaded alone and merged there: no request can leave
    it out); draft a smaller checkpoint with the same tokenizer, which drafts tokens for this one;
    max_length in tokens; kv_bits 8 or 4 quantises the KV cache; engine its limits, None for those
    of the device's memory; compile whether its step is; vision_config_overrides wins over
    config.json (InternVL: max_dynamic_patch, min_dynamic_patch, tiles of a picture);
    progress whether slow work (a download, weights, pictures, long prompts, batches) shows a bar
    while it lasts, None for on a terminal and in a notebook; distributed "auto" runs the model
    together with the other processes that mlx.launch has started, or with those of a group.
    Rank 0 gets the pipeline. The others serve it in here until it closes and then exit.
    Raises: CheckpointError, one line saying what is wrong with the checkpoint, or with the draft
    model beside it; InputError for an argument of a wrong type or out of its bounds; RanksDiffer on
    all ranks where these do not meet or have not the same; SystemExit on all but the first: with 0
    at the end, with 2 or 70 where they cannot run or one has gone.
    """
    _require_kinds(path, adapter, engine, vision_config_overrides)
    _require_path("draft", draft)
    max_length, kv_bits = _MAX_LENGTH.read(max_length), _KV_BITS.read(kv_bits)
    compile, has_bars = _COMPILE.read(compile), is_wanted(_PROGRESS.read(progress))
    overrides, cache = dict(vision_config_overrides or {}), KVCacheConfig(bits=kv_bits)
    chosen, lora = select_device(device), lora_config(adapter)
    options = LoadOptions(dtype, chosen, max_length, cache, compile, lora, overrides)
    asked = _Asked(path, draft, _REVISION.read(revision), options, engine, has_bars)
    if distributed is not None:
        return _open_together(asked, distributed)
    _warn_of_ranks()
    return _open_alone(asked)


def _open_alone(asked: _Asked) -> Pipeline:
    """The pipeline of one process. Raises: as `load`."""
    own, other = asked.find(), asked.find_draft()
    if other is not None:
        require_same_tokens(own.processor.tokenizer, other.processor.tokenizer)
    processor, options = own.processor, asked.options
    worker = OwnerThread(options.device)
    try:
        with bar(is_on=asked.has_bars) as watch:
            model, drafter = worker.call(lambda: _load_both(own, other, options, watch))
        made = Engine(worker, model, asked.engine, drafter)
        return Pipeline(model, processor, made, has_bars=asked.has_bars)
    except BaseException:
        worker.stop()
        raise


@dataclass(frozen=True)
class _Opened:
    """A checkpoint whose small files have been read."""

    folder: Path
    config: HuggingFaceConfig
    room: Room
    overrides: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, overrides: dict[str, Any]) -> _Opened:
        """Raises: CheckpointError."""
        config = read_config(folder)
        return cls(folder, config, find_room(config), overrides)

    @cached_property
    def processor(self) -> TextProcessor:
        """What makes tokens and pixels of its requests. Raises: CheckpointError."""
        return self.room.processor_class()(self.folder, self.config.to_dict(), self.overrides)

    def load(self, options: LoadOptions, watch: Watch | None) -> PipelineModelWithKVCache:
        return load_model(self.room, self.folder, self.config, options, watch)


def _load_both(
    own: _Opened, other: _Opened | None, options: LoadOptions, watch: Watch | None
) -> tuple[PipelineModelWithKVCache, Drafter | None]:
    """The model, and the one that drafts for it. Both compute alike."""
    model = own.load(options, watch)
    if other is None:
        return model, None
    plain = replace(options, max_length=None, lora=None, vision_config_overrides={})
    smaller, processor = other.load(plain, watch), other.processor

    def new_context(tokens: np.ndarray) -> TextContext:
        processed = ProcessedPrompt("", tokens.tolist(), [], [])
        return processor.new_context(processed, max_length=smaller.max_seq_len)

    return model, Drafter(smaller, new_context, other.folder.name)


_MAX_LENGTH = Option("", name="max_length", kind=int, low=1, takes_none=True)
_KV_BITS = Option("", name="kv_bits", kind=int, takes_none=True)
_COMPILE = Option("", name="compile", kind=bool)
_PROGRESS = Option("", name="progress", kind=bool, takes_none=True)
_REVISION = Option("", name="revision", kind=str, takes_none=True)


def _require_kinds(path: object, adapter: object, engine: object, overrides: object) -> None:
    """Raises: InputError for the first argument of `load` that is not of its type."""
    name = (str, os.PathLike)
    _require_path("path", path)
    adapters = adapter if isinstance(adapter, (list, tuple)) else [adapter]
    if not (adapter is None or all(isinstance(one, name) for one in adapters)):
        raise unfit("adapter", adapter, "a folder or a list of folders")
    if not (engine is None or isinstance(engine, EngineConfig)):
        raise unfit("engine", engine, "an EngineConfig")
    if not (overrides is None or isinstance(overrides, Mapping)):
        raise unfit("vision_config_overrides", overrides, "names with values")


def _require_path(name: str, value: object) -> None:
    if not (value is None or isinstance(value, (str, os.PathLike))):
        raise unfit(name, value, "a folder, a hub id or None")


@dataclass(frozen=True)
class LoadOptions:
    """What a user may say about loading a model."""

    dtype: str = "auto"
    device: Device = field(default_factory=default_device)
    max_length: int | None = None
    kv_cache: KVCacheConfig = field(default_factory=KVCacheConfig)
    compile: bool = True
    lora: LoRAConfig | None = None
    vision_config_overrides: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class _Asked:
    """What `load` was asked for, checked."""

    path: str | Path | None
    draft: str | Path | None
    revision: str | None
    options: LoadOptions
    engine: EngineConfig | None
    has_bars: bool

    def find(self) -> _Opened:
        """The checkpoint; downloaded where it is not here. Raises: as `load`."""
        folder = resolve_folder(self.path, self.revision, progress=self.has_bars)
        return _Opened.of(folder, self.options.vision_config_overrides)

    def find_draft(self) -> _Opened | None:
        """The draft model's, if there is one. Raises: as `load`."""
        if self.draft is None:
            return None
        return _Opened.of(resolve_folder(self.draft, progress=self.has_bars), {})


def _open_together(asked: _Asked, distributed: str | mx.distributed.Group) -> Pipeline:
    """The pipeline of several ranks, on the first; the others do as it does until it closes.

    Raises: as `load`.
    """
    worker = OwnerThread(asked.options.device)
    ranks, team = ALONE, None
    try:
        ranks = worker.call(lambda: join_group(distributed))
        if not ranks.are_many:
            worker.stop()
            return _open_alone(asked)
        team = worker.call(lambda: meet(ranks))
        team.watchdog.tell(worker.abandon)
        options = replace(asked.options, ranks=ranks)
        asked = replace(asked, options=options, has_bars=asked.has_bars and ranks.is_first)
        own, model = _loaded_together(asked, worker, team)
        engine = Engine(worker, model, asked.engine, team=team)
        if ranks.is_first:
            return Pipeline(model, own.processor, engine, has_bars=asked.has_bars)
        with ignoring_interrupts():
            engine.follow()
    except BaseException as error:
        if team is not None:
            team.leave(error)
        worker.stop()
        is_silent = is_follower() or not ranks.is_first
        if not is_silent or not isinstance(error, PipesError):
            raise
        raise _last_word(error) from None
    engine.close()
    raise SystemExit(0)


def _loaded_together(
    asked: _Asked, worker: OwnerThread, team: Team
) -> tuple[_Opened, PipelineModelWithKVCache]:
    """The checkpoint and this rank's part of the model, once all ranks have found the same.

    Raises: RanksDiffer, and as `load`.
    """
    if asked.draft is not None:
        raise ConfigError("draft: not with several ranks; load without a draft model")
    own, facts = team.together(lambda: _found_with_facts(asked))
    team.require_same(facts)

    def load_part() -> PipelineModelWithKVCache:
        if team.ranks.is_first:
            own.processor  # noqa: B018  # what is wrong with it is said before the weights are read
        with bar(is_on=asked.has_bars) as watch:
            room, folder, config, options = own.room, own.folder, own.config, asked.options
            return worker.call(lambda: _load_own(room, folder, config, options, watch))

    return own, team.together(load_part)


def _last_word(error: PipesError) -> SystemExit:
    """The end of a rank that nobody talks to: rank 0 says what all of them have met.

    It waits for that, since a launcher ends all ranks once one has failed.
    """
    if isinstance(error, RanksDiffer) and sys.__stderr__ is not None:
        sys.__stderr__.write(f"error: {error}\n")
    time.sleep(LAST_WORD_S)
    return SystemExit(RANK_LOST if isinstance(error, RankLost) else USER_MISTAKE)


def _found_with_facts(asked: _Asked) -> tuple[_Opened, dict[str, Any]]:
    """The checkpoint, and all that must be the same on all ranks, by name. Raises: as `load`."""
    found, options = asked.find(), asked.options
    facts = {
        "mlx_vlm_pipes": __version__,
        "mlx": version("mlx"),
        "the digest of config.json": values_digest(found.config.to_dict()),
        "the digest of the weight files": files_digest(find_weight_files(found.folder)),
        "the digest of the adapters": adapters_digest(options.lora),
        "dtype": options.dtype,
        "device": options.device.label,
        "max_length": options.max_length,
        "kv_bits": options.kv_cache.bits,
        "compile": options.compile,
        "the digest of vision_config_overrides": values_digest(options.vision_config_overrides),
        "engine": None if asked.engine is None else repr(asked.engine),
    }
    return found, facts


def _warn_of_ranks() -> None:
    """Say once, on rank 0, that the launcher's processes run a model each."""
    if launched_rank() == 0 and launched_size() > 1:
        warnings.warn(
            f"{launched_size()} processes each load the whole model and answer by themselves; "
            'load(..., distributed="auto") runs one model on all of them',
            PipesWarning,
            stacklevel=3,
        )


def lora_config(adapter: str | Path | Sequence[str | Path] | None) -> LoRAConfig | None:
    """The adapters to load, as a LoRAConfig; any rank is taken."""
    if adapter is None:
        return None
    listed = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
    paths = [str(path) for path in listed]
    return LoRAConfig(
        enable_lora=True, lora_paths=paths, max_lora_rank=4096, max_num_loras=max(1, len(paths))
    )


def load_model(
    room: Room,
    folder: Path,
    config: HuggingFaceConfig,
    options: LoadOptions,
    watch: Watch | None = None,
) -> PipelineModelWithKVCache:
    """The pipeline model of a folder, on the calling thread; watch: is told of its weights.

    On several ranks all load it or none. Raises: CheckpointError on a rank whose own part is fine,
    where another's is not.
    """
    ranks, failure, model = options.ranks, None, None
    try:
        model = _load_own(room, folder, config, options, watch)
    except Exception as error:
        if not ranks.are_many:
            raise
        failure = error
    failed = ranks.total(int(failure is not None))
    if failure is not None:
        raise failure
    if failed or model is None:
        raise CheckpointError(
            f"{failed} of {ranks.size} ranks could not load the model; their messages say why"
        )
    return model


def _load_own(
    room: Room,
    folder: Path,
    config: HuggingFaceConfig,
    options: LoadOptions,
    watch: Watch | None,
) -> PipelineModelWithKVCache:
    """The model of this process, or its part of it."""
    devices = [options.device] * options.ranks.size
    weights = load_weights(find_weight_files(folder))
    model_config = model_config_for(folder, config, weights, options)
    return room.model_class()(
        PipelineConfig(model=model_config, lora=options.lora),
        InferenceSession(devices[:1], compile=options.compile, watch=watch, ranks=options.ranks),
        devices,
        model_config.kv_cache,
        weights,
        return_logits=ReturnLogits.VARIABLE,
    )


def model_config_for(
    folder: Path, config: HuggingFaceConfig, weights: Weights, options: LoadOptions
) -> ModelConfig:
    """A ModelConfig with its encoding resolved from config.json and the weight headers.

    Raises: ConfigError for a dtype that is not a float type we compute with.
    """
    if options.dtype not in ("auto", *COMPUTE_TYPES):
        raise ConfigError(f"dtype {shown(options.dtype)}; use auto, {', '.join(COMPUTE_TYPES)}")
    wanted, device = options.dtype, options.device
    if wanted == "auto":
        stored = (handle.data() for _, handle in weights.items())
        floats = [DType[name] for name in COMPUTE_TYPES]
        wanted = "float32" if device.is_host else dominant_type(stored, floats).name
    return ModelConfig(
        model_path=str(folder),
        weight_path=find_weight_files(folder),
        quantization_encoding=wanted,
        device_specs=[DeviceSpec(device.id, device.label)] * options.ranks.size,
        max_length=options.max_length,
        kv_cache=options.kv_cache,
        vision_config_overrides=options.vision_config_overrides,
        huggingface_config=config,
    ).resolve(weights)


def select_device(name: str | None) -> Device:
    """The MLX device of this name, its default for None; the default itself is left alone.

    Raises: ConfigError for one that is not there.
    """
    if name is None:
        return default_device()
    if name not in ("cpu", "gpu"):
        raise ConfigError(f"device {shown(name)}; use 'cpu' or 'gpu'")
    device = DeviceRef(name).to_device()
    if not device.is_available:
        raise ConfigError(f"MLX has no {name} here; install mlx for it or leave device out")
    return device


def resolve_folder(
    path: str | Path | None, revision: str | None = None, *, progress: bool | None = None
) -> Path:
    """The checkpoint's folder, or its GGUF file; downloaded where `path` is the id of one.

    A folder whose only weights are one GGUF file stands for that file. progress: as for `load`.
    Raises: CheckpointNotFound if there is none; WeightsError for several GGUF files.
    """
    if path is None:
        return BUNDLED
    folder, name = user_path(path), str(path)
    if is_there(folder, CheckpointNotFound) and os.path.isdir(folder):
        return only_gguf(folder) or folder
    if is_gguf(folder):
        return folder
    if os.path.exists(folder) or not is_hub_name(name):
        raise CheckpointNotFound(
            f"no model at {clip(name, 200)}; expected a folder, a GGUF file or a hub id"
        )
    return download(name, revision, has_bar=is_wanted(progress))
