"""One request on its way through the engine: its tokens, its pictures, how to sample and stop.

Numpy only, so that `processing` can build contexts without MLX. `interfaces` re-exports all of it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlx_vlm_pipes.errors import ContextTooLong, InputError, shown
from mlx_vlm_pipes.options import LogitsProcessor, default


class TokenBuffer:
    """All tokens of a sequence, and how far they have been processed.

    `all` = `prompt` + `generated`; the first `processed_length` tokens are in the KV cache, the
    next `active_length` go into the coming step. At creation the whole prompt is active.

    Args: tokens, int64 [n], n >= 1. Raises: InputError for an empty or non-1-D array.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.ndim != 1 or not len(tokens):
            raise InputError(f"a token buffer needs a non-empty 1-D array, got {tokens.shape}")
        self._tokens = tokens.copy()
        self._size = len(tokens)
        self.prompt_length = len(tokens)
        self.processed_length = 0
        self._active_end = len(tokens)

    @property
    def all(self) -> np.ndarray:
        return self._tokens[: self._size]

    @property
    def prompt(self) -> np.ndarray:
        return self._tokens[: self.prompt_length]

    @property
    def generated(self) -> np.ndarray:
        return self._tokens[self.prompt_length : self._size]

    @property
    def active(self) -> np.ndarray:
        return self._tokens[self.processed_length : self._active_end]

    @property
    def generated_length(self) -> int:
        return self._size - self.prompt_length

    @property
    def active_length(self) -> int:
        return self._active_end - self.processed_length

    @property
    def current_position(self) -> int:
        """End of the active tokens: processed + active."""
        return self._active_end

    @property
    def is_chunked(self) -> bool:
        """Whether tokens after the active ones wait for a later chunk."""
        return self._active_end < self._size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int | slice) -> Any:
        return self.all[index]

    def append(self, token: int) -> None:
        """Store a token without changing what is processed or active."""
        if self._size == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros(self._size + 64, np.int64)])
        self._tokens[self._size] = token
        self._size += 1

    def advance_with_token(self, token: int) -> None:
        """Everything so far becomes processed; the new token is the only active one."""
        self.processed_length = self._size
        self.append(token)
        self._active_end = self._size

    def draft(self, tokens: Sequence[int]) -> None:
        """Run these behind the active tokens in the coming step; `drop_draft` takes them off."""
        for token in tokens:
            self.append(token)
        self._active_end = self._size

    def drop_draft(self, count: int) -> None:
        """Forget the last `count` tokens, which `draft` has put there."""
        self._size -= count
        self._active_end = self._size

    def chunk(self, size: int) -> None:
        """Limit the active tokens to the first `size` of them."""
        if not 1 <= size <= self.active_length:
            raise InputError(f"chunk of {size} tokens out of {self.active_length} active ones")
        self._active_end = self.processed_length + size

    def advance_chunk(self) -> None:
        """The active chunk is processed; all that is left becomes active."""
        self.processed_length, self._active_end = self._active_end, self._size

    def skip_processing(self, count: int) -> None:
        """Count the next `count` active tokens as processed (they came from a prefix cache)."""
        if not 0 <= count < self.active_length:
            raise InputError(f"cannot skip {count} of {self.active_length} active tokens")
        self.processed_length += count

    def rewind_processing(self, count: int) -> None:
        """Make the last `count` processed tokens active again."""
        if not 0 <= count <= self.processed_length:
            raise InputError(f"cannot rewind {count} of {self.processed_length} processed tokens")
        self.processed_length -= count

    def reset_as_new_prompt(self) -> None:
        """Generated tokens join the prompt; nothing is processed any more."""
        self.prompt_length = self._active_end = self._size
        self.processed_length = 0


