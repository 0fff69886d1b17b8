"""The doctor: faults put into good folders are named, good folders are silent."""

import json
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_pipes import check
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from mlx_vlm_pipes.doctor import examine
from mlx_vlm_pipes.doctor.report import Checkup
from mlx_vlm_pipes.doctor.trial import judge
from mlx_vlm_pipes.errors import CheckpointNotFound
from mlx_vlm_pipes.loading import BUNDLED
from tests.fixtures_helper import FIXTURES, cases, copy_case

WEIGHTS = "model.safetensors"


def edit_json(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    arrays = cast("dict[str, mx.array]", mx.load(str(folder / WEIGHTS)))
    mx.eval(list(arrays.values()))
    change(arrays)
    mx.save_safetensors(str(folder / WEIGHTS), arrays, metadata={"format": "pt"})


@pytest.mark.parametrize("folder", [*cases(), BUNDLED], ids=lambda p: p.name)
def test_good_folders_are_silent(folder):
    checkup = examine(folder)
    assert checkup.findings == []
    assert checkup.verdict == "good"
    assert checkup.parts["text"].parameters > 1000
    assert (checkup.run_bytes or 0) > (checkup.load_bytes or 0) > 0
    is_text = "vision_config" not in json.loads((folder / "config.json").read_text())
    assert list(checkup.parts) == (["text"] if is_text else ["text", "vision", "connector"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 4, "group_size": 32}, "4 bits, groups of 32, affine"),
        ({"mode": "mxfp8"}, "8 bits, groups of 32, mxfp8"),
        ({"mixed": "mixed_3_6", "group_size": 32}, "3 bits, groups of 32, affine"),
    ],
)
def test_converted_folders_are_silent(options, said, tmp_path):
    source = FIXTURES / "qwen25vl-v5"
    out = tmp_path / "out"
    convert(ConvertOptions(model=source, out=out, quantize_vision=True, measure=False, **options))
    checkup = examine(out)
    assert checkup.findings == []
    assert str(checkup.quantization).startswith(said)
    assert checkup.parts["text"].parameters == examine(source).parts["text"].parameters


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1000])


def lie_about_length(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + data[8:])


def keys(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, name, lambda found: found.update(values))


