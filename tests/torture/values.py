"""Every option and argument x wrong types and bounds x every way in: one line, or taken."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.engine.state import EngineConfig
from mlx_vlm_pipes.errors import InputError, PipesError
from mlx_vlm_pipes.options import (
    OPTIONS,
    PROMPT_OPTIONS,
    LogitsProcessor,
    Option,
    Schema,
    Texts,
    Tool,
)
from tests.fixtures_helper import FIXTURES
from tests.torture import section
from tests.torture.section import Case, refused, require, taken_or_refused

FOLDER = FIXTURES / "llama-tied"
Ask = Callable[[Pipeline, str, Any], object]
NAN, INF, BEYOND = math.nan, math.inf, 10**400  # no float is as large
# of no option at all
STRANGE: list[Any] = [object(), b"5", {5}, 1j, [[1]], range(3), np.zeros(2), int, len]
_ENDLESS: dict[str, Any] = {}
_ENDLESS["a"] = _ENDLESS
WRONG: dict[Any, list[Any]] = {
    bool: [0, 1, "x", "True", 1.0, None, [], NAN],
    int: ["5", 1.5, NAN, INF, True, [], {}, np.float32(2), "", (1,)],
    float: ["1", NAN, INF, -INF, True, [], {}, BEYOND, "nan"],
    str: [5, 1.5, True, [], ["a"], {}, NAN],
    Texts: [5, 1.5, [5], ["a", 5], {"a": 1}, True, [None], [["a"]]],
    Sequence[int]: ["abc", 5, [1.5], ["1"], [-1], [True], {1: 2}, [None], [NAN], "5"],
    dict[int, float]: [{1: "x"}, [1], 5, {1: NAN}, {1: INF}, {"a": 1.0}, {1.5: 1}, {1: None},
                       {True: 1}, "x", {1: BEYOND}, [(1, 2)]],
    Sequence[Tool]: [5, "x", {"name": "x"}, [5], ["x"], [None], [{1: 2}], [{"a": {5}}], [int],
                     [_ENDLESS]],
    Mapping[str, Any]: [5, "x", [], [("a", 1)], {1: 2}, {"a": {5}}, {"a": b"x"}, _ENDLESS],
    Schema: [5, "x", [], 1.5, {1: 2}, {"a": {5}}, _ENDLESS, [{}]],
    Sequence[LogitsProcessor]: [5, "x", {}, [5], [None], ["x"], len, {"a": len}],
}  # fmt: skip
RIGHT: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [1, 2, 7, 2**31, 2**63, 2**64, BEYOND, 10**5000, np.int8(3), np.uint64(4)],
    float: [0.5, 1, 1e-320, 1e300, np.float16(0.5), np.float64(1)],
    str: ["", "base", "\ud800", "\0", "é" * 3000, "nobody"],
    Texts: ["", "a", ["a", ""], [], "\ud800", "é" * 3000, ["x"] * 500, ("a",)],
    Sequence[int]: [[], [3], (1, 2), [2**63], [BEYOND], np.array([3]), range(3), {5}],
    dict[int, float]: [{}, {3: 1.0}, {3: -INF}, {2**63: 1.0}, {BEYOND: 1}, {-1: 1.0}, {3: 1e300}],
    Sequence[Tool]: [[], [{}], [{"name": "é\ud800"}], [{"a": [1, 2.5, None, "x" * 3000]}], [len]],
    Mapping[str, Any]: [{}, {"bos_token": "x"}, {"a": [NAN]}, {"messages": []}, {"tools": []}],
    Schema: [{}, {"type": "object"}, {"type": "é\ud800"}, {"$ref": "#"}, {"minimum": BEYOND}],
    Sequence[LogitsProcessor]: [[], [lambda t, x: x], (lambda t, x: x * INF, lambda t, x: -x)],
}
LOAD: dict[str, list[Any]] = {
    "path": [5, b"x", [], {}, 1.5, True, FOLDER.open, object()],
    "dtype": [5, None, [], {}, "int8", "", "float64", b"float32", NAN],
    "device": [5, [], {}, "tpu", "", "cpu:0", b"cpu", True],
    "revision": [5, [], b"main", True],
    "adapter": [5, [5], b"x", {}, [None], 1.5, True, "no/such/folder", "", [""], ["=x"], ["a="]],
    "max_length": [0, -1, 1.5, "5", True, NAN, [], INF],
    "kv_bits": ["8", 8.0, True, 3, 0, -4, NAN, [], 16],
    "engine": [5, {}, "x", EngineConfig, [EngineConfig()]],
    "compile": ["x", None, 1, 0, []],
    "vision_config_overrides": [5, "x", [], {"nobody": 1}, {"max_dynamic_patch": 2}, {5: 5}, True],
}
COUNTS = ("max_batch_size", "prefill_chunk", "running_chunk", "image_batch")
BUDGETS = ("kv_bytes", "prefix_bytes", "image_bytes", "overlap_bytes")
ENGINE: dict[str, list[Any]] = {
    **{name: [0, -1, 1.5, "5", True, None, NAN, [], INF] for name in COUNTS},
    **{name: [-1, 1.5, "x", None, True, NAN] for name in BUDGETS},
    "running_wait_ms": [0, -1.0, INF, NAN, "5", None, True, [], BEYOND],
    "enable_prefix_caching": ["x", 0, 1, None, []],
    "enable_chunked_prefill": ["x", 0, 1, None, []],
}
CONVERT: dict[str, list[Any]] = {
    "model": [5, b"x", [], None, 1.5, {}],
    "out": [5, b"x", [], None, 1.5, {}, "", "\0", "x" * 300],
    "bits": ["4", 4.5, True, 7, 0, -4, NAN, [], {}],
    "group_size": ["32", 32.5, True, 31, 0, -32, NAN, [], {}],
    "mode": [5, None, [], {}, "", "int4", b"affine", True],
    "mixed": [5, [], {}, "", "mixed_9_9", b"mixed_3_4", True, 1.5],
    "dtype": [5, [], {}, "", "int8", "float64", b"float32", True],
    "quantize_vision": ["x", 1, None, [], 1.5],
    "dequantize": ["x", 1, None, [], 1.5],
    "lora": [5, [], {}, b"x", 1.5, True, "no/such/folder"],
    "revision": [5, [], b"main", True],
    "measure": ["x", 1, None, [], 1.5],
    "shard_bytes": ["x", 0, -1, 1.5, None, True, NAN, []],
}
MEDIA: list[Any] = [5, True, 1.5, {}, {"a": 1}, object(), [5], [None], [{}], [[]], [1.5], {5}, NAN]
PROMPTS: list[Any] = [
    None, 5, b"x", True, 1.5, {}, {"role": "user", "content": "x"}, object(), [5], [None], ["a"],
    [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 5, "content": "x"}], [[]], {5}, NAN,
    [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
    [{"role": "user", "content": [{}]}], [{"role": "user", "content": [{"type": 5}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "user", "content": [{"type": "image", "image": 5}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}],
    [{"role": "user", "content": [{"type": "video", "video": 5}]}],
    [{"role": "user", "content": {"type": "text", "text": "x"}}],
    [{"role": "user", "content": [[[]]]}], [{"role": "user", "content": None}],
    [{"role": "nobody", "content": "x"}], [{"role": "user", "content": "\ud800"}], "\ud800", "",
    [], (), "\0", [{"role": "user", "content": "x", 5: 5}],
]  # fmt: skip
PROMPTED: dict[str, Callable[..., object]] = {
    "generate": lambda p, prompt, **o: p.generate(prompt, max_tokens=2, **o),
    "stream": lambda p, prompt, **o: list(p.stream(prompt, max_tokens=2, **o)),
    "submit": lambda p, prompt, **o: list(p.submit(prompt, max_tokens=2, **o)),
    "plan": lambda p, prompt, **o: p.plan(prompt, max_tokens=2, **o),
    "generate_n": lambda p, prompt, **o: p.generate_n(prompt, 2, max_tokens=2, **o),
    "generate_batch": lambda p, prompt, **o: p.generate_batch(
        [{"prompt": prompt, **o}], max_tokens=2
    ),
    "batch of messages": lambda p, prompt, **o: p.generate_batch(
        [{"messages": prompt, **o}], max_tokens=2
    ),
    "encode": lambda p, prompt, **o: p.encode(prompt, **o),
    "logits": lambda p, prompt, **o: p.logits(prompt, **o),
}


def _with(option: str, value: Any) -> dict[str, Any]:
    return {"max_tokens": 2, option: value}


WAYS: dict[str, Ask] = {
    "generate": lambda p, o, v: p.generate("Hello", **_with(o, v)),
    "stream": lambda p, o, v: list(p.stream("Hello", **_with(o, v))),
    "submit": lambda p, o, v: list(p.submit("Hello", **_with(o, v))),
    "plan": lambda p, o, v: p.plan("Hello", **_with(o, v)),
    "generate_n": lambda p, o, v: p.generate_n("Hello", 2, **_with(o, v)),
    "generate_batch": lambda p, o, v: p.generate_batch(["Hello"], **_with(o, v)),
    "a batch's request": lambda p, o, v: p.generate_batch([{"prompt": "Hello", **_with(o, v)}]),
}
READING: dict[str, Ask] = {
    "encode": lambda p, o, v: p.encode("Hello", **{o: v}),
    "logits": lambda p, o, v: p.logits("Hello", **{o: v}),
}


def wrong_values(option: Option) -> list[Any]:
    """What an option must refuse by its type and its bounds."""
    found = [*WRONG[option.kind], *STRANGE]
    if option.kind in (int, float):
        step = 1 if option.kind is int else 0.5
        edges = [option.low - step, option.high + step, option.above, option.above - step]
        found += [option.kind(edge) for edge in edges if math.isfinite(edge)]
    if option.kind == Sequence[int]:  # range and a set of ids are lists of ids
        found = [value for value in found if not isinstance(value, (range, set))]
    if option.kind == Texts:
        found = [value for value in found if not isinstance(value, (bytes, np.ndarray))]
    return [value for value in found if not (value is None and option.takes_none)]


def ways_of(option: Option) -> dict[str, Ask]:
    reading = READING if option.name in PROMPT_OPTIONS else {}
    alone = {"logits": READING["logits"]} if option.name == "adapter" else {}
    return {**WAYS, **reading, **alone}


class Section(section.Section):
    """All combinations once, in an order of the seed; then requests with many options at once."""

    small: ClassVar[int] = 350
    COMBINED: ClassVar[int] = 400

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed, folder)
        self._pipe: Pipeline | None = None
        self._table = [*self._of_options(), *self._of_arguments()]
        random.Random(f"values {seed}").shuffle(self._table)

    @property
    def whole(self) -> int:
        return len(self._table) + self.COMBINED

    @property
    def pipe(self) -> Pipeline:
        if self._pipe is None:
            self._pipe = load(FOLDER, dtype="float32", max_length=200)
        return self._pipe

    def draw(self, index: int) -> Case:
        if index < len(self._table):
            return self._table[index]
        rng = self.rng(index)
        names = rng.sample(sorted(OPTIONS), rng.randint(2, 6))
        options = {name: self._right(rng, OPTIONS[name]) for name in names}
        about = f"generate with {' '.join(repr(options).split())[:150]}"
        return Case(about, lambda: self._combined(options))

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()

    def _of_options(self) -> list[Case]:
        cases = []
        for name, option in OPTIONS.items():
            for way, ask in ways_of(option).items():
                for value in wrong_values(option):
                    cases.append(self._case(way, name, value, partial(self._wrong, ask)))
                for value in RIGHT[option.kind]:
                    cases.append(self._case(way, name, value, partial(self._fits, ask)))
        for way, ask in {**WAYS, **READING}.items():
            for name in ("max_token", "", "prompt_", "é"):
                cases.append(self._case(way, name, 5, partial(self._unknown, ask)))
        return cases

    def _of_arguments(self) -> list[Case]:
        cases = []
        for way, ask in PROMPTED.items():
            for prompt in PROMPTS:
                run = partial(taken_or_refused, partial(self._asked, ask, prompt))
                cases.append(Case(f"{way} of prompt {_shown(prompt)}", run))
            for name in ("images", "videos"):
                for value in MEDIA:
                    run = partial(refused, partial(self._asked, ask, "Hello", **{name: value}))
                    cases.append(Case(f"{way} with {name}={_shown(value)}", run))
        tables: dict[str, tuple[Mapping[str, list[Any]], Callable[..., object]]] = {
            "load": (LOAD, lambda **o: load(**{"path": FOLDER, **o}).close()),
            "EngineConfig": (ENGINE, EngineConfig),
            "convert": (CONVERT, self._convert),
        }
        for way, (table, ask) in tables.items():
            for name, values in table.items():
                for value in values:
                    run = partial(self._argument, ask, name, value)
                    cases.append(Case(f"{way} with {name}={_shown(value)}", run))
        return cases

    def _case(self, way: str, name: str, value: Any, run: Callable[[str, Any], object]) -> Case:
        return Case(f"{way} with {name}={_shown(value)}", lambda: run(name, value))

    def _asked(self, ask: Callable[..., object], prompt: Any, **options: Any) -> object:
        return ask(self.pipe, prompt, **options)

    def _wrong(self, ask: Ask, name: str, value: Any) -> None:
        line = refused(lambda: ask(self.pipe, name, value), InputError)
        named = line.startswith(f"{name} is ") and ", expected " in line
        require(named, f"says {line!r}, not what {name} is and what was expected")
        require(not self.pipe.engine.scheduler.is_busy, "the engine works on it all the same")

    def _fits(self, ask: Ask, name: str, value: Any) -> None:
        """Of the right type: answered, or refused in one line for what the model cannot do."""
        taken_or_refused(lambda: ask(self.pipe, name, value))

    def _unknown(self, ask: Ask, name: str, value: Any) -> None:
        line = refused(lambda: ask(self.pipe, name, value), InputError)
        require(line.startswith(f"unknown option {name!r}"), f"says {line!r}")

    def _argument(self, ask: Callable[..., object], name: str, value: Any) -> None:
        line = refused(lambda: ask(**{name: value}), PipesError)
        said = name.replace("_", "-") in line.replace("_", "-") or _shown(value)[1:-1] in line
        require(said, f"says {line!r}, neither {name} nor its value")

    def _convert(self, **options: Any) -> object:
        out = self.folder / "out"
        found = {"model": FOLDER, "out": out, "bits": 8, "group_size": 32, "measure": False}
        if "mixed" in options or "mode" in options:
            found |= {"bits": None, "group_size": None}
        if "dequantize" in options:
            found |= {"bits": None, "group_size": None}
        shutil.rmtree(out, ignore_errors=True)
        try:
            return convert(ConvertOptions(**{**found, **options}))
        except PipesError:
            require(not list(self.folder.iterdir()), "something is left behind")
            raise

    def _right(self, rng: random.Random, option: Option) -> Any:
        values = [v for v in RIGHT[option.kind] if option.kind not in (int, float) or v < 9]
        return rng.choice(values)

    def _combined(self, options: dict[str, Any]) -> None:
        asked = {"max_tokens": 8, "seed": 1, **options}
        first = taken_or_refused(lambda: self.pipe.generate("Hello you", **asked))
        second = taken_or_refused(lambda: self.pipe.generate("Hello you", **asked))
        if first is None or second is None:
            require(first is second is None, "refused once, taken once")
            return
        require(first.tokens == second.tokens, f"{first.tokens}, then {second.tokens}")
        require(1 <= len(first.tokens) <= asked["max_tokens"], f"{len(first.tokens)} tokens")


def _shown(value: object) -> str:
    too_long = isinstance(value, int) and value > BEYOND
    text = "10**5000" if too_long else " ".join(repr(value).split())
    text = text.split(" at 0x")[0]
    return text if len(text) <= 60 else text[:57] + "..."
