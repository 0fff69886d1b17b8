"""Every option of a request, once: its name, type, default, bounds, help and use.

The three TypedDicts are the table. Type checkers read the names and types of `**options` from
them; checks, error lines, defaults and the flags of the generate command come from `OPTIONS`,
which is made of them. The class in which an option stands says where it is used.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Integral, Real
from operator import or_
from types import NoneType
from typing import Annotated, Any, TypedDict, TypeVar, get_args, get_type_hints

from mlx_vlm_pipes.errors import InputError, shown

Texts = str | Sequence[str]
Schema = Mapping[str, Any] | type  # JSON Schema; a class that knows its own, as pydantic's do
Tool = Mapping[str, Any] | Callable[..., Any]  # a description as of OpenAI's API; a function
LogitsProcessor = Callable[[Any, Any], Any]  # (tokens, logits) -> logits, all of them mx.array
MAX_DEPTH = 64  # of a JSON value


class _Unfit(Exception):
    """A value is not one that its option takes."""


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its type.

    help: one line for the command's --help. default: what holds where it is not given, or given as
    None and its type has None. low, high: the smallest and the largest value (of each number, in a
    list). above: less than any value. unlimited: the value that means "no limit". remedy: what to
    do about a wrong value, where that is not plain. field: its name in SamplingParams, if that is
    another one. has_flag: whether the generate command takes it. choices: the texts that are taken,
    where not all are.

    name, kind (its type without None) and takes_none are filled in from the table.
    """

    help: str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    unlimited: int | None = None
    remedy: str = ""
    field: str = ""
    has_flag: bool = True
    choices: tuple[str, ...] = ()
    name: str = ""
    kind: Any = None
    takes_none: bool = False

    def read(self, value: object) -> Any:
        """The value in plain Python types: lists as tuples, numpy's numbers as Python's.

        Raises: InputError in one line for a wrong type, a value out of its bounds, NaN.
        """
        if value is None and self.takes_none:
            return None
        _, reader = _KINDS[self.kind]
        try:
            return reader(self, value)
        except _Unfit:
            remedy = f"; {self.remedy}" if self.remedy else ""
            raise unfit(self.name, value, self.expected + remedy) from None

    @property
    def expected(self) -> str:
        """The values that are taken, in words."""
        words, _ = _KINDS[self.kind]
        if self.choices:
            return " or ".join(map(repr, self.choices))
        if self.low > -math.inf and self.high < math.inf:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low > -math.inf:
            words += f" of at least {self.low:g}"
        elif self.high < math.inf:
            words += f" above {self.above:g} and at most {self.high:g}"
        elif self.above > -math.inf:
            words += f" above {self.above:g}"
        return words if self.unlimited is None else f"{words}, or {self.unlimited} for no limit"

    def holds(self, number: float) -> bool:
        """Whether a number lies within the bounds; NaN lies nowhere."""
        is_between = self.low <= number <= self.high and number > self.above
        return is_between or number == self.unlimited


def unfit(name: str, value: object, expected: str) -> InputError:
    """The error for a wrong value, in one line."""
    return InputError(f"{name} is {shown(value)}, expected {expected}", param=name)


class PromptOptions(TypedDict, total=False):
    """How a prompt is read."""

    raw: Annotated[bool, Option("take the prompt verbatim, no chat template", default=False)]
    system: Annotated[str | None, Option("a system message before the prompt")]
    tools: Annotated[
        Sequence[Tool] | None, Option("what the answer may call: JSON descriptions, or functions")
    ]
    chat_template_kwargs: Annotated[
        Mapping[str, Any] | None, Option("what the chat template reads, as enable_thinking")
    ]
    fps: Annotated[
        float, Option("frames a second of a list of frames, or to take from a file", 2.0, above=0)
    ]
    min_pixels: Annotated[int | None, Option("smallest size of a picture, where any goes", low=1)]
    max_pixels: Annotated[int | None, Option("largest size of a picture, where any goes", low=1)]
    num_frames: Annotated[int | None, Option("frames to take from a file, instead of fps", low=1)]
    local_files: Annotated[
        bool, Option("whether a text may name a file", default=True, has_flag=False)
    ]
    allow_private: Annotated[
        bool, Option("let URLs lead to this machine and its own network", default=False)
    ]