def text_keys(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder, "config.json", lambda found: found["text_config"].update(values)
    )


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda arrays: arrays.pop(name))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rename_token(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                text = (folder / name).read_text()
                (folder / name).write_text(text.replace(old, new))

    return change


def move_letters(tokenizer: dict) -> None:
    """Ids of letters that no embedding row is for; there are no more tokens than rows."""
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {text: 10_000 + vocabulary[text] for text in "aeiou"}


def move_tilde(tokenizer: dict) -> None:
    """One token without a row, as of a fine-tune whose embedding was not resized."""
    tokenizer["model"]["vocab"]["~"] = 900


def drop_layer(folder: Path) -> None:
    def drop(arrays: dict[str, mx.array]) -> None:
        for name in [n for n in arrays if n.startswith("model.text_model.layers.1.")]:
            del arrays[name]

    edit_tensors(folder, drop)


def drop_vision(folder: Path) -> None:
    def drop(arrays: dict[str, mx.array]) -> None:
        for name in [n for n in arrays if "vision_model" in n]:
            del arrays[name]

    edit_tensors(folder, drop)


HEAD, EMBEDDING = "lm_head.weight", "model.text_model.embed_tokens.weight"
CONNECTOR = "model.connector.modality_projection.proj.weight"
VOCAB = 341
# fault: (how to make it in the idefics3 fixture, where it is named, words of the finding)
FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated file": (truncate, "weights", "cut short"),
    "lying header": (lie_about_length, "weights", "header of"),
    "no weights": (remove(WEIGHTS), "weights", "no *.safetensors"),
    "git-lfs pointer": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "files", "git-lfs",
    ),
    "no config": (remove("config.json"), "config", "no config.json"),
    "broken config": (write("config.json", "{"), "config", "broken JSON"),
    "foreign architecture": (
        keys("config.json", architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "architecture", "GPT2LMHeadModel",
    ),
    "missing tensor": (without(CONNECTOR), "missing", "connector"),
    "missing layer": (drop_layer, "missing", "layers.1"),
    "missing tower": (drop_vision, "missing", "vision_model"),
    "missing head": (without(HEAD), "missing", "lm_head"),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda a: a.update({"model.extra.weight": mx.ones((2, 2))})),
        "unexpected", "model.extra.weight",
    ),
    "unexpected tensor": (
        lambda f: edit_tensors(
            f, lambda a: a.update({"model.text_model.layers.0.mlp.up_proj.bias": mx.ones((48,))})
        ),
        "unexpected", "up_proj.bias",
    ),
    "mis-shaped tensor": (
        lambda f: edit_tensors(f, lambda a: a.update({CONNECTOR: mx.ones((32, 64))})),
        "mis-shaped", "[32, 64], expected [32, 128]",
    ),
    "other vocabulary": (text_keys(vocab_size=400), "mis-shaped", "embed_tokens"),
    "integer weights": (
        lambda f: edit_tensors(f, lambda a: a.update({CONNECTOR: mx.ones((32, 128), mx.int32)})),
        "dtypes", "connector",
    ),
    "double precision": (
        lambda f: edit_header(f, CONNECTOR), "weights", "float64",
    ),
    "undeclared packing": (
        lambda f: edit_tensors(
            f, lambda a: a.update(pack("model.text_model.layers.0.self_attn.q_proj", a))
        ),
        "unexpected", "scales",
    ),
    "wrong bits": (
        lambda f: (
            edit_tensors(
                f, lambda a: a.update(pack("model.text_model.layers.0.self_attn.q_proj", a))
            ),
            keys("config.json", quantization={"bits": 8, "group_size": 32})(f),
        ),
        "weights", "config.json says 8 bits",
    ),
    "unread quantisation": (
        keys("config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "weights", "bitsandbytes",
    ),
    "declared, not packed": (
        keys("config.json", quantization={"bits": 4, "group_size": 32}),
        "quantization", "no tensor is packed",
    ),
    "heads do not divide": (text_keys(num_key_value_heads=3), "weights", "3"),
    "unknown rope": (
        text_keys(rope_scaling={"rope_type": "spiral", "factor": 2.0}, rope_parameters=None),
        "weights", "spiral",
    ),
    "no tokenizer": (remove("tokenizer.json"), "processor", "tokenizer.json"),
    "broken tokenizer": (write("tokenizer.json", "[1, 2"), "processor", "not a tokenizer"),
    "no image token": (rename_token("<image>", "<picture>"), "processor", "<image>"),
    "image token elsewhere": (
        keys("config.json", image_token_id=7), "processor", "image_token_id is 7",
    ),
    "end token beyond": (
        lambda f: [
            keys(name, eos_token_id=9999)(f) for name in ("generation_config.json", "config.json")
        ],
        "tokenizer", "9999",
    ),
    "larger tokenizer": (
        lambda f: edit_tensors(
            f, lambda a: a.update({n: a[n][:100] for n in (HEAD, EMBEDDING)})
        ) or text_keys(vocab_size=100)(f),
        "tokenizer", "only 100 rows",
    ),
    "tokens elsewhere": (
        lambda f: edit_json(f, "tokenizer.json", move_letters), "tokenizer", "has 341 rows",
    ),
    "token beyond": (
        lambda f: edit_json(f, "tokenizer.json", move_tilde), "tokenizer",
        "1 tokens lie beyond the 341 embedding rows, the first is '~' with id 900",
    ),
    "no template": (remove("chat_template.json"), "chat template", "there is none"),
    "template does not compile": (
        write("chat_template.jinja", "{% for m in messages %}{{ m"), "chat template", "compile",
    ),
    "template loses the text": (
        write("chat_template.jinja", "Hello."), "chat template", "loses the text",
    ),
    "no picture settings": (remove("preprocessor_config.json"), "processor", "preprocessor"),
    "index names a missing file": (
        write(
            "model.safetensors.index.json",
            json.dumps({"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}),
        ),
        "weights", "missing",
    ),
    "index lists what is not there": (
        write(
            "model.safetensors.index.json",
            json.dumps({"weight_map": {"a.b.weight": WEIGHTS, HEAD: WEIGHTS}}),
        ),
        "index", "a.b.weight",
    ),
}  # fmt: skip


def pack(path: str, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    made = mx.quantize(arrays[f"{path}.weight"].astype(mx.float32), 32, 4)
    return {
        f"{path}.{part}": array
        for part, array in zip(("weight", "scales", "biases"), made, strict=True)
    }


def edit_header(folder: Path, name: str) -> None:
    """Declare a tensor of float32 pairs to be half as many float64."""
    edit_tensors(folder, lambda arrays: arrays.update({name: mx.ones((32, 256), mx.float32)}))
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[name] |= {"dtype": "F64", "shape": [32, 128]}
    raw = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def idefics3(tmp_path: Path) -> Path:
    folder = copy_case("idefics3", tmp_path / "model")
    assert examine(folder).findings == []
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(fault, tmp_path, capsys):
    make, where, words = FAULTS[fault]
    folder = idefics3(tmp_path)
    make(folder)
    checkup = examine(folder)
    texts = [finding.text for finding in checkup.findings if finding.where == where]
    assert any(words in text for text in texts), checkup.findings
    assert check.main([str(folder)]) == (1 if checkup.errors else 0)
    printed = capsys.readouterr()
    assert words in " ".join(printed.out.split())
    assert printed.err == ""


def test_there_are_twenty_faults():
    assert len(FAULTS) >= 20


def test_head_beside_a_tied_embedding_is_said(tmp_path):
    folder = copy_case("llama-tied", tmp_path / "model")
    assert examine(folder).embeddings == "tied"
    edit_tensors(
        folder, lambda a: a.update({"lm_head.weight": mx.array(a["model.embed_tokens.weight"])})
    )
    checkup = examine(folder)
    assert "declared tied" in str(checkup.embeddings)
    assert checkup.findings == []


def test_code_is_listed_and_not_a_fault(tmp_path):
    folder = idefics3(tmp_path)
    (folder / "modeling_x.py").write_text("raise SystemExit(3)")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    edit_json(folder, "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_x.X"}))
    checkup = examine(folder)
    assert checkup.ignored == ["modeling_x.py", "pytorch_model.bin", "auto_map in config.json"]
    assert checkup.findings == []


def test_seventy_billion_parameters_in_seconds(tmp_path):
    """A sparse file of 141 GB: only its header is there to be read."""
    folder = copy_case("llama-tied", tmp_path / "model")
    hidden, inner, layers, heads, kv = 8192, 28672, 80, 64, 8
    sizes = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": 128256,
        "tie_word_embeddings": False, "head_dim": 128,
    }  # fmt: skip
    edit_json(folder, "config.json", lambda c: c.update(sizes))
    shapes = {"model.embed_tokens.weight": [128256, hidden], "model.norm.weight": [hidden]}
    shapes["lm_head.weight"] = [128256, hidden]
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", hidden), ("k", kv * 128), ("v", kv * 128), ("o", hidden)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = [rows, hidden]
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = [
            inner,
            hidden,
        ]
        shapes[f"{layer}mlp.down_proj.weight"] = [hidden, inner]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = [hidden]
    write_sparse(folder / WEIGHTS, shapes)
    mx.reset_peak_memory()
    before = mx.get_active_memory()  # what earlier tests left
    started = time.perf_counter()
    checkup = examine(folder)
    assert time.perf_counter() - started < 5
    assert mx.get_peak_memory() - before < 20e6
    assert checkup.errors == []
    assert checkup.parts["text"].parameters == 70_553_706_496
    assert checkup.parts["text"].nbytes == 141_107_412_992


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)


