"""Byte-level BPE tokenizers in the shape of the real families, trained on the tasks' sentences."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer

MAX_WORDS = 400  # merged tokens beside the 256 bytes; the tasks need fewer
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ChatFormat:
    """Special tokens and chat template of one family.

    An answer stands between answer_open and answer_close in the rendered chat.
    """

    special: tuple[str, ...]
    template: str
    answer_open: str
    answer_close: str
    pad: str
    stop: tuple[str, ...]
    bos: str | None = None
    unk: str | None = None
    tokenizer_class: str = "PreTrainedTokenizerFast"
    nfc: bool = False  # Qwen's tokenizer class composes characters whatever tokenizer.json says
    names: dict[str, str] = field(default_factory=dict)  # extra_special_tokens of the config


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline, as Hugging Face writes it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train_tokenizer(lines: list[str], chat: ChatFormat) -> Tokenizer:
    """A tokenizer with the special tokens first, then the 256 bytes, then whole words."""
    tokenizer = Tokenizer(models.BPE())
    if chat.nfc:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), byte_level]
    )
    trainer = BpeTrainer(
        vocab_size=len(chat.special) + 256 + MAX_WORDS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(chat.special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in chat.special]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(tokenizer, chat)
    return tokenizer


def _post_processor(tokenizer: Tokenizer, chat: ChatFormat) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    if chat.bos is None:
        return byte_level
    template = processors.TemplateProcessing(
        single=f"{chat.bos} $A",
        pair=f"{chat.bos} $A {chat.bos}:1 $B:1",
        special_tokens=[(chat.bos, tokenizer.token_to_id(chat.bos))],
    )
    return processors.Sequence([byte_level, template])


def write_tokenizer(
    tokenizer: Tokenizer, chat: ChatFormat, folder: Path, processor_class: str
) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = chat.answer_close
    roles = {"bos_token": chat.bos, "eos_token": eos, "pad_token": chat.pad, "unk_token": chat.unk}
    config = {
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): _added_token(token) for token in chat.special
        },
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "processor_class": processor_class,
        "tokenizer_class": chat.tokenizer_class,
    }
    if chat.names:
        config |= {"extra_special_tokens": chat.names, **chat.names}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {k: v for k, v in roles.items() if v})
    (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")


def _added_token(token: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}
