"""Every type of rope against transformers, which runs on the same folder in float32.

The weights are those of a stored fixture; only the rope dictionary of config.json is another.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from tests.device import bar
from tests.fixtures_helper import FIXTURES

BAR = bar(2e-5)  # of the largest logit
SHORT, NEW = "What is it?", 24  # grows past every edge below
LONG = "What is it? And what is that? " * 3
LONGER = LONG + "And why?"  # begins like a prompt that is cached by then
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.1, 2.0, 4.5, 12.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 8.0},
    "yarn": YARN,
    "yarn-whole": {**YARN, "truncate": False, "beta_fast": 4, "beta_slow": 0.5},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-attention": {**YARN, "attention_factor": 0.8},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 30, **FACTORS,
    },
}  # fmt: skip
FOLDERS = ("granite", "mistral-full", "phi3-partial", "qwen25vl-v5", "qwen3vl-v5")


def make_folder(path: Path, name: str, rope: dict[str, Any]) -> Path:
    """A copy of a fixture with another rope, and a short length for dynamic ropes to outgrow."""
    folder = shutil.copytree(FIXTURES / name, path / name)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    old = {**(text.pop("rope_scaling", None) or {}), **text.pop("rope_parameters", {})}
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    own = {key: old.get(key, text.pop(key, None)) for key in kept}
    text["rope_parameters"] = {**rope, **{k: v for k, v in own.items() if v is not None}}
    original = rope.get("original_max_position_embeddings")
    if text["model_type"] == "phi3":
        text["original_max_position_embeddings"] = original or 30
    pairs = _rotary_pairs(text)
    for key in FACTORS.keys() & rope.keys():
        text["rope_parameters"][key] = np.interp(
            np.linspace(0, 3, pairs), range(4), rope[key]
        ).tolist()
    text["max_position_embeddings"] = 30 if rope["rope_type"] == "dynamic" else 512
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _rotary_pairs(text: dict[str, Any]) -> int:
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return int(head * text["rope_parameters"].get("partial_rotary_factor", 1.0)) // 2


@pytest.fixture(scope="module", params=FOLDERS)
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return request.param


def theirs(folder: Path) -> Any:
    import torch
    import transformers

    is_vision = "vision_config" in json.loads((folder / "config.json").read_text())
    kind = "AutoModelForImageTextToText" if is_vision else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def arguments(pipe: Pipeline, request: dict[str, Any]) -> dict[str, Any]:
    """What transformers' forward takes for a request."""
    import torch

    encoded = pipe.encode(**request)
    ids = torch.tensor([encoded.input_ids])
    media = {name: torch.tensor(array) for name, array in encoded.hf_arrays.items()}
    if media:
        media["mm_token_type_ids"] = (ids == pipe.processor.image_token_id).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}


def requests(name: str) -> list[dict[str, Any]]:
    texts: list[dict[str, Any]] = [{"prompt": text, "raw": True} for text in (SHORT, LONG, LONGER)]
    if not name.startswith("qwen"):
        return texts
    picture = np.random.default_rng(3).integers(0, 256, (60, 90, 3), np.uint8)
    return [*texts, {"prompt": "Look:", "images": [Image.fromarray(picture)]}]


@pytest.mark.reference
@pytest.mark.parametrize("rope", ROPES)
def test_rope_equals_transformers(tmp_path: Path, name: str, rope: str) -> None:
    import torch

    if name == "phi3-partial" and rope != "longrope":
        pytest.skip("transformers' Phi-3 takes no other type")
    folder = make_folder(tmp_path, name, ROPES[rope])
    pipe = load(folder, dtype="float32")
    try:
        answers = []
        for request in requests(name):
            model = theirs(folder)  # anew: it keeps a dynamic base from one prompt to the next
            given = arguments(pipe, request)
            with torch.no_grad():
                wanted = model(**given).logits[0].numpy()
                greedy = model.generate(
                    **given, max_new_tokens=NEW, do_sample=False, eos_token_id=None
                )
            found = pipe.logits(**request)
            assert np.abs(found - wanted).max() <= BAR * np.abs(wanted).max(), request
            answers.append(greedy[0, given["input_ids"].shape[1] :].tolist())
            answer = pipe.generate(**request, max_tokens=NEW, ignore_eos=True)
            assert answer.tokens == answers[-1], request
        together = pipe.generate_batch(requests(name), max_tokens=NEW, ignore_eos=True)
        assert [answer.tokens for answer in together] == answers
    finally:
        pipe.close()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("case", ["granite", "qwen25vl-v5"])
def test_convert_takes_what_load_takes(tmp_path: Path, case: str, rope: str) -> None:
    folder, logits = make_folder(tmp_path, case, ROPES[rope]), []
    convert(ConvertOptions(model=folder, out=tmp_path / "out", dtype="float32", measure=False))
    for model in (folder, tmp_path / "out"):
        with load(model, dtype="float32") as pipe:
            logits.append(pipe.logits(LONG, raw=True))
    assert np.array_equal(*logits)
