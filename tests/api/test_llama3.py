"""Llama3Model, LlamaModelBase, Llama3Config and Llama3Inputs, by their documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes.architectures.llama3 import (
    Llama3Config,
    Llama3Inputs,
    Llama3Model,
    LlamaModelBase,
)
from mlx_vlm_pipes.config import KVCacheConfig, PipelineConfig
from mlx_vlm_pipes.contexts import TextContext, TokenBuffer
from mlx_vlm_pipes.dtypes import DType
from mlx_vlm_pipes.errors import CheckpointError, ConfigError
from mlx_vlm_pipes.interfaces import ReturnHiddenStates, ReturnLogits
from mlx_vlm_pipes.kv_cache import increment_cache_lengths
from mlx_vlm_pipes.weights import WeightData
from tests.api.contract import Contract, check_log_probabilities, log_softmax
from tests.api.driving import (
    BAR,
    Arrays,
    Room,
    best,
    build,
    decode,
    lengths,
    model_of,
    new_cache,
    pipeline_config,
    prefill,
    relative,
    row_logits,
    save,
    step,
    with_config,
)
from tests.api.lora_contract import MERGED_BAR, SLOTS, Adapted, LoRAContract, same
from tests.fixtures_helper import FIXTURES, reference


def make_context(config: dict[str, Any], arrays: Arrays, prompt: str) -> TextContext:
    limit = config["max_position_embeddings"]
    return TextContext(max_length=limit, tokens=TokenBuffer(arrays[f"{prompt}/input_ids"]))


ROOM = Room(
    model=Llama3Model,
    inputs=Llama3Inputs,
    config=Llama3Config,
    folder=FIXTURES / "llama-tied",
    prompts=("chat", "raw"),
    text="model.",
    head="model.embed_tokens.weight",
    cut=17,
    make_context=make_context,
)
BIASED, OLMO = FIXTURES / "llama-attn-bias", FIXTURES / "olmo"


def stored(folder: Path, prompt: str = "raw") -> tuple[TextContext, np.ndarray]:
    """A context of another fixture, and transformers' logits."""
    arrays = reference(folder)[1]
    context = TextContext(max_length=512, tokens=TokenBuffer(arrays[f"{prompt}/input_ids"]))
    return context, arrays[f"{prompt}/logits"]


class TestLlama3(Contract):
    room = ROOM

    def text_weights(self, model: Any) -> Any:
        assert dict(model.state_dict).keys() == dict(model.model.weights).keys()
        return model.state_dict

    def test_an_empty_batch_is_legal(self) -> None:
        model = model_of(ROOM)
        _, outputs = prefill(model, [])
        vocab = ROOM.text_json["vocab_size"]
        assert outputs.logits.shape == best(outputs).shape == (0, vocab)
        assert outputs.logit_offsets is not None
        assert outputs.logit_offsets.tolist() == [0]

    def test_echo_with_as_many_logits_as_tokens(self) -> None:
        model, context = model_of(ROOM, ReturnLogits.VARIABLE), ROOM.context("raw")
        inputs, outputs = prefill(model, [context], None, context.tokens.active_length)
        (result,) = model.compute_log_probabilities(
            model.session, inputs, outputs, mx.array(ROOM.greedy("raw")[:1]), [2], [True]
        )
        tokens = [*context.tokens.all[1:].tolist(), ROOM.greedy("raw")[0]]
        check_log_probabilities(result, log_softmax(ROOM.logits("raw")), tokens, 2)


class TestLoRA(LoRAContract):
    room = ROOM

    def test_all_eight_inputs(self, adapted: Adapted) -> None:
        model, rows = adapted.model, self.rows(["a", "a", "", "b", ""])
        n = lengths(rows)[0]
        inputs = model.prepare_initial_token_inputs([rows], new_cache(model, 5))
        self.check(inputs, n)
        self.check(model.prepare_next_token_inputs(mx.array([1] * 5), inputs), 1)

    @staticmethod
    def check(inputs: Llama3Inputs, n: int) -> None:
        """Rows a a base b base of n tokens: groups a, base, b; the last row lies behind them."""
        offsets = [0, 2 * n, 3 * n, 4 * n]
        same(inputs.lora_ids, mx.int32, [1, 0, 2])
        same(inputs.lora_ranks, mx.uint32, [2, 0, 3])
        same(inputs.lora_grouped_offsets, mx.uint32, offsets)
        same(inputs.num_active_loras, mx.int64, [3])
        same(inputs.lora_end_idx, mx.int64, [4 * n])
        same(inputs.batch_seq_len, mx.int64, [5 * n])
        same(inputs.lora_ids_kv, mx.int32, [1, 0, 2, 1 + SLOTS, SLOTS, 2 + SLOTS])
        both = [*offsets, *(offset + 4 * n for offset in offsets[1:])]
        same(inputs.lora_grouped_offsets_kv, mx.uint32, both)

    def test_the_groups_say_where_an_adapter_ends(self, adapted: Adapted) -> None:
        model, (row,) = adapted.model, self.rows(["a"])
        inputs = model.prepare_initial_token_inputs([[row]], new_cache(model))
        half = row.tokens.active_length // 2
        inputs.update(
            lora_ids=mx.array([1, 0], mx.int32),
            lora_grouped_offsets=mx.array([0, half, row.tokens.active_length], mx.uint32),
        )
        got = np.array(model.execute(inputs).logits)
        assert relative(got[:half], adapted.merged["a"][0][:half]) < MERGED_BAR
        assert relative(got[half:], adapted.merged["a"][0][half:]) > 0.01


