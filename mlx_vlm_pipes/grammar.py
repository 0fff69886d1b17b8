"""The form that an answer must have: a JSON schema, a regular expression or a grammar.

llguidance says after each token which ones may follow; the engine lets no other be chosen. It is
imported where a request asks for a form (extra `structured`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_vlm_pipes.errors import ConfigError, InputError, clip
from mlx_vlm_pipes.processing.tokenizer import Tokenizer

# JSON may be spread over lines and indented, but a small model would go on with spaces for ever.
JSON_OPTIONS = {"whitespace_pattern": r"(\n {0,16}| )?"}
MAX_SOURCE = 64 * 1024  # characters
SOURCES = ("schema", "regex", "grammar")


class Grammars:
    """Forms over one tokenizer. What it knows of the tokens is made once, by the first request
    (a second for 50,000 tokens).

    Args: vocab_size, rows of the model's logits, which may be more than there are tokens; ends,
    the tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._size, self._ends = tokenizer, vocab_size, list(ends)
        self._lock = threading.Lock()
        self._tokens: Any = None

    def make(self, given: Mapping[str, Any]) -> Grammar | None:
        """The form among a request's options (`SOURCES`), None where there is none.

        Raises: InputError for several of them, and for one that llguidance refuses; ConfigError
        where it is not installed.
        """
        named = [name for name in SOURCES if given.get(name) is not None]
        if not named:
            return None
        if len(named) > 1:
            raise InputError(f"{' and '.join(named)}: an answer has one form; give one of them")
        return self.compile(named[0], given[named[0]])

    def compile(self, name: str, source: Any) -> Grammar:
        """name: of SOURCES. source: a schema as an object, or a text. Raises: as `make`."""
        matcher = _library().LLMatcher
        written = json.dumps(source) if name == "schema" else source
        if len(written) > MAX_SOURCE:
            raise InputError(f"{name} has {len(written)} characters, expected at most {MAX_SOURCE}")
        try:
            if name == "schema":
                text = matcher.grammar_from_json_schema(written, overrides=JSON_OPTIONS)
            else:
                make = matcher.grammar_from_regex if name == "regex" else matcher.grammar_from_lark
                text = make(written)
        except ValueError as error:
            raise InputError(f"{name}: {clip(error, 300)}") from None
        start = matcher(self._known_tokens(), text, log_level=0)
        if not start.is_error():
            start.compute_bitmask()  # here, not where others' answers would wait for it
        if start.is_error():
            raise InputError(f"{name}: {_reason(start)}")
        return Grammar(start, self._size)

    def _known_tokens(self) -> Any:
        with self._lock:
            if self._tokens is None:
                self._tokens = _library().LLTokenizer(
                    self._tokenizer.backend.to_str(),
                    n_vocab=max(self._size, self._tokenizer.vocab_size),
                    eos_token=self._ends,
                )
            return self._tokens


@dataclass(frozen=True)
class Grammar:
    """A form, compiled."""

    matcher: Any  # llguidance.LLMatcher, before the first token
    vocab_size: int

    def start(self) -> Constraint:
        """For one answer."""
        return Constraint(self.matcher.deep_copy(), self.vocab_size)


class Constraint:
    """One answer on its way through a form."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._words = matcher, -(-vocab_size // 32)

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: a bit for each token that may come next, the lowest first.

        Raises: InputError where llguidance gives up (a form that takes too much work).
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return bits[: self._words]

    def accept(self, token: int) -> None:
        """Go on behind a token. Raises: InputError where it does not fit the form."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the answer's form cannot be kept: {_reason(self._matcher)}")


def _reason(matcher: Any) -> str:
    """What llguidance says, without the state of its parser."""
    return clip(" ".join(matcher.get_error().partition("<state>")[0].split()), 300)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "answers in a form need llguidance: pip install 'mlx-vlm-pipes[structured]'"
        ) from None
    return llguidance