class SamplingOptions(TypedDict, total=False):
    """How the next token is chosen, and where the answer ends: all of SamplingParams."""

    max_tokens: Annotated[
        int | None, Option("at most so many new tokens", 256, low=1, field="max_new_tokens")
    ]
    min_tokens: Annotated[
        int, Option("no end before so many new tokens", 0, low=0, field="min_new_tokens")
    ]
    # Greedy, so that a request has one answer; SamplingParams by itself keeps MAX's 1.0.
    temperature: Annotated[float, Option("0 is greedy, higher is more varied", 0.0, low=0)]
    top_p: Annotated[
        float,
        Option(
            "sample from the likeliest tokens that make up this probability", 1.0, above=0, high=1,
            remedy="for greedy set temperature to 0",
        ),
    ]  # fmt: skip
    top_k: Annotated[
        int, Option("sample from the k likeliest tokens; -1: from all", -1, low=1, unlimited=-1)
    ]
    min_p: Annotated[
        float,
        Option("drop tokens less likely than this share of the likeliest", 0.0, low=0, high=1),
    ]
    repetition_penalty: Annotated[
        float, Option("above 1: avoid tokens that were used before", 1.0, low=1e-6)
    ]
    presence_penalty: Annotated[
        float, Option("above 0: avoid tokens that the answer has used", 0.0, low=-2, high=2)
    ]
    frequency_penalty: Annotated[
        float, Option("the same, once for each time it has used them", 0.0, low=-2, high=2)
    ]
    logit_bias: Annotated[
        dict[int, float], Option("token id -> what is added to its logit", {}, has_flag=False)
    ]
    seed: Annotated[int | None, Option("makes sampling repeatable")]
    stop: Annotated[Texts | None, Option("text that ends the answer and is not shown", ())]
    stop_token_ids: Annotated[
        Sequence[int], Option("tokens that end the answer too", (), low=0, has_flag=False)
    ]
    ignore_eos: Annotated[bool, Option("go on after the end token", default=False)]


class GenerateOptions(PromptOptions, SamplingOptions, total=False):
    """How a prompt is read, how it is answered, and what is told of the answer.

    adapter: by default the only one that is loaded. logits_processors: mlx-lm's contract, called
    on the engine's thread for each token with the tokens of prompt and answer so far, mx.array
    int32 [n], and logits float32 [1, vocab_size]; what they return goes on to bias, penalties and
    temperature. logprobs are those of the model's own logits. A step may be under way already when
    an answer ends: they may be called once more than there are tokens.
    """

    logprobs: Annotated[
        int | None, Option("how many of the best tokens to score", 0, low=0, has_flag=False)
    ]
    prompt_logprobs: Annotated[
        bool, Option("score the prompt's tokens too", default=False, has_flag=False)
    ]
    logits_processors: Annotated[
        Sequence[LogitsProcessor] | None,
        Option("functions (tokens, logits) -> logits that come before all else", has_flag=False),
    ]
    schema: Annotated[
        Schema | None,
        Option("the answer is JSON of this schema: an object, or a pydantic class"),
    ]
    regex: Annotated[str | None, Option("the answer matches this regular expression")]
    grammar: Annotated[str | None, Option("the answer is of this Lark grammar")]
    thinking_budget: Annotated[
        int | None, Option("close the reasoning after so many tokens", low=0)
    ]
    speculative: Annotated[
        str | None,
        Option(
            "where drafts come from: lookup, what prompt and answer repeat; draft, the draft model",
            choices=("lookup", "draft", "none"),
        ),
    ]
    num_draft_tokens: Annotated[
        int | None, Option("at most so many drafted tokens in a step, 1 to 7", low=1, high=7)
    ]
    # The command's --adapter is the folder of the one that it loads.
    adapter: Annotated[str | None, Option('a loaded adapter\'s name, or "base"', has_flag=False)]