# ---- the inputs


def test_every_field_of_the_inputs_has_its_effect() -> None:
    model, contexts = model_of(ROOM), ROOM.contexts()

    def run(**changes: Any) -> np.ndarray:
        kv = new_cache(model, 2)
        inputs = model.prepare_initial_token_inputs([contexts], kv)
        inputs.update(**changes)
        return np.array(model.execute(inputs).logits)

    plain, counts = run(), lengths(contexts)
    tokens = np.concatenate([context.tokens.active for context in contexts])
    tokens[3] += 1
    assert relative(run(tokens=mx.array(tokens))[:3], plain[:3]) < BAR
    assert relative(run(tokens=mx.array(tokens))[3 : counts[0]], plain[3 : counts[0]]) > 0.01
    offsets = mx.array([0, counts[0] - 2, sum(counts)], mx.uint32)
    got = run(input_row_offsets=offsets)
    assert relative(got[: counts[0] - 2], plain[: counts[0] - 2]) < BAR
    assert relative(got[counts[0] - 2 :], plain[counts[0] - 2 :]) > 0.01


def test_buffers_are_what_the_model_is_called_with() -> None:
    model, contexts = model_of(ROOM), ROOM.contexts()
    counts = lengths(contexts)
    inputs = model.prepare_initial_token_inputs([contexts], new_cache(model, 2), 2)
    first, cache = inputs.buffers[:3], inputs.kv_cache_inputs.flatten()
    assert [array.tolist() for array in first] == [
        inputs.tokens.tolist(), inputs.input_row_offsets.tolist(), [2],
    ]  # fmt: skip
    assert len(inputs.buffers) == 3 + len(inputs.signal_buffers) + len(cache)
    outputs = model.model(*inputs.buffers)
    for prompt, got in zip(ROOM.prompts, row_logits(outputs), strict=True):
        assert relative(got, ROOM.logits(prompt)) < BAR
    increment_cache_lengths(inputs.kv_cache_inputs, counts)
    tokens = mx.argmax(best(outputs), axis=-1)
    assert tokens.tolist() == [ROOM.greedy(prompt)[0] for prompt in ROOM.prompts]
    following = model.prepare_next_token_inputs(tokens, inputs)
    (outputs,) = model.model.execute(*following.buffers)
    chosen = mx.argmax(best(outputs), axis=-1).tolist()
    assert chosen == [ROOM.greedy(prompt)[1] for prompt in ROOM.prompts]


def test_inputs_made_by_hand_run_a_step() -> None:
    model, ids = model_of(ROOM), ROOM.arrays["raw/input_ids"]
    inputs = Llama3Inputs(
        mx.array(ids),
        mx.array([0, len(ids)], mx.uint32),
        [],
        mx.array([1], mx.int64),
        kv_cache_inputs=new_cache(model),
    )
    outputs = step(model, inputs, [len(ids)])
    assert relative(outputs.logits, ROOM.logits("raw")) < BAR
    assert decode(model, inputs, outputs) == [ROOM.greedy("raw")]


def test_replicas_are_flattened_in_order() -> None:
    model = build(Llama3Model, ROOM.folder, data_parallel_degree=2)
    names = ("raw", "chat", "turns")
    contexts = [ROOM.context(name) for name in names]
    kv = new_cache(model, 3)
    inputs = model.prepare_initial_token_inputs([contexts[:1], contexts[1:]], kv)
    same(inputs.data_parallel_splits, mx.int64, [0, 1, 3])
    assert inputs.buffers[3].tolist() == [0, 1, 3]
    outputs = step(model, inputs, lengths(contexts))
    for name, got in zip(names, row_logits(outputs), strict=True):
        assert relative(got, ROOM.logits(name)) < BAR
    assert decode(model, inputs, outputs) == [ROOM.greedy(name) for name in names]
    empty = model.prepare_initial_token_inputs([[], contexts[:1]], new_cache(model))
    same(empty.data_parallel_splits, mx.int64, [0, 0, 1])
    with pytest.raises(ConfigError, match="1 replica"):
        model.prepare_initial_token_inputs([contexts], kv)
    nested = Llama3Inputs(mx.array([1]), mx.array([0, 1]), [], mx.array([1]))
    nested.data_parallel_splits = [[0, 1], [3]]
    assert nested.buffers[3].tolist() == [0, 1, 3]