def require_known_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Check int64 ids [n] against the rows of the embedding: a step would read what lies behind.

    Raises: InputError for an id that is negative or has no row.
    """
    unknown = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(unknown):
        raise InputError(
            f"token id {unknown[0]}, expected 0 to {vocab_size - 1}: the model's embedding has "
            f"{vocab_size} rows; use the tokenizer that the model was trained with"
        )


@dataclass(frozen=True)
class EOSTracker:
    """Decides where a row ends: token ids, token sequences, or strings in the decoded text."""

    eos_token_ids: frozenset[int] = frozenset()
    eos_sequences: tuple[tuple[int, ...], ...] = ()
    eos_stop_strings: tuple[str, ...] = ()

    def is_eos(self, generated: np.ndarray) -> bool:
        """Whether the generated tokens (int64 [n]) end in an end token or sequence."""
        if not len(generated):
            return False
        if int(generated[-1]) in self.eos_token_ids:
            return True
        return any(tuple(generated[-len(s) :].tolist()) == s for s in self.eos_sequences)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 is greedy; top_k -1 means no limit.

    The defaults are those of a request (options.py), but for two of MAX's: temperature, and
    max_new_tokens without a limit.
    """

    top_k: int = default("top_k")
    top_p: float = default("top_p")
    min_p: float = default("min_p")
    temperature: float = 1.0
    repetition_penalty: float = default("repetition_penalty")
    presence_penalty: float = default("presence_penalty")
    frequency_penalty: float = default("frequency_penalty")
    max_new_tokens: int | None = None
    min_new_tokens: int = default("min_tokens")
    ignore_eos: bool = default("ignore_eos")
    stop: tuple[str, ...] = default("stop")
    stop_token_ids: tuple[int, ...] = default("stop_token_ids")
    seed: int | None = default("seed")
    logit_bias: dict[int, float] = field(default_factory=dict)


class GenerationStatus(str, enum.Enum):
    """Where a request stands; the ended ones give `finish_reason`."""

    ACTIVE = "active"
    END_OF_SEQUENCE = "stop"
    MAXIMUM_LENGTH = "length"
    CANCELLED = "cancelled"

    @property
    def is_done(self) -> bool:
        return self is not GenerationStatus.ACTIVE


@dataclass(frozen=True)
class ImageMetadata:
    """One image (or frame, or clip) of a prompt.

    start_idx, end_idx: half-open range of its placeholder tokens. pixel_values: the room's
    layout (docs/api.md#pictures). image_hash: content hash, equal only for equal pixels after equal
    processing.
    """

    start_idx: int
    end_idx: int
    pixel_values: np.ndarray
    image_hash: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start_idx < self.end_idx:
            raise InputError(f"image range [{self.start_idx}, {self.end_idx}) is not a range")


class Constraint(Protocol):
    """What an answer may go on with (grammar.FormConstraint, grammar.Thought)."""

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: a bit for each token that may come next, the lowest first."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind a token. Raises: InputError where it does not fit."""
        ...

    def forced(self) -> list[int]:
        """The next tokens, as far as each of them is the only one that may come."""
        ...


