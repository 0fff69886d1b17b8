"""How long a tokenizer may make a text: bounds that hold, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.processing import tokenizer as module
from mlx_vlm_pipes.processing.growth import growth
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from tests.fixtures_helper import FIXTURES
from tests.processing.folders import make_folder

TEXTS = ["a", "aaaa", "\ufdfa" * 8, "İ" * 8, "\U0001d160" * 8, "東京" * 4, "ΐ" * 8]
Replace, Sequence = normalizers.Replace, normalizers.Sequence


@pytest.mark.parametrize(
    "step",
    [
        normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(),
        normalizers.Lowercase(), normalizers.BertNormalizer(), normalizers.ByteLevel(),
        Replace("a", "bcd"), Replace("aa", "bcd"), Replace("", "bc"), Replace(Regex("a*"), "b"),
        Replace(Regex("(?=a)"), "bc"), Replace(Regex("a+?"), "bc"), Replace(Regex("\\b"), "b"),
        Replace(Regex("a|"), "b"), Replace(Regex("[^b]"), "bc"), Replace(Regex("(?:a)\\K"), "b"),
        Sequence([normalizers.NFKC(), Replace(Regex("."), "ab")]), Replace("a", ""),
        Sequence([normalizers.ByteLevel(), normalizers.ByteLevel(), normalizers.ByteLevel()]),
    ],
    ids=str,
)  # fmt: skip
def test_no_step_grows_more_than_is_said(step: Any) -> None:
    bound = growth(json.loads(step.__getstate__()))
    for text in TEXTS:
        # an empty match stands behind the last character too
        assert len(step.normalize_str(text)) <= bound * (len(text) + 1)


def with_step(tmp_path: Path, part: str, step: Any) -> Path:
    folder = make_folder(tmp_path, [], {})
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    setattr(backend, part, step)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("normalizer", Sequence([Replace("a", "a" * 10)] * 20)),
        ("normalizer", Sequence([Replace(Regex("(?=.)"), "a")] * 40)),
        ("normalizer", Replace("a", "a" * 5000)),
        ("normalizer", normalizers.Prepend("a" * 5000)),
        ("normalizer", Sequence([normalizers.ByteLevel()] * 30)),
        ("pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 30)),
        ("decoder", decoders.Sequence([decoders.Replace("a", "aaa")] * 40)),
    ],
)
def test_a_tokenizer_that_floods_memory_is_refused(part: str, step: Any, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match="times as long"):
        Tokenizer(with_step(tmp_path, part, step))


def test_a_text_that_would_grow_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GROWN_CHARACTERS", 1000)
    tokenizer = Tokenizer(with_step(tmp_path, "normalizer", normalizers.NFKC()))
    limit = 1000 // (18 * 4)  # the folder's pre-tokenizer is ByteLevel
    assert tokenizer.encode("a" * limit)
    with pytest.raises(InputError, match=rf"{limit + 1} characters; .* at most {limit}"):
        tokenizer.encode("a" * (limit + 1))


def test_known_tokenizers_are_far_from_the_limit() -> None:
    """As tokenizer.json of Llama 2, Gemma, CLIP, T5 and ALBERT have it, and of the fixtures."""
    llama = Sequence([normalizers.Prepend("▁"), Replace(" ", "▁")])
    clip = Sequence([normalizers.NFC(), Replace(Regex("\\s+"), " "), normalizers.Lowercase()])
    albert = Sequence(
        [Replace("``", '"'), Replace("''", '"'), normalizers.NFKD(), normalizers.StripAccents(),
         normalizers.Lowercase(), Replace(Regex(" {2,}"), " ")]
    )  # fmt: skip
    found = [growth(json.loads(step.__getstate__())) for step in (llama, clip, albert)]
    assert found == [1, 9, 54]
    for path in FIXTURES.glob("*/tokenizer.json"):
        values = json.loads(path.read_text())
        parts = [values[name] for name in ("normalizer", "pre_tokenizer", "decoder")]
        assert all(growth(part) <= 8 for part in parts if part)
