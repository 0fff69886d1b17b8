"""Conversion: the numbers of what is written, its form, and that it is whole or not there."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import convert as command
from mlx_vlm_pipes import load
from mlx_vlm_pipes.conversion import ConvertOptions, Report, convert
from mlx_vlm_pipes.conversion.measure import Difference, compare, text_logits
from mlx_vlm_pipes.conversion.recipe import RECIPES, Recipe
from mlx_vlm_pipes.errors import CheckpointError, InputError, WeightsError
from mlx_vlm_pipes.weights import find_weight_files, load_weights, read_header
from tests.fixtures_helper import FIXTURES, copy_case, reference

VISION_CASES = ["idefics3", "smolvlm", "pixtral", "pixtral-v5", "internvl-chat", "internvl-qwen3",
                "qwen2vl", "qwen2vl-v5", "qwen25vl", "qwen25vl-v5", "qwen3vl",
                "qwen3vl-v5"]  # fmt: skip
TEXT_CASES = ["llama-tied", "llama-sharded", "phi3-partial", "olmo", "mistral-full"]


def tensors(folder: Path) -> dict[str, mx.array]:
    return {
        name: handle.data().data for name, handle in load_weights(find_weight_files(folder)).items()
    }


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def first_prompt(case: str) -> tuple[list, list[Path]]:
    facts, _ = reference(FIXTURES / case)
    prompt = next(p for p in facts["prompts"] if p.get("messages") and not p.get("videos"))
    return prompt["messages"], [FIXTURES / case / name for name in prompt.get("images", [])]


def run(case: str, out: Path, **options: Any) -> Report:
    return convert(ConvertOptions(model=FIXTURES / case, out=out, **options))


def difference(report: Report) -> Difference:
    assert report.difference is not None
    return report.difference


@pytest.mark.parametrize("case", [*VISION_CASES, *TEXT_CASES])
def test_unquantised_conversion_changes_no_logit(case, tmp_path):
    report = run(case, tmp_path / "out")
    assert difference(report).mean_kl < 1e-9
    assert difference(report).same_top == 1.0
    assert difference(report).with_image is (case in VISION_CASES)


@pytest.mark.parametrize(
    "case", ["idefics3", "internvl-qwen3", "qwen25vl-v5", "qwen3vl", "llama-tied"]
)
def test_quantised_weights_are_those_of_mlx(case, tmp_path):
    """Every packed tensor dequantises to what mx.quantize makes of the source's."""
    report = run(case, tmp_path / "q", bits=4, group_size=32, measure=False)
    run(case, tmp_path / "plain", measure=False)
    packed, plain = tensors(tmp_path / "q"), tensors(tmp_path / "plain")
    assert report.packed
    for name, weight in plain.items():
        path = name.removesuffix(".weight")
        if path in report.packed:
            assert weight.ndim == 2
            for part, array in zip(
                ("weight", "scales", "biases"), mx.quantize(weight, 32, 4), strict=True
            ):
                assert mx.array_equal(packed[f"{path}.{part}"], array)
        else:
            assert mx.array_equal(packed[name], weight)
    assert config(tmp_path / "q")["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert config(tmp_path / "q")["quantization_config"] == config(tmp_path / "q")["quantization"]


def test_vision_is_kept_unless_asked_for(tmp_path):
    kept = run("idefics3", tmp_path / "a", bits=8, group_size=32, measure=False)
    packed = run("idefics3", tmp_path / "b", bits=8, group_size=32, quantize_vision=True)
    assert not [name for name in kept.packed if "vision" in name or "connector" in name]
    assert "connector.modality_projection.proj" in packed.packed
    assert "vision_model.embeddings.position_embedding" not in packed.packed
    assert difference(packed).mean_kl < 0.02  # 8 bits


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float_modes_load(mode, tmp_path):
    report = run("smolvlm" if mode == "nvfp4" else "idefics3", tmp_path / "out", mode=mode)
    assert {settings[2] for settings in report.packed.values()} == {mode}
    assert np.isfinite(difference(report).mean_kl)


def test_mixed_recipe_writes_overrides_that_load(tmp_path):
    report = run("llama-tied", tmp_path / "out", mixed="mixed_3_6", group_size=32)
    entry = config(tmp_path / "out")["quantization"]
    assert entry["bits"] == 3
    assert entry["model.embed_tokens"] == {"group_size": 32, "bits": 6, "mode": "affine"}
    assert entry["model.layers.2.mlp.down_proj"]["bits"] == 6
    assert 0 < difference(report).mean_kl < 5


def test_recipes_follow_mlx_lm():
    recipe = Recipe((64, 4, "affine"), "mixed_4_6", num_layers=32)

    def bits(path: str) -> int:
        settings = recipe.settings_for(f"language_model.{path}", (64, 64))
        assert settings is not None
        return settings[1]

    high = [i for i in range(32) if bits(f"layers.{i}.mlp.down_proj") == 6]
    assert high == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert bits("layers.0.self_attn.q_proj") == 4
    assert bits("lm_head") == bits("embed_tokens") == 6
    assert set(RECIPES) <= set(command.build_parser().format_help().replace(",", " ").split())


def test_command_keeps_vision_by_default(tmp_path):
    argv = ["--model", str(FIXTURES / "idefics3"), "--bits", "8", "--group-size", "32"]
    assert command.main([*argv, "--out", str(tmp_path / "a"), "--no-measure"]) == 0
    assert command.main([*argv, "--out", str(tmp_path / "b"), "--quantize-vision"]) == 0
    kept, packed = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert "connector.modality_projection.proj.scales" not in kept
    assert "connector.modality_projection.proj.scales" in packed


def test_mixed_recipe_on_projections_with_bias(tmp_path):
    """Parts of different bits are not fused; their biases are joined all the same."""
    report = run("qwen25vl", tmp_path / "out", mixed="mixed_4_8", group_size=32)
    assert {settings[1] for settings in report.packed.values()} == {4, 8}


def test_width_that_no_group_divides_stays(tmp_path):
    report = run("idefics3", tmp_path / "out", bits=4, group_size=32, measure=False)
    assert report.kept
    assert not any("down_proj" in name for name in report.packed)  # 48 wide


def test_what_a_file_leaves_to_its_type_is_written_under_the_new_one(tmp_path):
    """LLaVA's layer -2, which transformers leaves out; mlx-vlm's `pixtral` would read -1."""
    source, out = copy_case("pixtral", tmp_path / "in"), tmp_path / "out"
    values = config(source)
    del values["vision_feature_layer"], values["text_config"]["model_type"]
    (source / "config.json").write_text(json.dumps(values))
    report = convert(ConvertOptions(model=source, out=out))
    written = config(out)
    assert (written["vision_feature_layer"], written["text_config"]["model_type"]) == (-2, "llama")
    assert difference(report).mean_kl < 1e-9


def test_dequantize_gives_the_packed_models_logits(tmp_path):
    run("qwen25vl", tmp_path / "q", bits=4, group_size=32, measure=False)
    report = convert(
        ConvertOptions(model=tmp_path / "q", out=tmp_path / "f", dequantize=True, dtype="float32")
    )
    assert difference(report).mean_kl < 1e-7
    assert "quantization" not in config(tmp_path / "f")
    assert not report.packed


def test_dtype_is_cast_everywhere(tmp_path):
    run("pixtral", tmp_path / "out", bits=8, group_size=32, dtype="bfloat16", measure=False)
    kinds = {w.dtype for w in tensors(tmp_path / "out").values()}
    assert kinds == {mx.bfloat16, mx.uint32}
    assert config(tmp_path / "out")["torch_dtype"] == "bfloat16"


def make_adapter(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 4) -> Path:
    folder.mkdir()
    key = mx.random.key(3)
    arrays = {}
    for path, (rows, columns) in modules.items():
        key, a, b = mx.random.split(key, 3)
        arrays[f"{path}.lora_a"] = mx.random.normal((columns, rank), key=a)
        arrays[f"{path}.lora_b"] = 0.1 * mx.random.normal((rank, rows), key=b)
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters})
    )
    return folder


