"""How much longer the steps of a tokenizer can make a text.

A tokenizer.json comes from strangers, and twenty replacements of one character by ten are a flood
of memory for any prompt. The tokenizers library has no limit, and cannot be interrupted.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_pipes.errors import ProcessorError

MAX_GROWTH = 4096
MAX_PREFIX = 1024  # characters that are put in front of a text
# Characters for one, in the worst case. Source: Unicode FAQ "Normalization"; for the others, the
# tokenizers library.
FACTORS = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12,
    "ByteLevel": 4, "Metaspace": 2,
}  # fmt: skip
LISTS = ("normalizers", "pretokenizers", "decoders")
# Signs of a pattern that may match between two characters, and so make a text longer.
MAYBE_EMPTY = re.compile(r"^$|[*?|^$]|\{0|\{,|\\[bBAGzZKyYk0-9]")


def checked_growth(folder: Path, steps: Sequence[Any]) -> float:
    """Characters that steps one after the other make of one at most.

    Args: steps, normalizers, pre-tokenizers or decoders of the tokenizers library, or None.
    Raises: ProcessorError above MAX_GROWTH.
    """
    described = [json.loads(step.__getstate__()) for step in steps if step is not None]
    found = math.prod(growth(step) for step in described)
    if found > MAX_GROWTH:
        raise ProcessorError(
            f"{folder}: the tokenizer can make a text {found:.0e} times as long (its normalizer, "
            f"pre-tokenizer or decoder); the limit is {MAX_GROWTH}, the file is damaged or hostile"
        )
    return found


def growth(step: Mapping[str, Any]) -> float:
    """Characters that a step, as tokenizer.json describes it, makes of one at most."""
    kind = step.get("type")
    if kind == "Sequence":
        steps = next((step[name] for name in LISTS if name in step), [])
        return math.prod(growth(inner) for inner in steps)
    if kind == "Replace":
        return _of_replacement(step["pattern"], len(step["content"]))
    if kind == "Prepend":
        return math.inf if len(step["prepend"]) > MAX_PREFIX else 1
    if kind == "Precompiled":
        return _of_table(step["precompiled_charsmap"])
    return FACTORS.get(str(kind), 1)


def _of_replacement(pattern: Mapping[str, str], length: int) -> float:
    text = pattern.get("String")
    if text:
        return max(1.0, length / len(text))
    maybe_empty = text == "" or MAYBE_EMPTY.search(pattern.get("Regex", ""))
    return 1.0 + length if maybe_empty else max(1.0, length)


def _of_table(encoded: str) -> float:
    """SentencePiece's table: the size of a trie, the trie, and what is put in, each with a 0 byte.

    Source: sentencepiece normalizer.cc, DecodePrecompiledCharsMap.
    """
    try:
        raw = base64.b64decode(encoded)
        (size,) = struct.unpack_from("<I", raw)
    except (binascii.Error, struct.error):
        return 1  # the library has read it, or it would not be here
    return max(1, *(len(text.decode(errors="ignore")) for text in raw[4 + size :].split(b"\0")))
