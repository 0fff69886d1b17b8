"""What a step reads and what it gives: the documented inputs and outputs (docs/api.md#steps)."""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.errors import ConfigError, InputError

if TYPE_CHECKING:
    from mlx_vlm_pipes.kv_cache import KVCacheInputs

Buffer = mx.array
PerDeviceT = TypeVar("PerDeviceT", Buffer, list[Buffer])
KindT = TypeVar("KindT")
InputsT = TypeVar("InputsT", bound="ModelInputs")


class ReturnLogits(str, enum.Enum):
    """Which positions get logits: the last of each row, the last n of each row, or all."""

    LAST_TOKEN = "last_token"
    VARIABLE = "variable"
    ALL = "all"


class ReturnHiddenStates(str, enum.Enum):
    """Which hidden states `execute` returns beside the logits (docs/api.md#steps).

    EAGLE3: of all tokens, the outputs of the model's `eagle_layers` side by side, [T, k * E].
    """

    NONE = "none"
    LAST = "last"
    LAST_PER_DEVICE = "last_per_device"
    ALL = "all"
    ALL_NORMALIZED = "all_normalized"
    EAGLE3 = "eagle3"


class Phase(enum.Enum):
    """What a step does with its rows: read (part of) a prompt, or one token of each row.

    DECODE promises that every row runs its last token alone and that no vision rows go in. VERIFY:
    as DECODE, but every row runs its last token and as many drafted ones as the others, and all
    of them get logits.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"


@dataclass(frozen=True)
class StepMode:
    """How a step runs: its phase, and which adapter its tokens take.

    lora_ids int32 [G]: a slot for each group of adjacent tokens; lora_grouped_offsets uint32
    [G + 1]: where the groups begin and end. None: the base model.
    """

    phase: Phase = Phase.PREFILL
    lora_ids: Buffer | None = None
    lora_grouped_offsets: Buffer | None = None


@dataclass(kw_only=True)
class ModelInputs:
    """What one step reads. A room's inputs add their own fields.

    hidden_states: of a target model, for a draft model that reads them; none is run here, and
    they are refused.
    """

    kv_cache_inputs: KVCacheInputs | None = None
    lora_ids: Buffer | None = None
    lora_ranks: Buffer | None = None
    hidden_states: Buffer | list[Buffer] | None = None
    phase: Phase = Phase.PREFILL

    def update(self, **values: Any) -> None:
        """Overwrite existing fields with the values that are not None."""
        names = {f.name for f in fields(self)}
        for name, value in values.items():
            if name in names and value is not None:
                setattr(self, name, value)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        raise NotImplementedError(f"{type(self).__name__} does not list its buffers")

    def active_tokens(self) -> list[list[int]]:
        """This step's tokens, row by row. Waits for them."""
        raise NotImplementedError(f"{type(self).__name__} has no rows of tokens")


def one_device(value: Buffer | list[Buffer]) -> Buffer:
    """The array itself, where inputs list one for each device."""
    return value[0] if isinstance(value, list) else value


class RaggedInputs(ModelInputs, Generic[PerDeviceT]):
    """Inputs whose rows lie behind one another on a flat token axis.

    Each room's dataclass has these fields in its own documented order. PerDeviceT is an array, or
    a list with one array for each device.
    """

    tokens: Buffer
    input_row_offsets: PerDeviceT
    return_n_logits: Buffer
    lora_grouped_offsets: Buffer | None

    @property
    def mode(self) -> StepMode:
        return StepMode(self.phase, self.lora_ids, self.lora_grouped_offsets)

    def active_tokens(self) -> list[list[int]]:
        flat: list[int] = np.array(self.tokens).tolist()
        bounds: list[int] = np.array(one_device(self.input_row_offsets)).tolist()
        return [flat[begin:end] for begin, end in itertools.pairwise(bounds)]


@dataclass(kw_only=True)
class LoRAGroups(ModelInputs):
    """The LoRA inputs of `Llama3Inputs`, for rooms whose documented inputs list fewer."""

    lora_grouped_offsets: Buffer | None = None
    num_active_loras: Buffer | None = None
    lora_end_idx: Buffer | None = None
    batch_seq_len: Buffer | None = None
    lora_ids_kv: Buffer | None = None
    lora_grouped_offsets_kv: Buffer | None = None


class VisionInputs(LoRAGroups, RaggedInputs[PerDeviceT]):
    """Ragged inputs with pictures: the tower's arguments, or the vision rows it made before.

    vision_fields: names of the fields that the tower takes, in the order of its arguments.
    per_device: whether these, offsets and indices are lists with one array for each device.
    """

    vision_fields: ClassVar[tuple[str, ...]]
    per_device: ClassVar[bool] = False
    image_token_indices: PerDeviceT | None
    image_embeddings: Buffer | None

    @property
    def has_vision_inputs(self) -> bool:
        """Whether this step has pixels to encode."""
        return getattr(self, self.vision_fields[0]) is not None

    def vision_arguments(self) -> list[Buffer]:
        """What the tower is called with."""
        return [one_device(getattr(self, name)) for name in self.vision_fields]


@dataclass
class ModelOutputs:
    """logits float32 [rows, V]; row i of the batch is logits[offsets[i]:offsets[i+1]]."""

    logits: Buffer
    next_token_logits: Buffer | None = None
    logit_offsets: Buffer | None = None
    hidden_states: Buffer | None = None

    def last_logits(self) -> Buffer:
        """float32 [rows of the batch, V]: what each row's next token is chosen from.

        Raises: InputError if the model gave none.
        """
        if self.next_token_logits is None:
            raise InputError("a step without next_token_logits; a model's execute must give them")
        return self.next_token_logits


def require_kind(value: object, kind: type[KindT]) -> KindT:
    """The value, known to be of that class. Raises: TypeError for one of another class."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def require_inputs(inputs: ModelInputs, kind: type[InputsT]) -> InputsT:
    """The inputs of a step.

    Raises: TypeError for another class, ConfigError without a cache, InputError for the hidden
    states of another model.
    """
    own = require_kind(inputs, kind)
    if own.hidden_states is not None:
        raise InputError("hidden_states: no draft model that reads them is run; leave them None")
    if own.kv_cache_inputs is None:
        raise ConfigError(f"{kind.__name__} without kv_cache_inputs; pass the cache of this batch")
    return own