def test_merged_adapter_answers_as_the_loaded_one(tmp_path):
    adapter = make_adapter(tmp_path / "lora", adapted_shapes("llama-tied"))
    report = run("llama-tied", tmp_path / "out", lora=adapter)
    assert difference(report).mean_kl < 1e-8
    plain, _ = text_logits(FIXTURES / "llama-tied")
    fused, _ = text_logits(tmp_path / "out")
    assert compare(plain, fused, with_image=False).mean_kl > 1e-3


def adapted_shapes(case: str) -> dict[str, tuple[int, int]]:
    found = {name: w.shape for name, w in tensors(FIXTURES / case).items()}
    wanted = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    return {path: (found[f"{path}.weight"][0], found[f"{path}.weight"][1]) for path in wanted}


def test_adapter_on_packed_base_repacks_only_what_it_touches(tmp_path):
    run("llama-tied", tmp_path / "q", bits=8, group_size=32, measure=False)
    adapter = make_adapter(tmp_path / "lora", adapted_shapes("llama-tied"))
    convert(ConvertOptions(model=tmp_path / "q", out=tmp_path / "fused", lora=adapter))
    before, after = tensors(tmp_path / "q"), tensors(tmp_path / "fused")
    changed = {
        name.rpartition(".")[0] for name in before if not mx.array_equal(before[name], after[name])
    }
    assert changed == set(adapted_shapes("llama-tied"))
    assert config(tmp_path / "fused")["quantization"]["bits"] == 8