# ---- what a subclass may override


class Layered(LlamaModelBase):
    norm_method: Literal["rms_norm"] | Literal["layer_norm"] = "layer_norm"


class Biased(Llama3Model):
    attention_bias: bool = True


class Halved(Llama3Config):
    @classmethod
    def initialize(cls, pipeline_config: PipelineConfig, model_config: Any = None) -> Any:
        made = super().initialize(pipeline_config, model_config)
        made.logits_scaling = 2.0
        return made


class HalvedModel(Llama3Model):
    config_class = Halved


def test_norm_method() -> None:
    context, want = stored(OLMO)
    assert relative(prefill(build(Layered, OLMO), [context])[1].logits, want) < BAR
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        build(Llama3Model, OLMO)
    with pytest.raises(CheckpointError, match="layernorm"):
        build(Layered, ROOM.folder)


def test_attention_bias() -> None:
    context, want = stored(BIASED)
    for kind in (Llama3Model, Biased):
        model = build(kind, BIASED)
        assert model.model_config.attention_bias
        assert relative(prefill(model, [context])[1].logits, want) < BAR
    with pytest.raises(CheckpointError, match=r"_proj\.bias"):
        build(Biased, ROOM.folder)


def test_config_class() -> None:
    model = build(HalvedModel, ROOM.folder)
    assert type(model.model_config) is Halved
    _, outputs = prefill(model, [ROOM.context("raw")])
    assert relative(outputs.logits, ROOM.logits("raw") / 2) < BAR


class Recast(Llama3Config):
    def finalize(self, *arguments: Any, **named: Any) -> None:
        super().finalize(*arguments, **named)
        assert self.norm_dtype is DType.float32
        self.norm_dtype = DType.bfloat16


class RecastModel(Llama3Model):
    config_class = Recast


def test_norm_dtype_is_that_of_the_norms_weights() -> None:
    model = build(RecastModel, ROOM.folder)
    assert model.state_dict["norm.weight"].dtype == mx.bfloat16
    _, outputs = prefill(model, [ROOM.context("raw")])
    assert 1e-4 < relative(outputs.logits, ROOM.logits("raw")) < 0.05


def test_a_callers_adapter_renames_the_tensors() -> None:
    def rename(state_dict: Any, **_: Any) -> dict[str, Any]:
        names = {name: name.removeprefix("model.") for name in state_dict}
        return {f"language_model.{names[n]}": handle.data() for n, handle in state_dict.items()}

    model = build(Llama3Model, ROOM.folder, adapter=rename)
    _, outputs = prefill(model, [ROOM.context("raw")])
    assert relative(outputs.logits, ROOM.logits("raw")) < BAR


