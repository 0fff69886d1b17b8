"""Trains a tokenizer in the shape of one real family and writes its files."""

import functools
import json
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from .case import Json
from .styles import STYLES, Style

TRAINED = 312  # 256 bytes and a few merges
TRAINED_METASPACE = 110  # the byte tokens come on top
_NOUNS = """river garden window market engine letter island mirror bridge winter station harbour
picture colour circle square triangle corner shadow mountain valley kitchen doctor teacher number
minute signal pattern surface vessel"""
_VERBS = """opens carries describes follows measures crosses paints reads answers counts reaches
repeats collects lifts covers divides explains finds"""
_ADJECTIVES = """small red quiet bright narrow heavy early distant gentle curious broken simple
yellow careful sudden warm silver ordinary"""
_EXTRA = "café naïve Straße mañana I'm don't we'll"


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def corpus(num_lines: int = 900) -> list[str]:
    rng = np.random.RandomState(7)

    def pick(words: str) -> str:
        return str(rng.choice(words.split()))

    lines = []
    for i in range(num_lines):
        subject, verb = f"{pick(_ADJECTIVES)} {pick(_NOUNS)}", pick(_VERBS)
        lines.append(f"The {subject} {verb} the {pick(_NOUNS)} near {rng.randint(1, 2000)} men.")
        if i % 3 == 0:
            lines.append(f"What is in this image? Describe the {pick(_NOUNS)}: {pick(_EXTRA)}!")
        if i % 7 == 0:
            lines.append(f"def {pick(_NOUNS)}(x):\n    return x * {rng.randint(9)}\n\n")
    return lines


class TokenizerFiles:
    """A trained tokenizer, its special tokens' ids, and the files they are kept in."""

    def __init__(self, style: str) -> None:
        self.style = STYLES[style]
        self.tokenizer = _trained(style)
        self.ids = {t: self.tokenizer.token_to_id(t) for t in self.style.special}
        self.size = self.tokenizer.get_vocab_size()

    def __getitem__(self, token: str) -> int:
        return self.ids[token]

    @property
    def stop_ids(self) -> list[int]:
        return [self.ids[t] for t in self.style.stop]

    def save(self, folder: Path, processor_class: str | None, template_in: str, form: str) -> None:
        """Write tokenizer.json, tokenizer_config.json and the template, in `case.Options` forms."""
        state = json.loads(self.tokenizer.to_str())
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        config = self._config(form)
        if processor_class:
            config["processor_class"] = processor_class
        for place in template_in.split("+"):
            _write_template(folder, config, self.style.template, place)
        write_json(folder / "tokenizer_config.json", config)
        if form != "v5":
            keys = ("bos_token", "eos_token", "pad_token", "unk_token")
            tokens = {k: config[k] for k in keys if config[k] is not None}
            write_json(folder / "special_tokens_map.json", tokens)

    def _config(self, form: str) -> Json:
        style = self.style
        names = {"bos": style.bos, "eos": style.eos, "pad": style.pad, "unk": style.unk}
        config: Json = {f"{k}_token": v for k, v in names.items()}
        if form == "dicts":
            config = {k: v and {"__type": "AddedToken", **_added(v)} for k, v in config.items()}
        config.update(
            clean_up_tokenization_spaces=False,
            model_max_length=8192,
            tokenizer_class="TokenizersBackend" if form == "v5" else style.tokenizer_class,
        )
        if form == "v5":
            config["backend"] = "tokenizers"
        else:
            by_id = sorted(style.special, key=lambda t: self.ids[t])
            config["added_tokens_decoder"] = {str(self.ids[t]): _added(t) for t in by_id}
        if style.is_metaspace:
            config.update(add_bos_token=True, add_eos_token=False, legacy=False)
            config["add_prefix_space"] = None
        if style.extra:
            config.update(extra_special_tokens=dict(style.extra), **style.extra)
        return config


def _added(token: str) -> Json:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}


def _write_template(folder: Path, config: Json, template: str, place: str) -> None:
    """`processor_config.json` is written by the family, which owns that file."""
    if place == "tokenizer_config":
        config["chat_template"] = template
    elif place == "tokenizer_config_list":
        config["chat_template"] = [{"name": "default", "template": template}]
    elif place == "chat_template.json":
        write_json(folder / place, {"chat_template": template})
    elif place == "chat_template.jinja":
        (folder / place).write_text(template, encoding="utf-8")
    elif place != "processor_config.json":
        raise ValueError(f"no place for a chat template: {place}")


@functools.cache
def _trained(style: str) -> Tokenizer:
    """Trained once in a process: it takes longer than the rest of a small checkpoint."""
    return _train(STYLES[style])


def _train(style: Style) -> Tokenizer:
    if style.is_metaspace:
        bpe = models.BPE(unk_token=style.unk, byte_fallback=True, fuse_unk=True)
    else:
        bpe = models.BPE()
    raw = Tokenizer(bpe)
    if style.is_nfc:
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = _pre_tokenizer(style)
    lead, lines = list(style.front), corpus()
    trained, alphabet = TRAINED, sorted(pre_tokenizers.ByteLevel.alphabet())
    if style.is_metaspace:
        lead += [f"<0x{i:02X}>" for i in range(256)]
        trained, alphabet = TRAINED_METASPACE, []
        lines = [word for line in lines for word in line.split(" ")]
    raw.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=trained + len(lead),
            initial_alphabet=alphabet,
            special_tokens=lead,
            show_progress=False,
        ),
    )
    state = json.loads(raw.to_str())
    state["added_tokens"] = []  # byte tokens of a byte-fallback vocabulary are ordinary vocabulary
    if style.ignores_merges:
        state["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    special = [AddedToken(t, special=True, normalized=False) for t in style.special]
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = _decoder(style)
    tokenizer.post_processor = _post_processor(style, tokenizer)
    return tokenizer


def _pre_tokenizer(style: Style) -> pre_tokenizers.PreTokenizer:
    if style.is_metaspace:
        return pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style.split is None)
    if style.split is None:
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(style.split), behavior="isolated")
    return pre_tokenizers.Sequence([first, byte_level])


def _decoder(style: Style) -> decoders.Decoder:
    if not style.is_metaspace:
        return decoders.ByteLevel()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])


def _post_processor(style: Style, tokenizer: Tokenizer) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    if not style.adds_bos:
        return byte_level
    bos = processors.TemplateProcessing(
        single=f"{style.bos} $A",
        pair=f"{style.bos} $A {style.bos}:1 $B:1",
        special_tokens=[(style.bos, tokenizer.token_to_id(style.bos))],
    )
    return bos if style.is_metaspace else processors.Sequence([byte_level, bos])