# What others call the same: transformers, OpenAI, mlx-lm.
ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temp": "temperature",
    "system_prompt": "system",
    "chat_template_config": "chat_template_kwargs",
}
# What others have and we have in another place, or not at all.
ELSEWHERE = {
    "adapter_path": "give load(adapter=...)",
    "draft_model": "give load(draft=...)",
    "do_sample": "a temperature above 0 samples",
    "enable_thinking": "give chat_template_kwargs={'enable_thinking': ...}",
    "eos_tokens": "here they are stop_token_ids",
    "max_kv_size": "no cache forgets here; max_length, of load, refuses what is longer",
    "num_beams": "there is no beam search",
    "resize_shape": "max_pixels limits a picture's size",
    "return_full_text": "the prompt is never part of the answer",
    "trust_remote_code": "code in a checkpoint is never run",
    "verbose": "print the result; `stream` gives it as it is made",
}


def read_options(given: Mapping[str, object], table: Mapping[str, Option]) -> dict[str, Any]:
    """The options that are given, in plain Python types, without those that are None.

    Names that others use for the same are taken too (ALIASES).
    Raises: InputError for a name that is not in the table, one given twice, and as `Option.read`.
    """
    given = own_names(given)
    unknown = sorted(given.keys() - table.keys())
    if unknown:
        hint = ELSEWHERE.get(unknown[0], f"options: {', '.join(sorted(table))}")
        raise InputError(f"unknown option {shown(unknown[0])}; {hint}", param=unknown[0])
    read = {name: table[name].read(value) for name, value in given.items()}
    return {name: value for name, value in read.items() if value is not None}


def own_names(given: Mapping[str, object]) -> dict[str, object]:
    """The same under our own names (ALIASES). Raises: InputError for an option given twice."""
    own: dict[str, object] = {}
    said: dict[str, str] = {}
    for name, value in given.items():
        target = ALIASES.get(name, name)
        if target in own:
            alias = said[target] if name == target else name
            message = f"{alias} and {target} are the same option; give one of them"
            raise InputError(message, param=alias)
        own[target], said[target] = value, name
    return own


def among(given: Mapping[str, Any], table: Mapping[str, Option]) -> dict[str, Any]:
    """Those of the options that are in the table."""
    return {name: value for name, value in given.items() if name in table}


def complete_options(given: Mapping[str, object], table: Mapping[str, Option]) -> dict[str, Any]:
    """Every option of the table: as `read_options` gives it, or its default."""
    defaults = {name: option.read(option.default) for name, option in table.items()}
    return defaults | read_options(given, table)


Method = TypeVar("Method", bound=Callable[..., Any])


def shows(table: Mapping[str, Option]) -> Callable[[Method], Method]:
    """For a method that takes `**options` of a table: help and completion then name each of them.

    Its signature lists them with their defaults, its docstring says what they mean.
    """

    def dress(method: Method) -> Method:
        signature = inspect.signature(method)
        *own, _ = signature.parameters.values()
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=option.kind | None if option.takes_none else option.kind,
            )
            for name, option in table.items()
            if name not in signature.parameters
        ]
        method.__signature__ = signature.replace(parameters=[*own, *more])  # pyright: ignore[reportFunctionMemberAccess]
        lines = [f"    {p.name}: {table[p.name].help} (default {p.default!r})" for p in more]
        text = inspect.cleandoc(method.__doc__ or "")
        method.__doc__ = text + "\n\nOptions:\n" + "\n".join(lines)
        return method

    return dress


def default(name: str) -> Any:
    """The default of an option."""
    return OPTIONS[name].default


def _switch(option: Option, value: object) -> bool:
    del option
    if not isinstance(value, bool):
        raise _Unfit
    return value