# ---- the configuration


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 0.5}, {"rope_theta": 100.0}, {"attention_multiplier": 0.5},
        {"embedding_multiplier": 2.0}, {"residual_multiplier": 0.5}, {"hidden_act": "gelu"},
        {"clip_qkv": 0.1}, {"sliding_window": 4, "model_type": "mistral"},
        {"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }},
        {"rope_scaling": {
            "rope_type": "longrope", "short_factor": [3.0] * 8, "long_factor": [3.0] * 8,
            "original_max_position_embeddings": 512,
        }},
        {"partial_rotary_factor": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_key_of_config_json_changes_the_logits(changes: dict[str, Any]) -> None:
    model = build(Llama3Model, ROOM.folder, huggingface_config=with_config(ROOM, **changes))
    _, outputs = prefill(model, [ROOM.context("raw")])
    assert relative(outputs.logits, ROOM.logits("raw")) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 128}, {"num_attention_heads": 2}, {"num_key_value_heads": 4},
        {"num_hidden_layers": 2}, {"intermediate_size": 96}, {"vocab_size": 300},
        {"head_dim": 8}, {"mlp_bias": True}, {"attention_bias": True}, {"hidden_act": "no-such"},
        {"rope_scaling": {"rope_type": "yarn"}}, {"rope_scaling": {"factor": 2.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_key_that_contradicts_the_weights_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(Llama3Model, ROOM.folder, huggingface_config=with_config(ROOM, **changes))
    assert "\n" not in str(caught.value)


def test_initialize_reads_config_json_and_finalize_the_state_dict() -> None:
    pipeline = pipeline_config(ROOM.folder)
    config = Llama3Config.initialize(pipeline)
    assert config == Llama3Config.initialize_from_config(
        pipeline, pipeline.model.huggingface_config
    )
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
                "intermediate_size", "vocab_size", "rope_theta"):  # fmt: skip
        assert getattr(config, key) == ROOM.config_json[key]
    assert (config.dtype, config.norm_dtype, config.rms_norm_eps) == (DType.float32, None, None)
    assert config.attention_multiplier == 16**-0.5
    state = {
        name: WeightData.from_numpy(np.zeros((2, 2), np.float16), name)
        for name in (
            "language_model.model.layers.0.input_layernorm.weight",
            "language_model.model.layers.0.self_attn.qkv_proj.weight",
            "language_model.model.layers.0.self_attn.qkv_proj.bias",
            "language_model.model.layers.0.mlp.gate_up_proj.weight",
            "lm_head.weight",
        )
    }
    hidden = ReturnHiddenStates.ALL
    arguments = (pipeline.model.huggingface_config, state, ReturnLogits.VARIABLE, hidden)
    for _ in range(2):  # a second time changes nothing
        assert config.finalize(*arguments) is None
        assert (config.return_logits, config.return_hidden_states) == arguments[2:]
        assert (config.norm_dtype, config.rms_norm_eps) == (DType.float16, 1e-5)
        assert (config.stacked_qkv, config.stacked_mlp, config.attention_bias) == (True,) * 3
        assert config.tie_word_embeddings  # config.json says so; the loader looks at the values


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose head_dim of 32 a quantised cache can group."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 40,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    shapes = {"model.embed_tokens.weight": (40, 64), "model.norm.weight": (64,)}
    for at in (f"model.layers.{n}." for n in range(3)):
        shapes |= {f"{at}self_attn.{part}_proj.weight": (64, 64) for part in "qkvo"}
        shapes |= {f"{at}mlp.{part}_proj.weight": (48, 64) for part in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (64, 48)}
        shapes |= {f"{at}{n}_layernorm.weight": (64,) for n in ("input", "post_attention")}
    numbers = np.random.default_rng(0)
    save(folder, {n: numbers.normal(0, 0.2, s).astype(np.float32) for n, s in shapes.items()})
    return folder


def test_a_quantised_cache_is_lazy_too(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Llama3Model, wide, kv_cache=KVCacheConfig(bits=8, group_size=32))
    context = TextContext(max_length=256, tokens=TokenBuffer(np.arange(200) % 40))
    inputs = model.prepare_initial_token_inputs([[context]], new_cache(model))
    asked: list[Any] = []
    monkeypatch.setattr(mx, "eval", lambda *arrays: asked.append(arrays))
    outputs = model.execute(inputs)
    assert not asked
    plain = build(Llama3Model, wide)
    _, want = prefill(plain, [context])
    assert relative(outputs.logits, np.array(want.logits)) < 0.05


def test_eagle3_of_an_inner_layer_is_that_of_a_model_cut_there(tmp_path: Path) -> None:
    """Layer 0's capture is all that a checkpoint with one layer computes before its last norm."""
    shorter = with_config(ROOM, num_hidden_layers=1).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(shorter))
    kept = {n: t for n, t in ROOM.tensors.items() if ".layers." not in n or ".layers.0." in n}
    save(tmp_path, kept)
    cut = build(Llama3Model, tmp_path, return_hidden_states=ReturnHiddenStates.ALL)
    model = build(
        Llama3Model,
        ROOM.folder,
        return_hidden_states=ReturnHiddenStates.EAGLE3,
        more={"eagle_layers": [0]},
    )
    got, want = (prefill(m, [ROOM.context("raw")])[1].hidden_states for m in (model, cut))
    assert relative(got, np.array(want)) < BAR


@pytest.mark.reference
def test_hidden_states_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ROOM.folder, dtype=torch.float32)
    ids = torch.tensor(ROOM.arrays["raw/input_ids"][None].astype(np.int64))
    with torch.no_grad():
        states = theirs(ids, output_hidden_states=True).hidden_states
    want = [state[0].numpy() for state in states]  # before each layer; the last one is normed
    kept = model_of(ROOM, ReturnLogits.ALL, ReturnHiddenStates.ALL_NORMALIZED)
    normed = prefill(kept, [ROOM.context("raw")])[1].hidden_states
    assert relative(normed, want[-1]) < BAR
    model = build(
        Llama3Model,
        ROOM.folder,
        return_hidden_states=ReturnHiddenStates.EAGLE3,
        more={"eagle_layers": [0, 1]},
    )
    captured = prefill(model, [ROOM.context("raw")])[1].hidden_states
    assert relative(captured, np.concatenate(want[1:3], axis=-1)) < BAR
