"""Config, tokenizer and logits of GGUF files against transformers' own reading of the same file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_vlm_pipes.errors import UnsupportedModel
from mlx_vlm_pipes.gguf.documents import gguf_document
from mlx_vlm_pipes.loading import load
from mlx_vlm_pipes.processing.tokenizer import Tokenizer
from tests.fixtures_helper import FIXTURES
from tests.gguf_file import tokenizer_entries, write, write_case

torch = pytest.importorskip("torch", reason="compares live with transformers")
transformers = pytest.importorskip("transformers", reason="compares live with transformers")
pytest.importorskip("gguf", reason="transformers reads GGUF by it")
pytestmark = pytest.mark.reference

TEXTS = [
    "Describe this picture.", "  two  spaces ", "Is it 12345 or 1,234.5?", "çà et là, naïve",
    "tabs\tand\nlines\r\n\r\n", "混ぜた 文字 \U0001f600", "<|eot_id|>user", "'s 're DON'T", "",
]  # fmt: skip
KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "vocab_size",
    "tie_word_embeddings", "hidden_act", "eos_token_id", "bos_token_id",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("case", ["llama-tied", "llama-stop"])
def test_logits_and_config(tmp_path: Path, case: str, kind: str) -> None:
    if kind.startswith("Q") and case == "llama-stop":
        pytest.skip("rows of 36 have no blocks of 32")
    file = write_case(tmp_path / "model.gguf", case, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    ids = list(range(7, 300, 11))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    config: Any = gguf_document(file / "config.json")
    assert {k: config[k] for k in KEYS} == {k: getattr(model.config, k) for k in KEYS}
    assert config["rope_theta"] == model.config.rope_parameters["rope_theta"]
    with load(file, dtype="float32") as pipe:
        decoded = pipe.logits(
            pipe.processor.tokenizer.decode(ids, skip_special_tokens=False), raw=True
        )
        again = pipe.encode(
            pipe.processor.tokenizer.decode(ids, skip_special_tokens=False), raw=True
        )
    if list(again.input_ids) != ids:
        with torch.no_grad():
            expected = model(torch.tensor([list(again.input_ids)])).logits[0].numpy()
    assert np.abs(decoded - expected).max() < 1e-4 * np.abs(expected).max()


def test_byte_level_tokens(tmp_path: Path) -> None:
    """With llama-bpe, whose split both know."""
    file = write_case(tmp_path / "model.gguf", "llama-tied", tokenizer__ggml__add_bos_token=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = Tokenizer(file)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)


def test_sentence_pieces(tmp_path: Path) -> None:
    """A vocabulary with scores that SentencePiece itself has made."""
    spm = pytest.importorskip("sentencepiece", reason="makes a vocabulary")
    words = Path("README.md").read_text(encoding="utf-8")
    (tmp_path / "text").write_text(words, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"), vocab_size=600,
        model_type="bpe", byte_fallback=True, minloglevel=2, add_dummy_prefix=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = pieces.get_piece_size()
    kinds = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(size)
    ]
    file = write_case(
        tmp_path / "model.gguf", "llama-tied",
        tokenizer__ggml__model="llama", tokenizer__ggml__pre="default",
        tokenizer__ggml__tokens=[pieces.id_to_piece(i) for i in range(size)],
        tokenizer__ggml__scores=[float(pieces.get_score(i)) for i in range(size)],
        tokenizer__ggml__token_type=kinds, tokenizer__ggml__merges=None,
        tokenizer__ggml__bos_token_id=1, tokenizer__ggml__eos_token_id=2,
        tokenizer__ggml__unknown_token_id=0,
    )  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = Tokenizer(file)
    for text in [*TEXTS, words[:2000]]:
        assert ours.encode(text) == theirs(text).input_ids
        if "\r" not in text and not text.startswith(" "):  # there transformers adds no space
            assert ours.encode(text, add_special_tokens=False) == pieces.encode(text)
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)


def test_llama3_scaling_is_found_again(tmp_path: Path) -> None:
    """The factors that convert_hf_to_gguf.py stores are the quotient of the two tables."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=said,
        max_position_embeddings=131072,
    )  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    factors = (plain / scaled.numpy()).astype(np.float32)
    entries = {
        "general.architecture": "llama", "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": 64, "llama.embedding_length": 128,
        "llama.feed_forward_length": 64, "llama.block_count": 1, "llama.attention.head_count": 2,
        "llama.context_length": 131072, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **tokenizer_entries(FIXTURES / "llama-tied", 324),
    }  # fmt: skip
    file = write(tmp_path / "m.gguf", entries, {"rope_freqs.weight": (factors, "F32")})
    values: Any = gguf_document(file / "config.json")
    assert {**values["rope_scaling"], "rope_theta": values["rope_theta"]} == said
    other = write(tmp_path / "n.gguf", entries, {"rope_freqs.weight": (factors**2, "F32")})
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        gguf_document(other / "config.json")
    assert json.dumps(values)