@dataclass(kw_only=True)
class TextContext:
    """A text request. max_length bounds prompt plus generated tokens.

    images: none here; `TextAndVisionContext` has them. logits_processors: the request's own
    functions (tokens int32 [n], logits float32 [1, V]) -> logits, all mx.array, before all else.
    constraint: the form that the answer must have. speculative: where tokens are drafted, and
    several run in one step: "lookup", from prompt and answer; "draft", by a smaller model.
    num_draft_tokens: at most so many of them together.
    Raises: ContextTooLong when `min_tokens + prompt_length > max_length`.
    """

    max_length: int
    tokens: TokenBuffer
    request_id: str = ""
    eos_tracker: EOSTracker = field(default_factory=EOSTracker)
    log_probabilities: int = 0
    log_probabilities_echo: bool = False
    ignore_eos: bool = False
    json_schema: str | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    model_name: str = ""
    logits_processors: Sequence[LogitsProcessor] = ()
    constraint: Constraint | None = None
    speculative: str | None = None
    num_draft_tokens: int | None = None
    status: GenerationStatus = GenerationStatus.ACTIVE
    images: Sequence[ImageMetadata] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if self.min_tokens + self.tokens.prompt_length > self.max_length:
            raise ContextTooLong(
                f"{self.tokens.prompt_length} prompt tokens and at least {shown(self.min_tokens)} "
                f"new ones exceed max_length {self.max_length}; shorten the prompt"
            )

    @property
    def min_tokens(self) -> int:
        return self.sampling_params.min_new_tokens

    @property
    def is_done(self) -> bool:
        return self.status.is_done

    @property
    def is_initial_prompt(self) -> bool:
        return self.tokens.processed_length == 0

    @property
    def image_idx(self) -> int:
        """Index of the first image that is not processed yet, else the number of images."""
        done = self.tokens.processed_length
        return next((i for i, m in enumerate(self.images) if done < m.end_idx), len(self.images))

    @property
    def next_images(self) -> Sequence[ImageMetadata]:
        """The images whose placeholders are not all processed yet."""
        return self.images[self.image_idx :]

    @property
    def active_images(self) -> list[ImageMetadata]:
        """Those of them that a step over the active tokens encodes."""
        end = self.tokens.current_position
        return [image for image in self.next_images if image.start_idx < end]

    @property
    def needs_vision_encoding(self) -> bool:
        return self.image_idx < len(self.images)

    @property
    def image_token_indices(self) -> np.ndarray:
        """int32 positions, in all tokens, of the placeholders that receive a vision row."""
        spans = [self.placeholder_positions(image) for image in self.images]
        return np.concatenate([np.zeros(0, np.int32), *spans]).astype(np.int32)

    def placeholder_positions(self, image: ImageMetadata) -> np.ndarray:
        """int32 positions of one image's placeholders, in all tokens."""
        span = self.tokens[image.start_idx : image.end_idx]
        return (np.flatnonzero(span == span[0]) + image.start_idx).astype(np.int32)

    @property
    def position_delta(self) -> int:
        """What the decoder adds to the index of a generated token to get its position."""
        return 0

    @property
    def whole_spans(self) -> Sequence[tuple[int, int]]:
        """Ranges of tokens that see each other both ways; a step has all of one or nothing."""
        return ()

    def uncut(self, begin: int, end: int) -> int:
        """Where a slice from `begin` can end: at `end` or, so that no whole span is cut, before
        it, or behind the span where the slice begins with one."""
        for first, last in self.whole_spans:
            if first < end < last:
                return first if first > begin else last
        return end

    def update(self, token: int, log_probabilities: Any = None) -> None:
        """Take a generated token; the status says whether it was the last one."""
        del log_probabilities  # kept by the engine's result, not by the context
        self.tokens.advance_with_token(token)
        ends = not self.ignore_eos and self.tokens.generated_length > self.min_tokens
        if ends and self.eos_tracker.is_eos(self.tokens.generated):
            self.status = GenerationStatus.END_OF_SEQUENCE
        elif self._is_full():
            self.status = GenerationStatus.MAXIMUM_LENGTH

    def reset(self) -> None:
        """Start over: generated tokens join the prompt, nothing is processed."""
        self.tokens.reset_as_new_prompt()

    def _is_full(self) -> bool:
        limit = self.sampling_params.max_new_tokens
        if limit is not None and self.tokens.generated_length >= limit:
            return True
        return len(self.tokens) >= self.max_length


@dataclass(kw_only=True)
class TextAndVisionContext(TextContext):
    """A request with pictures, whose placeholders are already expanded in the tokens.

    vision_token_ids: ids that may begin or end an image's range. A range begins with its
    placeholder, the token that receives a vision row. whole_images: the tokens of a range see each
    other both ways.
    """

    vision_token_ids: list[int]
    images: Sequence[ImageMetadata] = field(default_factory=list)
    extra_model_args: dict[str, np.ndarray] = field(default_factory=dict)
    whole_images: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        end = 0
        for image in self.images:
            if image.start_idx < end or image.end_idx > len(self.tokens):
                raise InputError(
                    f"image range [{image.start_idx}, {image.end_idx}) overlaps another one or "
                    f"leaves the {len(self.tokens)} tokens; images must come in order"
                )
            ends = {int(self.tokens[image.start_idx]), int(self.tokens[image.end_idx - 1])}
            if not ends <= set(self.vision_token_ids):
                raise InputError(
                    f"image range [{image.start_idx}, {image.end_idx}) begins or ends with tokens "
                    f"{sorted(ends)}, which are not among the vision tokens {self.vision_token_ids}"
                )
            end = image.end_idx

    @property
    def whole_spans(self) -> Sequence[tuple[int, int]]:
        if not self.whole_images:
            return ()
        return [(image.start_idx, image.end_idx) for image in self.images]
