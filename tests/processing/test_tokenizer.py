"""BOS, special tokens, streaming, the files of older folders, damaged ones."""

import json
import random
import threading
import time

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mlx_vlm_pipes.architectures.llama3.processing import Llama3Processor
from mlx_vlm_pipes.errors import InputError, ProcessorError
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from mlx_vlm_pipes.processing.types import PromptRequest
from tests.processing.folders import make_folder, template

TEXT = "naïve 東京 👩‍👩‍👧 🇨🇭 café\n\tend"


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*(decoder.add(i) for i in ids), decoder.flush()]


def test_bytes_stream_as_whole_characters(tmp_path) -> None:
    tokenizer = Tokenizer(make_folder(tmp_path, [], {}))
    ids = tokenizer.encode(TEXT)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(streamed(tokenizer, ids[:8])) == tokenizer.decode(ids[:8])  # cut in a character
    shuffled = ids * 5
    random.Random(0).shuffle(shuffled)
    assert "".join(streamed(tokenizer, shuffled)) == tokenizer.decode(shuffled)


def test_byte_fallback_streams(tmp_path) -> None:
    """SentencePiece style: bytes of 東京 are tokens of their own, a leading space is stripped."""
    make_folder(tmp_path, [], {})
    vocab = {"<unk>": 0, "▁": 1, "a": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a 東京 aa é")
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "a 東京 aa é"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bos_is_added_once(tmp_path) -> None:
    chat = template().replace("{% for m", "{{ bos_token }}{% for m", 1)
    make_folder(tmp_path, [], {"generation_config.json": {"eos_token_id": [7, 9]}}, chat, bos="<s>")
    processor = Llama3Processor(tmp_path, {"architectures": ["LlamaForCausalLM"]})
    bos = processor.tokenizer.token_id("<s>")
    for request in (
        PromptRequest("hi", raw=True),
        PromptRequest("<s>hi", raw=True),
        PromptRequest("hi"),
    ):
        ids = processor.process(request).input_ids
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert processor.eos_token_ids == {7, 9}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": 3}, {}, {3}), ({}, {"text_config": {"eos_token_id": [4, 5]}}, {4, 5})],
)
def test_end_tokens(tmp_path, generation, config, expected) -> None:
    folder = make_folder(tmp_path, [], {"generation_config.json": generation})
    assert Llama3Processor(folder, config).eos_token_ids == expected


def test_end_tokens_that_are_none(tmp_path) -> None:
    folder = make_folder(tmp_path, [], {"generation_config.json": {"eos_token_id": [[0] * 9999]}})
    with pytest.raises(ProcessorError, match=r"eos_token_id is .*; expected token ids") as caught:
        Llama3Processor(folder, {})
    assert len(str(caught.value)) < 300


def test_a_pattern_that_never_ends_gives_up(tmp_path) -> None:
    """The library panics, which is no Exception, after ten million steps back."""
    folder = make_folder(tmp_path, [], {})
    tokenizer = Tokenizer(folder)
    pattern, text = Regex("(a+)+$"), "a" * 2000 + "c"
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    with pytest.raises(InputError, match=r"the text cannot be tokenized: .*retry-limit"):
        tokenizer.encode(text)
    tokenizer.backend.decoder = decoders.Replace(pattern, "x")
    tokenizer.backend.add_tokens([text])
    with pytest.raises(ProcessorError, match=r"the decoder fails .*retry-limit"):
        tokenizer.decode([tokenizer.require_token_id(text)])


def test_others_run_while_a_long_text_is_read(tmp_path) -> None:
    """The signs of life between ranks, and a server's other requests."""
    tokenizer = Tokenizer(make_folder(tmp_path, [], {}))
    reader = threading.Thread(target=tokenizer.encode, args=[TEXT * 20_000])
    reader.start()
    turns = 0
    while reader.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 30


def test_half_a_surrogate_pair_is_one_line(tmp_path) -> None:
    tokenizer = Tokenizer(make_folder(tmp_path, [], {}))
    with pytest.raises(InputError, match=r"tokenized: it holds half of a surrogate pair$"):
        tokenizer.encode("a \ud800 b")


def test_text_model_refuses_pictures(tmp_path) -> None:
    folder = make_folder(tmp_path, [], {}, template())
    processor = Llama3Processor(folder, {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(InputError, match="LlamaForCausalLM reads text only"):
        processor.process(PromptRequest("hi", images=[b""]))
    with pytest.raises(InputError, match="min_pixels: not for LlamaForCausalLM"):
        processor.process(PromptRequest("hi", min_pixels=4))


def test_templates_that_want_texts(tmp_path) -> None:
    """A template that only joins texts, or that walks parts only, still gets every word."""
    joins = "{% for m in messages %}{{ m['role'] + '|' + m['content'] + ';' }}{% endfor %}"
    processor = Llama3Processor(make_folder(tmp_path, [], {}, joins), {})
    messages = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one ", "two")]}]
    request = PromptRequest(messages, system="brief")
    assert processor.process(request).text == "system|brief;user|one two;"


def test_vocabulary_and_merges_without_tokenizer_json(tmp_path) -> None:
    folder = make_folder(tmp_path, [], {})
    whole = Tokenizer(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"he": 256, "Ġhe": 257}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n", encoding="utf-8")
    added = {"258": {"content": "<|end|>", "special": True}, "259": {"content": "<x>"}}
    config = {"added_tokens_decoder": added, "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("he he<|end|>") == [256, 257, 258]
    assert tokenizer.decode([256, 257, 258, 259, 100_000]) == "he he<x>"
    assert tokenizer.eos_token_id == 258
    assert tokenizer.encode("12 x\n") == whole.encode("12 x\n")


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}', "[]", "{" * 9999, "\x00"])
def test_damaged_tokenizer_is_one_line(tmp_path, content) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ProcessorError) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ProcessorError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_no_template_means_raw_only(tmp_path) -> None:
    processor = Llama3Processor(make_folder(tmp_path, [], {}), {})
    with pytest.raises(ProcessorError, match="raw prompt"):
        processor.process(PromptRequest("hi"))
    assert processor.process(PromptRequest("hi", raw=True)).input_ids
