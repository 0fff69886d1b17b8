"""tokenizer.json and tokenizer_config.json of a GGUF file: byte-level BPE and SentencePiece BPE.

Sources: transformers 5.23 integrations/gguf/gguf_tokenizer_mapping.py; from llama.cpp's
llama-vocab.cpp what that leaves out: how SmolLM cuts numbers, merges that are ignored, where a BOS
is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_vlm_pipes.errors import ProcessorError, clip
from mlx_vlm_pipes.gguf.header import GGUFHeader

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_SPACE = "\u2581"
MAX_PIECE = 2**10  # characters; the work of implied merges grows by the square of it
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre: the expressions that cut text, one after the other
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
"""Vocabularies whose tokens are taken whole, whatever the merges say; a BOS comes before texts."""


def tokenizer_values(header: GGUFHeader) -> dict[str, Any]:
    """What the `tokenizers` library reads.

    Raises: ProcessorError naming a kind of tokenizer that is not read, or what is missing.
    """
    tokens = _tokens(header)
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level(header, tokens)
    elif kind == "llama":
        parts = _sentence_pieces(header, tokens)
    else:
        raise ProcessorError(
            f"{header.path}: tokenizer.ggml.model '{clip(kind)}' is not read; gpt2 and llama are"
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(header, tokens),
        "normalizer": None,
        "post_processor": _post_processor(header, tokens),
        **parts,
    }


def tokenizer_settings(header: GGUFHeader) -> dict[str, Any]:
    """Named tokens, the chat template, and whether text begins or ends with a named token."""
    tokens = _tokens(header)
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {f"{name}_token": _named(header, tokens, key) for key, name in names.items()}
    template = header.metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: token for key, token in named.items() if token is not None},
        "add_bos_token": _adds(header, "bos"),
        "add_eos_token": _adds(header, "eos"),
        **({} if template is None else {"chat_template": template}),
    }


def _tokens(header: GGUFHeader) -> list[str]:
    tokens = _list(header, "tokens", str)
    if tokens is None:
        raise ProcessorError(f"{header.path}: no tokenizer.ggml.tokens; expected a tokenizer")
    if len(set(tokens)) != len(tokens):
        raise ProcessorError(f"{header.path}: a token occurs twice in tokenizer.ggml.tokens")
    return tokens


def _byte_level(header: GGUFHeader, tokens: Sequence[str]) -> dict[str, Any]:
    kind = header.metadata.get("tokenizer.ggml.pre")
    if not isinstance(kind, str) or kind not in _SPLITS:
        raise ProcessorError(
            f"{header.path}: tokenizer.ggml.pre '{clip(kind)}' is not read; known are"
            f" {', '.join(_SPLITS)}"
        )
    merges = [merge.split(" ") for merge in _list(header, "merges", str) or []]
    if not all(len(merge) == 2 for merge in merges):
        raise ProcessorError(f"{header.path}: a merge of other than two parts")
    cuts = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in _SPLITS[kind]
    ]
    to_bytes = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    byte_level = {"type": "ByteLevel", **to_bytes}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": _bpe(tokens, merges, ignore_merges=kind in _WHOLE_FIRST),
    }


def _sentence_pieces(header: GGUFHeader, tokens: Sequence[str]) -> dict[str, Any]:
    merges = _list(header, "merges", str)
    scores = _list(header, "scores", float)
    if merges is not None:
        pairs = [merge.split(" ") for merge in merges]
    elif scores is not None and len(scores) == len(tokens):
        longest = max(map(len, tokens), default=0)
        if longest > MAX_PIECE:
            raise ProcessorError(
                f"{header.path}: a token of {longest} characters; expected at most {MAX_PIECE}"
            )
        pairs = _implied_merges({token: i for i, token in enumerate(tokens)}, scores)
    else:
        raise ProcessorError(
            f"{header.path}: neither tokenizer.ggml.merges nor a score for each token"
        )
    leads = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if leads else []
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return {
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "first" if leads else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, pairs) | {"fuse_unk": True, "byte_fallback": True},
    }


def _bpe(
    tokens: Sequence[str], merges: Sequence[Sequence[str]], *, ignore_merges: bool = False
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
    }


def _implied_merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores implies, the best first.

    Source: transformers tokenization_utils_base.py, generate_merges.
    """
    found: list[tuple[float, str, str]] = []
    for token, score in zip(vocab, scores, strict=True):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(a, b) for a, b in cuts if a in vocab and b in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, a, b) for a, b in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(a, b) for _, a, b in found]


def _added(header: GGUFHeader, tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut: control tokens, and the user's own."""
    kinds = _list(header, "token_type", int) or []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": token, **flags, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _post_processor(header: GGUFHeader, tokens: Sequence[str]) -> dict[str, Any] | None:
    """A template that puts BOS before a text and EOS behind it, as the file says."""
    ends = {key: _named(header, tokens, key) for key in ("bos", "eos") if _adds(header, key)}
    added = {key: token for key, token in ends.items() if token is not None}
    if not added:
        return None

    def around(name: str, number: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": name, "type_id": number}}
        special = {k: {"SpecialToken": {"id": t, "type_id": number}} for k, t in added.items()}
        return [*([special["bos"]] if "bos" in special else []), text] + (
            [special["eos"]] if "eos" in special else []
        )

    numbers = {token: tokens.index(token) for token in added.values()}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in numbers.items()
        },
    }


def _adds(header: GGUFHeader, key: str) -> bool:
    """Whether a text gets a BOS (EOS): as the file says, else as llama.cpp does."""
    said = header.metadata.get(f"tokenizer.ggml.add_{key}_token")
    if said is not None:
        return bool(said)
    kind = header.metadata.get("tokenizer.ggml.model")
    whole_first = header.metadata.get("tokenizer.ggml.pre") in _WHOLE_FIRST
    return key == "bos" and (kind == "llama" or whole_first)


def _named(header: GGUFHeader, tokens: Sequence[str], key: str) -> str | None:
    """The token that the file gives a name to. Raises: ProcessorError if there is none such."""
    number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise ProcessorError(
            f"{header.path}: tokenizer.ggml.{key}_token_id is {clip(number)}, beyond the"
            f" {len(tokens)} tokens"
        )
    return tokens[number]


def _list(header: GGUFHeader, key: str, kind: type) -> list[Any] | None:
    """A list in the tokenizer's metadata. Raises: ProcessorError if it is something else."""
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ProcessorError(
            f"{header.path}: tokenizer.ggml.{key} is no list of {kind.__name__} values"
        )
    return value
