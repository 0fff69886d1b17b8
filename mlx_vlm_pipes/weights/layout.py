"""From a checkpoint's tensor names to ours, by tables that a room declares.

Canonical names: the decoder below `language_model.` (`embed_tokens.weight`, `layers.N.…`,
`norm.weight`, `lm_head.weight`), the vision tower below `vision_model.`, a connector under its
own name. A room's transforms make matrices of its convolutions over patches.

Every rule is anchored at the start of a name and at its dots, and the longest rule wins: plain
substring replacement mangles names such as `model.language_model.layers`. A table leaves names
that are already canonical alone, so a second run changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx

from mlx_vlm_pipes.errors import WeightsError, clip
from mlx_vlm_pipes.weights.checkpoint import WeightData, Weights

IGNORED = ("*.rotary_emb.inv_freq", "rope_freqs.weight", "*.position_ids", "*.masked_bias")
MAX_NAMED = 10  # names listed in one error message


@dataclass(frozen=True)
class Prefix:
    """Names below `source` move below `target`; a `*` stands for one layer number.

    A source without a final dot names one tensor or a whole subtree: `cls_token` matches
    `cls_token` and `cls_token.weight`, not `cls_token_2`.
    """

    source: str
    target: str

    def __post_init__(self) -> None:
        if self.source.count("*") != self.target.count("*"):
            raise ValueError(f"{self}: source and target differ in layer numbers")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return _compile(self.source)

    @property
    def strength(self) -> int:
        """Literal characters: the rule with the most of them wins."""
        return len(self.source.replace("*", ""))

    def apply(self, name: str) -> str | None:
        """The new name, or None where the rule does not match."""
        match = self._pattern.match(name)
        if match is None:
            return None
        numbers = iter(match.groups())
        start = re.sub(r"\*", lambda _: next(numbers), self.target)
        return start + name[match.end() :]


def _compile(pattern: str) -> re.Pattern[str]:
    """An anchored regular expression for a prefix with `*` for layer numbers."""
    literal = re.escape(pattern).replace(r"\*", r"(\d{1,6})")
    return re.compile(literal if pattern.endswith(".") or not pattern else literal + r"(?=\.|\Z)")


@dataclass(frozen=True)
class Layout:
    """One way of naming an architecture's tensors: how its names become canonical.

    `ignore` holds shell-style patterns of tensors to drop, beyond `IGNORED`.
    """

    name: str
    prefixes: tuple[Prefix, ...]
    ignore: tuple[str, ...] = ()

    @cached_property
    def _rules(self) -> tuple[tuple[Prefix, int], ...]:
        """Strongest first; targets count as rules onto themselves, of no weight in detection."""
        own = {rule.source for rule in self.prefixes}
        targets = dict.fromkeys(r.target for r in self.prefixes if r.target not in own | {""})
        rules = [(rule, rule.strength) for rule in self.prefixes]
        rules += [(Prefix(target, target), 0) for target in targets]
        return tuple(sorted(rules, key=lambda rule: -rule[0].strength))

    def ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in (*IGNORED, *self.ignore))

    def written(self, name: str) -> str:
        """The name in this layout of a canonical one; the first rule that leads to it counts.

        Raises: WeightsError for a name that this layout has no place for.
        """
        for rule in self._inverse:
            renamed = rule.apply(name)
            if renamed is not None:
                return renamed
        raise WeightsError(f"the {self.name} layout has no place for '{clip(name)}'")

    @cached_property
    def _inverse(self) -> tuple[Prefix, ...]:
        sources: dict[str, str] = {}
        for rule in self.prefixes:
            sources.setdefault(rule.target, rule.source)
        rules = [Prefix(target, source) for target, source in sources.items()]
        return tuple(sorted(rules, key=lambda rule: -rule.strength))

    def rename(self, name: str) -> tuple[str, int] | None:
        """The canonical name and how specific the rule was; None if no rule knows the name."""
        for rule, weight in self._rules:
            renamed = rule.apply(name)
            if renamed is not None:
                return renamed, weight
        return None


@dataclass(frozen=True)
class MLXForm:
    """How mlx-lm and mlx-vlm want an architecture's checkpoints, for writing them.

    layouts: names of the room's layouts that these tools read; a checkpoint in none of them is
    written in the first. head: whether they need an output head in the files even where it is
    the embedding. model_types: other names that they know a `model_type` by. flat_text: whether
    they look for the keys of `text_config` at the top of config.json.
    """

    layouts: tuple[str, ...]
    head: bool = False
    model_types: Mapping[str, str] = field(default_factory=dict)
    flat_text: bool = False

    def layout_like(self, found: Layout, layouts: Sequence[Layout]) -> Layout:
        """The layout to write, for a checkpoint found in another."""
        if found.name in self.layouts:
            return found
        return next(layout for layout in layouts if layout.name == self.layouts[0])


def decoder(source: str = "model.", head: str = "lm_head.") -> tuple[Prefix, ...]:
    """The shared text decoder's rules, for a checkpoint that keeps it below `source`.

    The four children are spelled out so that an unknown key is noticed.
    """
    children = ("embed_tokens.", "layers.", "norm.")
    return (
        *(Prefix(source + child, "language_model." + child) for child in children),
        Prefix(head, "language_model.lm_head."),
    )


DECODER_HF = decoder("model.", "lm_head.")
DECODER_MLX_VLM = decoder("language_model.model.", "language_model.lm_head.")
DECODER_BARE = decoder("", "lm_head.")  # a base model saved without its head's wrapper
DECODER_CANONICAL = decoder("language_model.", "language_model.lm_head.")

DECODER_GGUF = (
    Prefix("token_embd.", "language_model.embed_tokens."),
    Prefix("output_norm.", "language_model.norm."),
    Prefix("output.", "language_model.lm_head."),
    *(
        Prefix(f"blk.*.{source}.", f"language_model.layers.*.{target}.")
        for source, target in {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items()
    ),
)  # llama.cpp's gguf-py, tensor_mapping.py

TEXT_LAYOUTS = (
    Layout("huggingface", DECODER_HF),
    Layout("mlx-vlm", DECODER_MLX_VLM),
    Layout("bare decoder", DECODER_BARE),
    Layout("canonical", DECODER_CANONICAL),
    Layout("gguf", DECODER_GGUF),
)


def detect_layout(names: Iterable[str], layouts: Sequence[Layout]) -> Layout:
    """The layout that knows most of the names, and knows them most specifically.

    Ties go to the one listed first. Raises: WeightsError if none knows a single name.
    """
    kept = list(names)
    best, best_score = None, (0, -1)
    for layout in layouts:
        found = [layout.rename(name) for name in kept if not layout.ignores(name)]
        known = [weight for renamed in found if renamed is not None for weight in renamed[1:]]
        score = (len(known), sum(known))
        if known and score > best_score:
            best, best_score = layout, score
    if best is None:
        tried = ", ".join(layout.name for layout in layouts)
        raise WeightsError(
            f"no tensor name is known (layouts tried: {tried}); the file has"
            f" {group_names(kept) or 'no tensors'}"
        )
    return best


Report = Callable[[str, WeightsError], None]
"""Takes what a checkpoint gets wrong: where it is (in a word or two), and what. Raises or keeps."""


def raise_at_once(where: str, error: WeightsError) -> None:
    """The Report of everybody who needs a whole checkpoint."""
    del where
    raise error


def map_names(
    names: Iterable[str], layout: Layout, report: Report = raise_at_once
) -> dict[str, str]:
    """Checkpoint name -> canonical name; ignored names are left out.

    Reports, and leaves out: names that the layout does not know (at most ten groups are listed),
    and the second of two tensors that would get the same name.
    """
    mapped: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        if layout.ignores(name):
            continue
        renamed = layout.rename(name)
        if renamed is None:
            unknown.append(name)
        else:
            mapped[name] = renamed[0]
    if unknown:
        text = f"{len(unknown)} tensors unknown in the {layout.name} layout: {group_names(unknown)}"
        report("unexpected", WeightsError(text))
    owners: dict[str, str] = {}
    for source, target in mapped.items():
        if owners.setdefault(target, source) != source:
            text = (
                f"tensors '{clip(owners[target])}' and '{clip(source)}' are both"
                f" '{clip(target)}'; the checkpoint mixes two layouts"
            )
            report("weights", WeightsError(text))
    return {source: target for target, source in owners.items()}


def group_names(names: Iterable[str], limit: int = MAX_NAMED) -> str:
    """Names with layer numbers folded into `N` and counted, at most `limit` groups of them."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "N", name), []).append(name)
    shown = [
        clip(group[0], 120) if len(group) == 1 else f"{clip(folded, 120)} (x{len(group)})"
        for folded, group in list(counts.items())[:limit]
    ]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more kinds" if more > 0 else "")