def test_adapter_of_another_model_is_refused(tmp_path):
    adapter = make_adapter(tmp_path / "lora", {"model.layers.9.self_attn.q_proj": (64, 64)})
    with pytest.raises(WeightsError, match="the model lacks"):
        run("llama-tied", tmp_path / "out", lora=adapter)
    assert list(tmp_path.iterdir()) == [adapter]


def test_shards_are_bounded_and_indexed(tmp_path):
    run("qwen25vl", tmp_path / "out", shard_bytes=50_000)
    files = find_weight_files(tmp_path / "out")
    assert len(files) > 5
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert sorted({f.name for f in files}) == sorted(set(index["weight_map"].values()))
    largest = max(t.nbytes for f in files for t in read_header(f).tensors.values())
    for file in files:
        size = sum(t.nbytes for t in read_header(file).tensors.values())
        assert size <= max(50_000, largest)


def test_memory_holds_one_shard(tmp_path):
    """A model of 100 MB in shards of 8 MB is converted in a fraction of its size."""
    source = big_llama(tmp_path / "big")
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()  # what earlier tests left
    convert(
        ConvertOptions(
            model=source, out=tmp_path / "out", bits=4, shard_bytes=8 * 2**20, measure=False
        )
    )
    assert mx.get_peak_memory() - before < 45 * 2**20


