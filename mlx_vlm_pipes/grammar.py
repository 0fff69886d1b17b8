"""The form that an answer must have: a JSON schema, a regular expression or a grammar.

llguidance says after each token which ones may follow; the engine lets no other be chosen. It is
imported where a request asks for a form (extra `structured`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_vlm_pipes.errors import ConfigError, InputError, clip
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.speech import THINK, THOUGHT

# JSON may be spread over lines and indented, but a small model would go on with spaces for ever.
JSON_OPTIONS = {"whitespace_pattern": r"(\n {0,16}| )?"}
# A number alone has no bracket after it, and a model would rather end the line than the answer: it
# goes on with digits for ever where it may not.
LINE = 'start: value "\\n"?\nvalue: %json {}'
MAX_SOURCE = 64 * 1024  # characters
SOURCES = ("schema", "regex", "grammar")
MOST_KEPT = 16  # compiled forms: n answers have one, and so have the requests of many a client


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
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()  # used last: at last

    def constraint(self, given: Mapping[str, Any], prompt: str) -> FormConstraint | Thought | None:
        """What the options of a request ask of its answer; None where they ask nothing.

        prompt: its text, which may have opened the answer's reasoning: the form begins behind it.
        Raises: as `make`; InputError for a thinking_budget where the model writes no reasoning.
        """
        form, budget = self.make(given), given.get("thinking_budget")
        started = None if form is None else form.start()
        is_open = prompt.rstrip().endswith(THINK)
        if budget is None and not is_open:
            return started
        begin, end = (self._tokenizer.token_id(marker) for marker in (THINK, THOUGHT))
        if end is None or (begin is None and not is_open):
            if budget is None:
                return started
            message = f"thinking_budget: this tokenizer has no {THOUGHT}; leave it out"
            raise InputError(message, param="thinking_budget")
        if form is None and budget is None:
            return None
        return Thought(
            None if is_open else begin, end, budget, started, ends=self._ends, vocab_size=self._size
        )

    def make(self, given: Mapping[str, Any]) -> Grammar | None:
        """The form among a request's options (`SOURCES`), None where there is none.

        Raises: InputError for several of them, and for one that llguidance refuses; ConfigError
        where it is not installed.
        """
        named = [name for name in SOURCES if given.get(name) is not None]
        if not named:
            return None
        if len(named) > 1:
            message = f"{' and '.join(named)}: an answer has one form; give one of them"
            raise InputError(message, param=named[0])
        return self.compile(named[0], given[named[0]])

    def compile(self, name: str, source: Any) -> Grammar:
        """A form, which is kept for later requests.

        name: of SOURCES. source: a schema as an object, or a text. Raises: as `make`.
        """
        written = json.dumps(source) if name == "schema" else source
        if len(written) > MAX_SOURCE:
            message = f"{name} has {len(written)} characters, expected at most {MAX_SOURCE}"
            raise InputError(message, param=name)
        key = name, written
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        made = self._made(name, written)
        with self._lock:
            self._compiled[key] = made
            if len(self._compiled) > MOST_KEPT:
                self._compiled.popitem(last=False)
        return made

    def _made(self, name: str, written: str) -> Grammar:
        """Raises: as `make`."""
        start = self._matcher(name, name, written)
        schema: Any = json.loads(written) if name == "schema" else None
        if _may_be_a_number(schema):
            own = schema.get("x-guidance")
            told = {**(own if isinstance(own, Mapping) else {}), **JSON_OPTIONS}
            line = LINE.format(json.dumps({**schema, "x-guidance": told}))
            start = self._matcher(name, "grammar", line)
        return Grammar(start, self._size, name)

    def _matcher(self, param: str, kind: str, written: str) -> Any:
        """Of one kind of SOURCES, compiled. Raises: InputError about that parameter."""
        matcher = _library().LLMatcher
        try:
            if kind == "schema":
                text = matcher.grammar_from_json_schema(written, overrides=JSON_OPTIONS)
            else:
                make = matcher.grammar_from_regex if kind == "regex" else matcher.grammar_from_lark
                text = make(written)
        except ValueError as error:
            raise InputError(f"{param}: {clip(error, 300)}", param=param) from None
        start = matcher(self._known_tokens(), text, log_level=0)
        if not start.is_error():
            start.compute_bitmask()  # here, not where others' answers would wait for it
        if start.is_error():
            raise InputError(f"{param}: {_reason(start)}", param=param)
        return start

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
    """A form, compiled. name: of SOURCES."""

    matcher: Any  # llguidance.LLMatcher, before the first token
    vocab_size: int
    name: str

    def start(self) -> FormConstraint:
        """For one answer."""
        return FormConstraint(self.matcher.deep_copy(), self.vocab_size, self.name)


class Thought:
    """The reasoning of an answer, before the form that it must have, if it must have one.

    Args: begin, the token that opens it where the prompt has not (None: it is open); close, the
    one that closes it; budget, tokens after which it is closed; form, of what follows; ends,
    tokens that would end the answer before it has its form.
    """

    def __init__(
        self,
        begin: int | None,
        close: int,
        budget: int | None,
        form: FormConstraint | None,
        *,
        ends: Sequence[int],
        vocab_size: int,
    ) -> None:
        self._begin, self._close, self._form, self._size = begin, close, form, vocab_size
        self._budget = float("inf") if budget is None else budget
        self._left = self._budget if begin is None else None  # tokens it may have, while open
        whole = np.full(-(-vocab_size // 32), 2**32 - 1, np.uint32)
        self._thoughts = whole if form is None else whole & ~_bits(ends, vocab_size)

    def allowed(self) -> np.ndarray:
        """As `FormConstraint.allowed`."""
        if self._left is not None:
            return self._thoughts if self._left > 0 else _bits([self._close], self._size)
        if self._form is None:
            return self._thoughts
        begin = () if self._begin is None else (self._begin,)
        return self._form.allowed() | _bits(begin, self._size)

    def accept(self, token: int) -> None:
        """As `FormConstraint.accept`."""
        if self._left is not None:
            self._left = None if token == self._close else self._left - 1
        elif token == self._begin:
            self._left = self._budget
        elif self._form is not None:
            self._form.accept(token)
        self._begin = None  # an answer thinks once, at its beginning

    def forced(self) -> list[int]:
        """As `FormConstraint.forced`; none while it thinks, or may begin to."""
        is_form = self._left is None and self._begin is None
        return self._form.forced() if is_form and self._form is not None else []


class FormConstraint:
    """One answer on its way through a form (`contexts.Constraint`)."""

    def __init__(self, matcher: Any, vocab_size: int, name: str) -> None:
        self._matcher, self._words, self._name = matcher, -(-vocab_size // 32), name

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

    def forced(self) -> list[int]:
        """The next tokens, as far as each of them is the only one that may come."""
        found = self._matcher.compute_ff_tokens()
        self._check()
        return found

    def _check(self) -> None:
        if self._matcher.is_error():
            message = f"the answer's form cannot be kept: {_reason(self._matcher)}"
            raise InputError(message, param=self._name)


def _bits(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """uint32 [ceil(V / 32)] with the bits of these tokens."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)


def _may_be_a_number(schema: Any) -> bool:
    """Whether the whole answer may be one."""
    if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema:
        return False
    kinds = schema.get("type", "number")
    return "number" in kinds or "integer" in kinds


def _reason(matcher: Any) -> str:
    """What llguidance says, without the state of its parser."""
    if "NoExtensionBias" in matcher.get_error():  # its name for: no token may come first
        return "no answer can have this form"
    return clip(" ".join(matcher.get_error().partition("<state>")[0].split()), 300)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "answers in a form need llguidance: pip install 'mlx-vlm-pipes[structured]'"
        ) from None
    return llguidance
