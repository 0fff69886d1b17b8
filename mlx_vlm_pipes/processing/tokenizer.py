"""Text to token ids and back, on the tokenizers library and the files of a model folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_vlm_pipes.errors import ConfigError, InputError, ProcessorError, one_line, shown
from mlx_vlm_pipes.gguf.header import is_gguf
from mlx_vlm_pipes.processing.chat_template import ChatTemplate, find_template
from mlx_vlm_pipes.processing.growth import checked_growth
from mlx_vlm_pipes.processing.settings import read_json

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_GROWN_CHARACTERS = 2**28
MAX_HELD_TOKENS = 64
# How Qwen2's vocab.json and merges.txt are used: its pre-tokenizer is not in those files.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """One model's tokenizer, its special tokens and its chat template.

    Args: folder with tokenizer.json, or with vocab.json and merges.txt (Qwen2, GPT-2).
    Raises: ProcessorError if neither is there, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = read_json(folder / "tokenizer_config.json") or {}
        special = read_json(folder / "special_tokens_map.json") or {}
        self.named_tokens = _named_tokens({**special, **self._config})
        self.backend = _load_backend(folder, self._config)
        self.backend.no_truncation()
        self.backend.no_padding()
        checked_growth(folder, [self.backend.decoder])
        self._growth = checked_growth(folder, [self.backend.normalizer, self.backend.pre_tokenizer])

    @property
    def bos_token(self) -> str | None:
        return self.named_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.named_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.token_id(self.eos_token)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def beyond(self, rows: int) -> dict[str, int]:
        """The tokens whose ids have no place among so many rows of an embedding, by id."""
        known = self.backend.get_vocab(with_added_tokens=True)
        return dict(sorted(((t, i) for t, i in known.items() if i >= rows), key=lambda x: x[1]))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. With add_special_tokens, what the tokenizer's post-processor adds (BOS).

        Raises: InputError for half a character, a text that may grow to MAX_GROWN_CHARACTERS, or
        one at which a pattern of the tokenizer gives up (ten million steps back).
        """
        if len(text) * self._growth > MAX_GROWN_CHARACTERS:
            raise InputError(
                f"a text of {len(text)} characters; this tokenizer takes at most "
                f"{int(MAX_GROWN_CHARACTERS / self._growth)}"
            )
        try:  # a batch, as other threads run beside it: one text would keep Python's lock
            batch = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return batch[0].ids
        except TypeError as error:  # it takes all texts but those that UTF-8 cannot hold
            raise InputError(
                "the text cannot be tokenized: it holds half of a surrogate pair"
            ) from error
        except BaseException as error:
            reason = _reason(error)
            raise InputError(f"the text cannot be tokenized: {reason}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids without a token (padded vocabularies) give nothing.

        Raises: ProcessorError where the tokenizer's decoder gives up.
        """
        numbers = [int(i) for i in ids]
        try:
            return self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            reason = _reason(error)
            raise ProcessorError(f"{self.folder}: the decoder fails ({reason})") from error

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def require_token_id(self, token: str) -> int:
        """Raises: ProcessorError if the tokenizer lacks the token."""
        found = self.token_id(token)
        if found is None:
            raise ProcessorError(f"{self.folder}: the tokenizer has no token {token!r}")
        return found

    def stream_decoder(
        self, *, skip_special_tokens: bool = True, kept: Sequence[str] = ()
    ) -> StreamDecoder:
        """kept: special tokens that are text all the same; those it does not know are left."""
        ids = {self.token_id(token): token for token in kept}
        known = {number: token for number, token in ids.items() if number is not None}
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens, kept=known)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        found = find_template(self.folder)
        return None if found is None else ChatTemplate(*found)

    @functools.cached_property
    def tool_template(self) -> ChatTemplate | None:
        """The template of requests with tools; often the one of all requests."""
        found = find_template(self.folder, with_tools=True)
        return None if found is None else ChatTemplate(*found)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of chat messages.

        Args: template_variables, further names that the template reads (`tools`, ...).
        Raises: ProcessorError if the folder has no template or it fails; InputError if it refuses,
        or does not read one of the variables.
        """
        given = dict(template_variables or {})
        template = self.chat_template if given.get("tools") is None else self.tool_template
        if template is None:
            raise ProcessorError(
                f"{self.folder} has no chat template (chat_template.jinja, chat_template.json, "
                "processor_config.json, tokenizer_config.json); pass a raw prompt instead"
            )
        names = {k: v for k, v in self.named_tokens.items() if k.endswith("_token")}
        template.require(given)
        variables = {"tools": None, "documents": None, **names, **given}
        return template.render(messages, variables, add_generation_prompt=add_generation_prompt)


def require_same_tokens(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Check the tokens of a draft model against those of the model that it drafts for.

    Raises: ConfigError naming the draft model and the first token that is another one there.
    """
    own, others = (t.backend.get_vocab(with_added_tokens=True) for t in (tokenizer, other))
    if own == others:
        return
    different = sorted(t for t in own.keys() | others.keys() if own.get(t) != others.get(t))
    first = min(different, key=lambda t: min(own.get(t, len(own)), others.get(t, len(others))))
    said = [f"number {ids[first]}" if first in ids else "none" for ids in (others, own)]
    raise ConfigError(
        f"draft model {other.folder.name}: {len(different)} tokens are not those of "
        f"{tokenizer.folder.name}, first {shown(first)}: {said[0]} there, {said[1]} here; a draft "
        "model needs the same tokenizer"
    )