def big_llama(folder: Path) -> Path:
    """Random weights, 24 layers of 512: 100 MB."""
    folder.mkdir()
    size, layers, vocab = 512, 24, 512
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": size,
        "intermediate_size": size, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    arrays = {
        "model.embed_tokens.weight": mx.ones((vocab, size)),
        "model.norm.weight": mx.ones((size,)),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        arrays |= {f"{layer}{n}.weight": mx.zeros((size, size), mx.float16) for n in names}
        arrays |= {
            f"{layer}{n}.weight": mx.ones((size,))
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def test_card_and_processor_files_come_along(tmp_path):
    source = copy_case("internvl-chat", tmp_path / "source")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    report = convert(ConvertOptions(model=source, out=tmp_path / "out", bits=8, group_size=32))
    card = (tmp_path / "out/README.md").read_text()
    assert f"mean KL {difference(report).mean_kl:.3g}" in card
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in config(tmp_path / "out")
    assert (tmp_path / "out/tokenizer_config.json").exists()


def test_out_folder_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists"):
        run("olmo", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failure_half_way_leaves_nothing(tmp_path):
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        convert(ConvertOptions(model=FIXTURES / "olmo", out=tmp_path / "out", measure=False), stop)
    assert list(tmp_path.iterdir()) == []


def test_kill_half_way_leaves_nothing_that_looks_whole(tmp_path):
    code = (
        "import sys, time\n"
        "from mlx_vlm_pipes.conversion import ConvertOptions, convert\n"
        "def wait(done, total):\n"
        "    if done > total // 2: print('half', flush=True); time.sleep(60)\n"
        "convert(ConvertOptions(model=sys.argv[1], out=sys.argv[2], shard_bytes=10_000), wait)\n"
    )
    path = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(FIXTURES / "olmo"), str(path)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not path.exists()
    for left in tmp_path.iterdir():
        assert left.name.startswith(".")
        assert not (left / "config.json").exists()
        with pytest.raises(CheckpointError):
            load(left)


def test_the_next_run_clears_what_dead_processes_have_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    others = [
        f".out.incomplete-{os.getppid()}",
        f".out2.incomplete-{dead.pid}",
        ".out.incomplete-x",
    ]
    for name in [f".out.incomplete-{dead.pid}", f".out.incomplete-{os.getpid()}", *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    run("olmo", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out"])


def test_termination_while_measuring_leaves_nothing(tmp_path):
    code = (
        "import sys, time\n"
        "from mlx_vlm_pipes import convert\n"
        "from mlx_vlm_pipes.conversion import job\n"
        "def wait(*_): print('whole', flush=True); time.sleep(60)\n"
        "job._measure = wait\n"
        "sys.exit(convert.main(sys.argv[1:]))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "--model", str(FIXTURES / "olmo"), "--out",
         str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == b"whole\n"
    assert [path.name for path in tmp_path.iterdir()] == [f".out.incomplete-{child.pid}"]
    child.terminate()
    _, error = child.communicate(timeout=30)
    assert (child.returncode, error) == (143, b"terminated\n")
    assert list(tmp_path.iterdir()) == []


def test_a_source_cut_meanwhile_is_one_line(tmp_path):
    source = copy_case("idefics3", tmp_path / "source")
    weights = source / "model.safetensors"

    def cut(done: int, total: int) -> None:
        os.truncate(weights, weights.stat().st_size // 2)

    options = ConvertOptions(model=source, out=tmp_path / "out", measure=False, shard_bytes=10_000)
    with pytest.raises(WeightsError, match=r"cannot be read .*changed meanwhile") as caught:
        convert(options, cut)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("out", ["a" * 300, "~$out", "/dev/null/out", "a\0b"])
def test_names_that_no_folder_can_have(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ConvertOptions(model=FIXTURES / "olmo", out=out, measure=False)
    if out.startswith("~"):
        assert convert(options).out == tmp_path / out
    else:
        with pytest.raises(InputError) as caught:
            convert(options)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits"),
        ({"mode": "q4_0"}, "mode"),
        ({"mixed": "mixed_9_9"}, "recipe"),
        ({"mixed": "mixed_4_6", "bits": 4}, "leave --bits"),
        ({"bits": 4, "dequantize": True}, "dequantize"),
        ({"dequantize": True}, "not quantised"),
        ({"quantize_vision": True}, "needs --bits"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "int8", "bits": 4}, "dtype 'int8'"),
        ({"bits": 4, "group_size": 128}, "divide no matrix"),
    ],
)
def test_contradictions_are_named(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run("olmo", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_quantising_twice_is_refused(tmp_path):
    run("olmo", tmp_path / "q", bits=4, group_size=32, measure=False)
    with pytest.raises(InputError, match="quantised already"):
        convert(ConvertOptions(model=tmp_path / "q", out=tmp_path / "qq", bits=4, group_size=32))


def test_command_prints_figures_and_one_line_of_error(tmp_path, capsys):
    argv = [
        "--model",
        str(FIXTURES / "olmo"),
        "--out",
        str(tmp_path / "out"),
        "--bits",
        "4",
        "--group-size",
        "32",
    ]
    assert command.main(argv) == 0
    assert "mean KL" in capsys.readouterr().out
    started = time.time()
    assert command.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert time.time() - started < 5


def their_logits(folder: Path, ids: list[int], media: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [n, V] as mlx-vlm's own generation computes them."""
    cache = importlib.import_module("mlx_vlm.models.cache")
    model = importlib.import_module("mlx_vlm.utils").load_model(folder)
    tokens = mx.array([ids])
    arrays = {name: mx.array(value) for name, value in media.items()}
    rest = {name: value for name, value in arrays.items() if name != "pixel_values"}
    out = model.get_input_embeddings(
        tokens, arrays["pixel_values"], mask=mx.ones_like(tokens), **rest
    )
    rest |= {k: v for k, v in out.to_dict().items() if k != "inputs_embeds" and v is not None}
    made = cache.make_prompt_cache(model.language_model)
    out = model.language_model(tokens, inputs_embeds=out.inputs_embeds, cache=made, **rest)
    return np.array(out.logits[0].astype(mx.float32))


@pytest.mark.parametrize(
    "case", ["idefics3", "smolvlm", "pixtral", "internvl-qwen3", "qwen2vl", "qwen25vl", "qwen3vl"]
)
def test_mlx_vlm_computes_our_logits(case, tmp_path):
    pytest.importorskip("mlx_vlm")
    settings = {"mode": "nvfp4"} if case == "smolvlm" else {"mixed": "mixed_4_6", "group_size": 32}
    run(case, tmp_path / "out", dtype="float32", quantize_vision=True, measure=False, **settings)
    messages, images = first_prompt(case)
    pipe = load(tmp_path / "out")
    prompt = pipe.encode(messages, images)
    keep = ("image_grid_thw", "image_sizes", "pixel_attention_mask")
    media = {
        "pixel_values": prompt.pixel_values,
        **{k: v for k, v in prompt.extra.items() if k in keep},
    }
    ours = pipe.logits(messages, images)
    pipe.close()
    theirs = their_logits(tmp_path / "out", prompt.input_ids, media)
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("case", ["llama-tied", "granite"])
def test_mlx_lm_computes_our_logits(case, tmp_path):
    utils = pytest.importorskip("mlx_lm.utils")
    run(case, tmp_path / "out", mixed="mixed_4_6", group_size=32, dtype="float32", measure=False)
    model, _ = utils.load_model(tmp_path / "out")
    pipe = load(tmp_path / "out")
    text = "The quick brown fox jumps over the dog."
    ids = pipe.encode(text, raw=True).input_ids
    theirs = np.array(model(mx.array([ids]))[0].astype(mx.float32))
    ours = pipe.logits(text, raw=True)
    pipe.close()
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()