def _whole(option: Option, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not option.holds(int(value)):
        raise _Unfit
    return int(value)


def _number(option: Option, value: object) -> float:
    number = _real(value)
    if not math.isfinite(number) or not option.holds(number):
        raise _Unfit
    return number


def _real(value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _Unfit
    try:
        return float(value)
    except OverflowError:
        raise _Unfit from None


def _text(option: Option, value: object) -> str:
    if not isinstance(value, str) or (option.choices and value not in option.choices):
        raise _Unfit
    return value


def _texts(option: Option, value: object) -> tuple[str, ...]:
    listed = (value,) if isinstance(value, str) else _items(value)
    return tuple(_text(option, text) for text in listed)


def _token_ids(option: Option, value: object) -> tuple[int, ...]:
    return tuple(_whole(option, token) for token in _items(value))


def _bias(option: Option, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _Unfit
    biases = {_whole(option, token): _real(bias) for token, bias in value.items()}
    if not all(bias < math.inf for bias in biases.values()):  # minus infinity bans a token
        raise _Unfit
    return biases


def _tools(option: Option, value: object) -> tuple[dict[str, Any], ...]:
    from mlx_vlm_pipes.tool_schema import tool_schema

    listed = [tool_schema(v) if inspect.isroutine(v) else v for v in _items(value)]
    return tuple(_variables(option, tool) for tool in listed)


def _schema(option: Option, value: object) -> dict[str, Any]:
    if isinstance(value, type):
        own = getattr(value, "model_json_schema", None)  # of pydantic, which is not imported here
        if own is None:
            raise _Unfit
        value = own()
    return _variables(option, value)


def _variables(option: Option, value: object) -> dict[str, Any]:
    del option
    if not isinstance(value, Mapping):
        raise _Unfit
    return _json(value)


def _json(value: object, depth: int = 0) -> Any:
    """The value in plain JSON types: a template would be shown the name of another's type."""
    if depth > MAX_DEPTH:
        raise _Unfit
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise _Unfit
        return {key: _json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item, depth + 1) for item in value]
    return int(value) if isinstance(value, Integral) else _real(value)


def _processors(option: Option, value: object) -> tuple[LogitsProcessor, ...]:
    del option
    listed = tuple(_items(value))
    if not all(callable(processor) for processor in listed):
        raise _Unfit
    return listed  # pyright: ignore[reportReturnType]  # each is callable


def _items(value: object) -> Iterable[object]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _Unfit
    return value


# type without None: (the values that are taken, in words; the value in plain Python types)
_KINDS: dict[Any, tuple[str, Callable[[Option, object], Any]]] = {
    bool: ("True or False", _switch),
    int: ("a whole number", _whole),
    float: ("a finite number", _number),
    str: ("a text", _text),
    Texts: ("a text or a list of texts", _texts),
    Sequence[int]: ("a list of token ids", _token_ids),
    dict[int, float]: ("token ids with a number for each", _bias),
    Sequence[Tool]: ("a list of JSON objects and functions", _tools),
    Schema: ("a JSON schema or a pydantic class", _schema),
    Mapping[str, Any]: ("names with a JSON value for each", _variables),
    Sequence[LogitsProcessor]: ("a list of functions (tokens, logits) -> logits", _processors),
}


def _table(options: type) -> dict[str, Option]:
    hints = get_type_hints(options, include_extras=True)
    return {name: _row(name, *get_args(hint)) for name, hint in hints.items()}


def _row(name: str, hint: Any, option: Option) -> Option:
    """A line of the table as an option: with its name, its type, and its name in SamplingParams."""
    parts = get_args(hint)
    takes_none = NoneType in parts
    kind = reduce(or_, [part for part in parts if part is not NoneType]) if takes_none else hint
    field = option.field or name
    return replace(option, name=name, kind=kind, takes_none=takes_none, field=field)


PROMPT_OPTIONS = _table(PromptOptions)
SAMPLING_OPTIONS = _table(SamplingOptions)
OPTIONS = _table(GenerateOptions)
# What is asked of the answer beside how its tokens are chosen.
ANSWER_OPTIONS = {
    name: option
    for name, option in OPTIONS.items()
    if name not in PROMPT_OPTIONS and name not in SAMPLING_OPTIONS
}
