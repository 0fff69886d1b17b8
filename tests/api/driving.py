"""The documented API driven by hand: build a model, prefill, decode, read the results.

Only what docs/api.md names is used. A `Room` says what a test file cannot share with the others:
its classes, its fixture, and how a stored prompt becomes a context.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.config import KVCacheConfig, ModelConfig, PipelineConfig, RuntimeConfig
from mlx_vlm_pipes.contexts import TextContext
from mlx_vlm_pipes.dtypes import Device
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from mlx_vlm_pipes.interfaces import (
    InferenceSession,
    ModelInputs,
    ModelOutputs,
    ReturnHiddenStates,
    ReturnLogits,
)
from mlx_vlm_pipes.kv_cache import KVCache, KVCacheInputs, cache_inputs, increment_cache_lengths
from mlx_vlm_pipes.quantization import LoRAConfig
from mlx_vlm_pipes.weights import load_weights
from tests.device import bar, device, device_spec

BAR = bar(2e-5)  # of the largest logit; CONTRIBUTING.md promises 2e-3
STEPS = 5  # tokens that every test decodes
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Room:
    """One architecture's documented classes, and a checkpoint of it with stored numbers.

    text: prefix of the decoder's tensors in the fixture; head: the tensor that gives logits.
    cut: where the first prompt is cut in two chunks; it lies inside a picture, if there is one.
    """

    model: Any
    inputs: type[ModelInputs]
    config: Any
    folder: Path
    prompts: tuple[str, str]
    text: str
    head: str
    cut: int
    make_context: Callable[[dict[str, Any], Arrays, str], TextContext]

    @functools.cached_property
    def config_json(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @property
    def text_json(self) -> dict[str, Any]:
        return self.config_json.get("text_config", self.config_json)

    @functools.cached_property
    def arrays(self) -> Arrays:
        """transformers' numbers: `<prompt>/input_ids`, `/logits`, `/greedy`, ..."""
        return np.load(self.folder / "reference.npz")

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The checkpoint's own tensors in float32, by their names in the file."""
        stored: Any = mx.load(str(self.folder / "model.safetensors"))
        return {name: np.array(array.astype(mx.float32)) for name, array in stored.items()}

    def context(self, prompt: str, **fields: Any) -> TextContext:
        """A new context for a stored prompt; fields such as model_name are set on it."""
        made = self.make_context(self.config_json, self.arrays, prompt)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    def contexts(self) -> list[TextContext]:
        return [self.context(prompt) for prompt in self.prompts]

    def logits(self, prompt: str) -> np.ndarray:
        return self.arrays[f"{prompt}/logits"]

    def greedy(self, prompt: str) -> list[int]:
        return self.arrays[f"{prompt}/greedy"][:STEPS].tolist()

    def hidden(self, outputs: np.ndarray) -> np.ndarray:
        """Logits of normalised hidden states [T, D], in numpy."""
        return outputs @ self.tensors[self.head].T

    def normed(self, h: np.ndarray) -> np.ndarray:
        """The decoder's last norm over hidden states [T, D], in numpy."""
        return rms_norm(h, self.tensors[f"{self.text}norm.weight"], self.text_json["rms_norm_eps"])