def test_json_is_one_object(capsys):
    assert check.main([str(FIXTURES / "pixtral"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["usable"] is True
    assert record["parts"]["vision"]["parameters"] > 0
    assert record["architecture"].startswith("pixtral")


def test_no_such_model_is_one_line(capsys, tmp_path):
    with pytest.raises(CheckpointNotFound):
        examine(tmp_path / "nothing")
    assert check.main([str(tmp_path / "nothing")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_run_finds_what_no_header_tells(tmp_path, capsys):
    assert check.main([str(FIXTURES / "idefics3"), "--run"]) == 0
    folder = idefics3(tmp_path)
    edit_tensors(folder, lambda a: a.update({"lm_head.weight": mx.full((VOCAB, 32), mx.nan)}))
    capsys.readouterr()
    assert check.main([str(folder)]) == 0
    assert check.main([str(folder), "--run"]) == 1
    assert "not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (np.zeros((5, 7)), "flat"),
        (np.tile(np.arange(7.0), (5, 1)), "same at every position"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), "not finite at 1 of 2"),
    ],
)
def test_degenerate_logits(logits, words):
    checkup = Checkup("x")
    judge(logits, checkup)
    assert words in checkup.findings[0].text
    clean = Checkup("x")
    judge(np.random.default_rng(0).normal(size=(5, 7)), clean)
    assert clean.findings == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_closed_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    assert check.main([str(tmp_path / "closed")]) == 2
    assert "no permission" in capsys.readouterr().err


def test_the_model_is_named_with_or_without_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(BUNDLED)
    said = []
    for words in ([folder], ["--model", folder]):
        assert check.main(words) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert check.main(["--model", folder, folder]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_families_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Every class that a fixture of ours names is in the list; without a model nothing else is."""
    assert check.main(["--families", "--json"]) == 0
    listed = {name for names in json.loads(capsys.readouterr().out).values() for name in names}
    named = {json.loads((f / "config.json").read_text())["architectures"][0] for f in cases()}
    assert named == listed
    assert check.main([]) == 2
    assert "--families" in capsys.readouterr().err


def test_a_refusal_names_the_nearest_family(tmp_path: Path) -> None:
    folder = copy_case("llama-tied", tmp_path / "model")
    name = "Qwen2AudioForConditionalGeneration"
    edit_json(
        folder, "config.json", lambda v: v.update(architectures=[name], model_type="qwen2_audio")
    )
    said = "\n".join(examine(folder).lines())
    assert re.search(f"{name} is not supported; nearest: Qwen2ForCausalLM.*--families", said)


def test_what_each_rank_would_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """3 KV heads on 2 ranks: what tests/ranks measures of a model that is loaded so."""
    assert check.main([str(FIXTURES / "llama-stop"), "--ranks", "2", "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [part["weight_bytes"] for part in ranks["ranks"]] == [135504, 149328]
    assert [part["kv_heads"] for part in ranks["ranks"]] == [1, 2]
    assert (ranks["sums"], ranks["gathers"]) == (2 * 2 + 1, 0)
    assert check.main([str(FIXTURES / "idefics3"), "--ranks", "3"]) == 1
    assert "2 KV heads cannot be cut for 3 ranks; use at most 2" in capsys.readouterr().out