class StreamDecoder:
    """Text of a growing sequence, in whole characters only.

    Bytes of an unfinished character are held back; `flush` gives what is left at the end. The
    pieces together are `decode` of all ids, with those of `kept` as the texts given there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        kept: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._kept = kept or {}
        self._ids: list[int] = []
        self._start = self._read = 0  # the window that is decoded, and its part already given

    def add(self, token: int) -> str:
        """Take a token; return the text that it completes, often nothing."""
        if token in self._kept:
            text = self.flush() + self._kept[token]
            self._ids.clear()
            self._start = self._read = 0
            return text
        self._ids.append(int(token))
        held = len(self._ids) - self._read
        return self._advance(force=held > MAX_HELD_TOKENS)

    def flush(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        return self._advance(force=True)

    def _advance(self, *, force: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        unfinished = text.endswith("\ufffd") and not force
        if unfinished or len(text) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every entry that names a token: bos_token, image_token, start_image_token, ..."""
    extra = config.get("extra_special_tokens")
    entries = {**(extra if isinstance(extra, Mapping) else {}), **config}
    found = {}
    for key, value in entries.items():
        if isinstance(value, Mapping):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            found[key] = value
    return found


def _load_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if is_gguf(folder):
        backend = _from_values(path, read_json(path) or {})
    elif path.is_file():
        backend = _from_json(path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_vocabulary(folder, config)
    else:
        raise ProcessorError(
            f"{folder}: no tokenizer.json, nor vocab.json with merges.txt; "
            "a fast tokenizer is needed (SentencePiece models can be converted by transformers)"
        )
    _add_missing(backend, folder, config)
    return backend


def _from_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    _check_size(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        raise _damaged(path, error) from error


def _from_values(path: Path, values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(values))
    except BaseException as error:
        raise _damaged(path, error) from error


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE as Qwen2Tokenizer and GPT2Tokenizer build it."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    for name in ("vocab.json", "merges.txt"):
        _check_size(folder / name)
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except BaseException as error:
        raise _damaged(folder / "vocab.json", error) from error
    backend = tokenizers.Tokenizer(model)
    if str(config.get("tokenizer_class", "")).startswith("GPT2"):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _add_missing(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Add tokens that tokenizer_config.json or added_tokens.json put right behind the vocabulary.

    Raises: ProcessorError for an entry without content.
    """
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder")
    wanted: dict[int, AddedToken] = {}
    for token, number in (read_json(folder / "added_tokens.json") or {}).items():
        if isinstance(number, int):
            wanted[number] = AddedToken(token, normalized=False, special=token[:1] == "<")
    for number, entry in (listed if isinstance(listed, Mapping) else {}).items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise ProcessorError(
                f"{folder}: added_tokens_decoder entry {shown(number)} has no content"
            )
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {name: bool(entry.get(name, False)) for name in names}
        if str(number).isdigit():
            wanted[int(number)] = AddedToken(entry["content"], **flags)
    for number, token in sorted(wanted.items(), key=lambda item: item[0]):
        known = backend.token_to_id(token.content) is not None
        if known or number != backend.get_vocab_size(with_added_tokens=True):
            continue  # a token at another id would meet another row of the embedding
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ProcessorError(f"{path}: {path.stat().st_size} bytes; expected at most 256 MiB")


def _damaged(path: Path, error: BaseException) -> ProcessorError:
    """For anything that the Rust library raises, panics included."""
    return ProcessorError(f"{path}: not a tokenizer that can be read ({_reason(error)})")


def _reason(error: BaseException) -> str:
    """What the Rust library says; its panics are no Exception. Raises: any other error again."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return one_line(error, 200)
    raise error
