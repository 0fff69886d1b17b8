"""Adapters chosen by each request: alone, in mixed batches, and beside PEFT and mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.errors import InputError
from tests.fixtures_helper import FIXTURES

BASE = FIXTURES / "llama-tied"
HIDDEN, INNER, KV, LAYERS = 64, 64, 32, 3
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip
PROMPT = "Describe the picture with a few words, then stop. " * 2
OPTIONS: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True}


def write_adapter(
    folder: Path, rank: int, seed: int, modules: list[str], *, zero: bool = False
) -> Path:
    """An adapter as mlx-lm saves it: lora_a [in, r], lora_b [r, out]."""
    numbers, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for name in modules:
            inputs, outputs = SHAPES[name]
            at = f"model.layers.{layer}.{name}"
            tensors[f"{at}.lora_a"] = mx.array(
                numbers.normal(0, 0.3, (inputs, rank)).astype(np.float32)
            )
            up = numbers.normal(0, 0.3, (rank, outputs)) * (not zero)
            tensors[f"{at}.lora_b"] = mx.array(up.astype(np.float32))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    keys = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": modules}
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": keys}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(
            root / "one", 4, 1, ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
        ),
        write_adapter(root / "two", 2, 2, ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]),
        write_adapter(root / "zero", 3, 3, list(SHAPES), zero=True),
    ]


@pytest.fixture(scope="module")
def pipe(adapters: list[Path]) -> Iterator[Pipeline]:
    made = load(BASE, dtype="float32", adapter=adapters)
    yield made
    made.close()


def answer(
    pipe: Pipeline, adapter: str | None = None, **options: Any
) -> tuple[list[int], list[float]]:
    result = pipe.generate(PROMPT, adapter=adapter, logprobs=1, **{**OPTIONS, **options})
    assert result.logprobs is not None
    return result.tokens, [p.token_log_probabilities[0] for p in result.logprobs]


def test_an_adapter_of_zeros_leaves_every_bit_of_the_base(adapters: list[Path]) -> None:
    plain, zero = load(BASE, dtype="float32"), load(BASE, dtype="float32", adapter=adapters[2])
    try:
        np.testing.assert_array_equal(zero.logits(PROMPT), plain.logits(PROMPT))
        assert answer(zero) == answer(plain)
        assert answer(zero, "base") == answer(plain)
    finally:
        plain.close()
        zero.close()


def test_a_mixed_batch_gives_what_each_gives_alone(pipe: Pipeline, adapters: list[Path]) -> None:
    names = ["one", "two", "base", "zero", "one"]
    pipe.engine.forget()
    alone = {name: answer(pipe, name) for name in names}
    for name, path in zip(("one", "two"), adapters[:2], strict=True):
        single = load(BASE, dtype="float32", adapter=path)
        assert answer(single)[0] == alone[name][0]
        assert np.abs(single.logits(PROMPT) - load_logits(path)).max() < 5e-4
        assert np.abs(pipe.logits(PROMPT, adapter=name) - load_logits(path)).max() < 5e-4
        single.close()
    assert alone["base"][0] == alone["zero"][0]
    assert len({tuple(alone[name][0]) for name in ("one", "two", "base")}) == 3
    pipe.engine.forget()
    requests: list[Any] = [{"prompt": PROMPT, "adapter": name, "logprobs": 1} for name in names]
    for name, result in zip(names, pipe.generate_batch(requests, **OPTIONS), strict=True):
        assert result.tokens == alone[name][0], name
        assert result.logprobs is not None
        scores = [p.token_log_probabilities[0] for p in result.logprobs]
        np.testing.assert_allclose(scores, alone[name][1], atol=1e-4)


def load_logits(path: Path, base: Path = BASE) -> np.ndarray:
    """The logits of the base with the adapter merged into its weights beforehand."""
    import shutil
    import tempfile

    from mlx_vlm_pipes.weights import merge_into, read_adapter
    from mlx_vlm_pipes.weights.layout import TEXT_LAYOUTS

    tensors: dict[str, mx.array] = mx.load(str(base / "model.safetensors"))  # pyright: ignore[reportAssignmentType]  # a dictionary for safetensors
    tensors = {name: array.astype(mx.float32) for name, array in tensors.items()}
    for module, pair in read_adapter(path, "x", TEXT_LAYOUTS).layers.items():
        stored = f"model.{module.removeprefix('language_model.')}.weight"
        tensors[stored] = merge_into(tensors[stored], pair)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "merged"
        shutil.copytree(base, folder)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        merged = load(folder, dtype="float32")
        logits = merged.logits(PROMPT)
        merged.close()
    return logits


def test_linears_that_the_checkpoint_stacks_are_adapted(tmp_path: Path) -> None:
    base, numbers, tensors = FIXTURES / "phi3-partial", np.random.default_rng(0), {}
    weights: dict[str, mx.array] = mx.load(str(base / "model.safetensors"))  # pyright: ignore[reportAssignmentType]  # a dictionary for safetensors
    names = ["self_attn.qkv_proj", "mlp.gate_up_proj"]
    for name in names:
        at = f"model.layers.0.{name}"
        outputs, inputs = weights[f"{at}.weight"].shape
        for half, shape in (("lora_a", (inputs, 4)), ("lora_b", (4, outputs))):
            values = numbers.normal(0, 0.3, shape).astype(np.float32)
            tensors[f"{at}.{half}"] = mx.array(values)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    keys = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": names}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": keys}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipe, plain = load(base, dtype="float32", adapter=tmp_path), load(base, dtype="float32")
    try:
        expected = load_logits(tmp_path, base)
        assert np.abs(expected - plain.logits(PROMPT)).max() > 0.1
        assert np.abs(pipe.logits(PROMPT) - expected).max() < 5e-4
    finally:
        pipe.close()
        plain.close()


def test_prefixes_are_not_shared_between_adapters(pipe: Pipeline) -> None:
    pipe.engine.forget()
    cold = {name: answer(pipe, name) for name in ("one", "two", "base")}
    for name, expected in cold.items():
        result = pipe.generate(PROMPT, adapter=name, **OPTIONS)
        assert result.usage.cached_tokens == result.usage.prompt_tokens - 1
        assert result.tokens == expected[0]
    pipe.engine.forget()
    assert pipe.generate(PROMPT, adapter="one", **OPTIONS).usage.cached_tokens == 0
    assert pipe.generate(PROMPT, adapter="two", **OPTIONS).usage.cached_tokens == 0


def test_several_adapters_need_a_name_and_unknown_ones_are_refused(pipe: Pipeline) -> None:
    assert answer(pipe)[0] == answer(pipe, "base")[0]  # none named: the base model
    with pytest.raises(InputError, match="no adapter 'three'; loaded: one, two, zero"):
        pipe.generate(PROMPT, adapter="three")


@pytest.mark.reference
def test_peft_gives_the_same_logits_and_tokens(tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(tmp_path / "theirs"))
    pipe = load(BASE, dtype="float32", adapter=tmp_path / "theirs")
    try:
        ids = torch.tensor([pipe.encode(PROMPT).input_ids])
        with torch.no_grad():
            expected = model(ids).logits[0].numpy()
            drawn = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        logits = pipe.logits(PROMPT)
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max() + 1e-4
        assert pipe.generate(PROMPT, **OPTIONS).tokens == drawn[0, ids.shape[1] :].tolist()
    finally:
        pipe.close()


@pytest.mark.reference
def test_mlx_lm_gives_the_same_logits(adapters: list[Path]) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    model, _ = mlx_lm.load(str(BASE), adapter_path=str(adapters[0]))
    model.set_dtype(mx.float32)
    pipe = load(BASE, dtype="float32", adapter=adapters[0])
    try:
        ids = mx.array([pipe.encode(PROMPT).input_ids])
        expected = np.array(model(ids)[0].astype(mx.float32))
        assert np.abs(pipe.logits(PROMPT) - expected).max() < 1e-4
    finally:
        pipe.close()
