"""What one request asks of sampling, and its own random numbers, counts and penalties.

Every row carries its own key, so a seed gives the same tokens in any batch. Rows are sampled
together (see group_sampler); what a row has here is where it starts.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_vlm_pipes.contexts import SamplingParams
from mlx_vlm_pipes.errors import InputError
from mlx_vlm_pipes.options import SAMPLING_OPTIONS, LogitsProcessor, unfit

COLDEST = 1e-20  # below this temperature logits come to less than NEGATIVE: as good as greedy
NEGATIVE = -1e30  # stands for minus infinity: survives a later subtraction


def read_sampling(params: SamplingParams) -> SamplingParams:
    """The same in plain Python types. Raises: InputError naming the first wrong value."""
    given = vars(params)
    read = {o.field: o.read(given[o.field]) for o in SAMPLING_OPTIONS.values()}
    most, least = read["max_new_tokens"], read["min_new_tokens"]
    if most is not None and least > most:
        raise unfit("min_tokens", least, f"at most max_tokens, which is {most}")
    return replace(params, **read)


class Home(Protocol):
    """What holds the state of several rows, stacked (group_sampler.GroupSampler)."""

    def row(self, name: str, index: int) -> mx.array: ...


class RowSampler:
    """One request's settings and sampling state, which lives on the device.

    Args: prompt int64 [n]; end_ids, tokens that may not come before `min_new_tokens`; processors,
    the request's own functions, which change its logits before anything else: a row that has some
    is sampled by itself, and what they raise ends its request only.
    steps: tokens chosen so far. tokens: int32 [n], prompt and answer, for processors.
    Raises: InputError for a value out of its bounds, or a token beyond the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: np.ndarray,
        vocab_size: int,
        end_ids: Sequence[int],
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.params = params = read_sampling(params)
        for token in params.stop_token_ids:
            if token >= vocab_size:
                raise unfit("stop_token_ids", token, f"tokens below {vocab_size}, the vocabulary")
        self.steps, self.vocab_size = 0, vocab_size
        self.processors = tuple(processors)
        self.tokens = mx.array(prompt.astype(np.int32)) if processors else mx.zeros(0, mx.int32)
        self.end_ids = [t for t in end_ids if t < vocab_size]
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self.bias = _dense_bias(params.logit_bias, vocab_size)
        self._initial = {"keys": mx.random.key(seed % 2**64)}
        if params.presence_penalty or params.frequency_penalty:
            self._initial["counts"] = mx.zeros((vocab_size,))
        if params.repetition_penalty != 1.0:
            counts = np.bincount(prompt[prompt < vocab_size], minlength=vocab_size)
            self._initial["seen"] = mx.array(counts.astype(np.float32))
        self._home: tuple[Home, int] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < COLDEST

    @property
    def top_k(self) -> int:
        """How many of the largest logits are kept; 0 where all are, or the largest is taken."""
        limit = self.params.top_k
        return 0 if self.is_greedy or not 0 < limit < self.vocab_size else limit

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the largest logit."""
        adjusts = len(self._initial) > 1 or self.bias is not None or self.withholds_end
        return self.is_greedy and not adjusts and not self.processors

    @property
    def withholds_end(self) -> bool:
        """Whether the next token may not be an end token."""
        return self.steps < self.params.min_new_tokens and bool(self.end_ids)

    def banned(self) -> np.ndarray | None:
        """bool [V]: the tokens that the options forbid next; None where they forbid none."""
        biased = self.bias is not None and self.bias.min() <= NEGATIVE
        if not biased and not self.withholds_end:
            return None
        found = np.zeros(self.vocab_size, bool)
        if self.bias is not None:
            found |= self.bias <= NEGATIVE
        if self.withholds_end:
            found[self.end_ids] = True
        return found

    def processed(self, logits: mx.array) -> mx.array:
        """The row's logits float32 [1, V] as its processors change them, one after the other.

        Raises: what a processor raises; InputError where it returns something else than logits.
        """
        made = logits
        for processor in self.processors:
            made = _logits_of(processor, self.tokens, made)
        made = mx.clip(made, NEGATIVE, -NEGATIVE)  # they ban tokens by minus infinity
        return mx.where(mx.isneginf(logits), logits, made)  # these the answer's form has banned

    def note(self, token: mx.array) -> None:
        """Add a chosen token uint32 [1], not computed yet, to what processors are shown."""
        if self.processors:
            self.tokens = mx.concatenate([self.tokens, token.astype(mx.int32)])

    def twin(self) -> RowSampler:
        """One that chooses as this one will, but for processors, and leaves this one as it is."""
        other = copy.copy(self)
        other._initial = {name: self.state(name) for name in self._initial}
        other.processors, other._home = (), None
        return other

    def has(self, name: str) -> bool:
        """Whether the row has that state: "keys" uint32 [2]; float32 [V], how often each token was
        in the answer, "counts", or in it and the prompt, "seen"."""
        return name in self._initial

    def state(self, name: str) -> mx.array:
        if self._home is None:
            return self._initial[name]
        home, index = self._home
        return home.row(name, index)

    def move(self, home: Home, index: int) -> None:
        """From now on the state is a row of what `home` holds."""
        self._home = home, index


def _logits_of(processor: LogitsProcessor, tokens: mx.array, logits: mx.array) -> mx.array:
    """What a processor makes of logits float32 [1, V]. It may write into those it is given."""
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        made = processor(tokens, logits[:])
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        # these would end the thread, and with it the answers of all others
        raise InputError(f"logits_processors: {name} raised {type(error).__name__}") from error
    if not isinstance(made, mx.array):
        found = type(made).__name__
    elif made.shape != logits.shape or not mx.issubdtype(made.dtype, mx.floating):
        found = f"{str(made.dtype).rpartition('.')[2]} {list(made.shape)}"
    else:
        return made.astype(mx.float32)
    raise InputError(
        f"logits_processors: {name} returned {found}; expected logits, a float mx.array "
        f"{list(logits.shape)}"
    )


def _dense_bias(bias: dict[int, float], vocab_size: int) -> np.ndarray | None:
    """float32 [V], or None where there is none."""
    if not bias:
        return None
    dense = np.zeros(vocab_size, np.float32)
    for token, value in bias.items():
        if not 0 <= token < vocab_size:
            message = f"logit_bias for token {token}; the vocabulary has {vocab_size}"
            raise InputError(message, param="logit_bias")
        dense[token] = np.clip(value, NEGATIVE, -NEGATIVE)
    return dense