def rms_norm(h: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * h / np.sqrt((h**2).mean(-1, keepdims=True) + eps)


def pipeline_config(
    folder: Path,
    *,
    runtime: RuntimeConfig | None = None,
    lora: LoRAConfig | None = None,
    draft_model: ModelConfig | None = None,
    speculative: Any = None,
    **options: Any,
) -> PipelineConfig:
    """A float32 pipeline on the suite's device over a folder; options are ModelConfig's."""
    model = ModelConfig(
        **{
            "model_path": str(folder),
            "weight_path": sorted(folder.glob("*.safetensors")),
            "quantization_encoding": "float32",
            "device_specs": [device_spec()],
            **options,
        }
    )
    return PipelineConfig(
        model, draft_model, runtime or RuntimeConfig(), lora=lora, speculative=speculative
    )


def build(
    kind: Any,
    folder: Path,
    *,
    return_logits: ReturnLogits = ReturnLogits.ALL,
    return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
    devices: list[Device] | None = None,
    adapter: Any = None,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A model by its documented constructor; `more` are keywords of the constructor."""
    pipeline = pipeline_config(folder, **options)
    chosen = [device()] if devices is None else devices
    return kind(
        pipeline,
        InferenceSession(chosen),
        chosen,
        pipeline.model.kv_cache,
        load_weights(pipeline.model.weight_path),
        adapter,
        return_logits,
        return_hidden_states=return_hidden_states,
        **(more or {}),
    )


@functools.cache
def model_of(
    room: Room,
    return_logits: ReturnLogits = ReturnLogits.ALL,
    return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
) -> Any:
    """The room's model, made once for each way of returning."""
    return build(
        room.model,
        room.folder,
        return_logits=return_logits,
        return_hidden_states=return_hidden_states,
    )


def new_cache(model: Any, rows: int = 1) -> KVCacheInputs[mx.array, mx.array]:
    cache = KVCache(model.kv_params)
    return cache_inputs(cache, [cache.new_row() for _ in range(rows)])


def lengths(contexts: Sequence[TextContext]) -> list[int]:
    return [context.tokens.active_length for context in contexts]


def step(model: Any, inputs: Any, counts: Sequence[int]) -> ModelOutputs:
    """Execute, and count the tokens as cached."""
    outputs = model.execute(inputs)
    increment_cache_lengths(inputs.kv_cache_inputs, counts)
    return outputs


def prefill(
    model: Any, contexts: Sequence[TextContext], kv: Any = None, return_n_logits: int = 1
) -> tuple[Any, ModelOutputs]:
    """One step over the active tokens of all contexts."""
    kv = new_cache(model, len(contexts)) if kv is None else kv
    inputs = model.prepare_initial_token_inputs([contexts], kv, return_n_logits)
    return inputs, step(model, inputs, lengths(contexts))


def decode(model: Any, inputs: Any, outputs: ModelOutputs, steps: int = STEPS) -> list[list[int]]:
    """Greedy tokens of each row, [B][steps]."""
    chosen: list[list[int]] = []
    for _ in range(steps):
        tokens = mx.argmax(best(outputs), axis=-1)
        chosen.append(np.array(tokens).tolist())
        inputs = model.prepare_next_token_inputs(tokens, inputs)
        outputs = step(model, inputs, [1] * len(chosen[-1]))
    return np.array(chosen).T.tolist()


def best(outputs: ModelOutputs) -> mx.array:
    assert outputs.next_token_logits is not None
    return outputs.next_token_logits


def row_logits(outputs: ModelOutputs) -> list[np.ndarray]:
    """Each row's logits by `logit_offsets`."""
    assert outputs.logit_offsets is not None
    logits, offsets = np.array(outputs.logits), np.array(outputs.logit_offsets).tolist()
    return [logits[begin:end] for begin, end in itertools.pairwise(offsets)]


def relative(got: Any, want: np.ndarray) -> float:
    """The largest difference, in units of the largest wanted value."""
    return float(np.abs(np.array(got) - want).max() / np.abs(want).max())


def with_config(room: Room, **changes: Any) -> HuggingFaceConfig:
    """The room's configuration with `part__key=value` set; `key=value` at the top."""
    values = json.loads(json.dumps(room.config_json))
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (values[part] if part else values)[key] = value
    return HuggingFaceConfig(values)


# ---- LoRA: adapters, and the same adapters merged into the weights by numpy


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: folder, scale = lora_alpha / r, and A [r, in], B [out, r] by tensor name."""

    folder: Path
    rank: int
    scale: float
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]


def write_adapter(room: Room, folder: Path, rank: int, modules: Sequence[str]) -> Adapter:
    """Random factors for some modules of every decoder layer of the room's fixture."""
    numbers, pairs, scale = np.random.default_rng(rank), {}, 2.0
    for name, weight in room.tensors.items():
        if not name.startswith(f"{room.text}layers.") or name.split(".")[-2] not in modules:
            continue
        if name.endswith(".weight"):
            out, inputs = weight.shape
            pairs[name.removesuffix(".weight")] = (
                numbers.normal(0, 0.3, (rank, inputs)).astype(np.float32),
                numbers.normal(0, 0.3, (out, rank)).astype(np.float32),
            )
    folder.mkdir()
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = mx.array(a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = mx.array(b)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "bias": "none",
        "target_modules": list(modules),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return Adapter(folder, rank, scale, pairs)


def merged_folder(room: Room, adapter: Adapter, folder: Path) -> Path:
    """The room's checkpoint with W + scale * B @ A in place of W."""
    folder.mkdir()
    shutil.copy(room.folder / "config.json", folder)
    tensors = dict(room.tensors)
    for name, (a, b) in adapter.pairs.items():
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + adapter.scale * b @ a
    save(folder, tensors)
    return folder


def save(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    arrays = {name: mx.array(array) for name, array in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})


def paged(size: int) -> KVCacheConfig:
    return KVCacheConfig(kv_cache_page_size=size)