class Transform(Protocol):
    """A change of values, addressed by canonical name; pure, lazy, and a no-op when repeated."""

    def apply(self, weight: WeightData, file_format: str | None) -> WeightData:
        """The tensor in the place of `weight`: itself where the transform does not concern it."""
        ...


@dataclass(frozen=True)
class ConvToChannelsLast:
    """torch [out, C, *kernel] -> MLX [out, *kernel, C]; a tensor already so is left alone.

    Where both readings fit the shape (channels == kernel), the file's metadata `format` decides,
    and without it the tensor counts as done.
    """

    name: str
    channels: int
    kernel: tuple[int, ...]

    def apply(self, weight: WeightData, file_format: str | None) -> WeightData:
        if not _compile(self.name).fullmatch(weight.name):
            return weight
        torch_shape, mlx_shape = (self.channels, *self.kernel), (*self.kernel, self.channels)
        shape = weight.shape[1:]
        if shape not in (torch_shape, mlx_shape):
            raise WeightsError(
                f"'{clip(weight.name)}' is {list(weight.shape)}; expected [out,"
                f" {', '.join(map(str, torch_shape))}] (torch) or [out,"
                f" {', '.join(map(str, mlx_shape))}] (MLX)"
            )
        if shape == mlx_shape and (shape != torch_shape or file_format != "pt"):
            return weight
        return _with_data(weight, mx.moveaxis(weight.data, 1, -1))


@dataclass(frozen=True)
class ConvToMatrix:
    """A convolution over patches that do not overlap, as a matrix: [out, C * kernel].

    Columns are ordered (channel, *kernel) whichever of the two layouts the file has, as in a
    patch flattened from [C, *kernel]; a matrix is left alone.
    """

    name: str
    channels: int
    kernel: tuple[int, ...]

    def apply(self, weight: WeightData, file_format: str | None) -> WeightData:
        if not _compile(self.name).fullmatch(weight.name):
            return weight
        if len(weight.shape) == 2:
            return weight
        last = ConvToChannelsLast(self.name, self.channels, self.kernel)
        data = mx.moveaxis(last.apply(weight, file_format).data, -1, 1)  # [out, C, *kernel]
        return _with_data(weight, data.reshape(weight.shape[0], math.prod(data.shape[1:])))


@dataclass(frozen=True)
class Reshape:
    """The same numbers in another shape: a class token [1, 1, E] -> [E]."""

    name: str
    shape: tuple[int, ...]

    def apply(self, weight: WeightData, file_format: str | None) -> WeightData:
        if not _compile(self.name).fullmatch(weight.name):
            return weight
        if math.prod(self.shape) != math.prod(weight.shape):
            raise WeightsError(
                f"'{clip(weight.name)}' is {list(weight.shape)}; expected {list(self.shape)}"
            )
        return _with_data(weight, mx.reshape(weight.data, self.shape))


def _with_data(weight: WeightData, data: mx.array) -> WeightData:
    return WeightData(data, weight.name, weight.dtype, tuple(data.shape))


def adapt(
    state_dict: Mapping[str, Any],
    layout: Layout,
    transforms: Sequence[Transform] = (),
    *,
    file_format: str | None = None,
    report: Report = raise_at_once,
) -> dict[str, WeightData]:
    """Rename a checkpoint's tensors and transform their values, all of it lazily.

    Args: state_dict, name -> WeightData or handle; file_format, the files' metadata `format`
    ("pt" or "mlx"), by default what the handles say.
    Returns: canonical name -> WeightData. Running it on its own result changes nothing.
    Reports (by default raises) unknown and doubled names, and shapes that no transform takes.
    """
    adapted: dict[str, WeightData] = {}
    for source, target in map_names(state_dict, layout, report).items():
        handle = state_dict[source]
        said = file_format
        if isinstance(handle, Weights):
            said = file_format or handle.metadata.get("format")
        if not isinstance(handle, WeightData):
            handle = handle.data()
        weight = _transformed(handle.renamed(target), transforms, said, report)
        adapted[weight.name] = weight
    return adapted


def _transformed(
    weight: WeightData, transforms: Sequence[Transform], file_format: str | None, report: Report
) -> WeightData:
    """Each transform in turn, on what the one before it made."""
    for transform in transforms:
        try:
            weight = transform.apply(weight, file_format)
        except WeightsError as error:
            report("mis-shaped", error)
    return weight
