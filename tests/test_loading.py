"""Checkpoints are untrusted files: each fault is one clear line, before anything is computed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mlx_vlm_pipes import errors, load
from mlx_vlm_pipes.conversion import ConvertOptions, convert
from tests.fixtures_helper import FIXTURES, copy_case

LLAMA, VLM = FIXTURES / "llama-tied", FIXTURES / "idefics3"


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def remove(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def write(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_text(text)

    return edit


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lie_in_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])


FAULTS = {
    "no config": (remove("config.json"), errors.ConfigError, "config.json"),
    "broken JSON": (write("config.json", "{"), errors.ConfigError, "broken JSON"),
    "a list": (write("config.json", "[]"), errors.ConfigError, "list"),
    "unknown architecture": (
        edit_config(architectures=["MambaForCausalLM"], model_type="mamba"),
        errors.UnsupportedModel,
        "MambaForCausalLM",
    ),
    "unknown rope": (
        edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        errors.ConfigError,
        "yarn",
    ),
    "unknown activation": (edit_config(hidden_act="swiglu"), errors.ConfigError, "swiglu"),
    "more layers": (edit_config(num_hidden_layers=9), errors.WeightsError, "missing"),
    "fewer layers": (edit_config(num_hidden_layers=1), errors.WeightsError, "unexpected"),
    "another width": (edit_config(intermediate_size=72), errors.WeightsError, "mis-shaped"),
    "no weights": (remove("model.safetensors"), errors.WeightsError, "safetensors"),
    "truncated": (truncate_weights, errors.WeightsError, "model.safetensors"),
    "lying header": (lie_in_header, errors.WeightsError, "model.safetensors"),
    "index names a missing file": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'),
        errors.WeightsError,
        "gone.safetensors",
    ),
    "index leaves the folder": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
        errors.WeightsError,
        "..",
    ),
    "no tokenizer": (remove("tokenizer.json"), errors.ProcessorError, "tokenizer"),
    "broken tokenizer": (write("tokenizer.json", "{}"), errors.ProcessorError, "tokenizer.json"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str, tmp_path: Path) -> None:
    spoil, kind, words = FAULTS[name]
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert words in message
    assert len(message.splitlines()) == 1


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointNotFound, match="no model at"):
        load(tmp_path / "gone")
    with pytest.raises(errors.CheckpointNotFound, match="a GGUF file or a hub id"):
        load(tmp_path / "model.gguf")
    with pytest.raises(errors.CheckpointNotFound, match="hub"):
        load("nobody/no-such-model")


@pytest.mark.parametrize("name", ["a" * 300, "a/" + "b" * 300, "~no-such-user/x", "~$x", "a\0b"])
def test_names_that_no_folder_has(name: str) -> None:
    for arguments in ({"path": name}, {"path": LLAMA, "adapter": name}):
        with pytest.raises(errors.CheckpointNotFound) as caught:
            load(**arguments)
        assert len(str(caught.value).splitlines()) == 1


def changed(case: str, target: Path, file: str, **values: object) -> Path:
    """A copy of a fixture with other values in a JSON file; a key `a__b` is b in the object a."""
    folder = Path(shutil.copytree(FIXTURES / case, target))
    content = json.loads((folder / file).read_text())
    for key, value in values.items():
        *outer, last = key.split("__")
        place = content
        for name in outer:
            place = place[name]
        place[last] = value
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("case", "values"),
    [
        ("idefics3", {"vision_config__initializer_range": "x"}),
        ("idefics3", {"vision_config__initializer_range": {}}),
        ("pixtral", {"text_config__sliding_window": 2**31}),
        ("mistral-full", {"sliding_window": 2**31}),
        ("mistral-full", {"sliding_window": 2**40}),
    ],
)
def test_values_that_change_nothing(case: str, values: dict[str, object], tmp_path: Path) -> None:
    answers = []
    for folder in (FIXTURES / case, changed(case, tmp_path / "model", "config.json", **values)):
        pipe = load(folder)
        answers.append(pipe.generate("Hello", raw=True, max_tokens=3).tokens)
        pipe.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("edge", [{"longest_edge": 7}, {"longest_edge": 13}])
def test_frames_that_make_no_tokens(edge: object, tmp_path: Path) -> None:
    folder = changed(
        "idefics3", tmp_path / "model", "preprocessor_config.json", max_image_size=edge
    )
    with pytest.raises(
        errors.ProcessorError, match=r"max_image_size is .*expected a multiple of scale_factor 2"
    ):
        load(folder)


def test_no_chat_template_leaves_raw_prompts(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        if path.name == "chat_template.json":
            path.unlink()
        elif isinstance(values, dict) and values.pop("chat_template", None):
            path.write_text(json.dumps(values))
    pipe = load(folder)
    with pytest.raises(errors.ProcessorError, match="chat template"):
        pipe.generate("Hello")
    assert pipe.generate("Hello", raw=True, max_tokens=2).tokens
    pipe.close()


def test_too_long_a_context_is_refused_with_the_counts() -> None:
    pipe = load(LLAMA, max_length=20)
    with pytest.raises(errors.ContextTooLong, match=r"\d+ prompt tokens and 15 new ones .* 20"):
        pipe.generate("The small river crosses the", raw=True, max_tokens=15)
    with pytest.raises(errors.ContextTooLong):
        pipe.logits("The small river crosses the garden " * 5, raw=True)
    assert pipe.engine.stats.prefill_tokens == 0
    pipe.close()
    with pytest.raises(errors.ConfigError, match=r"99999.*max_position_embeddings"):
        load(LLAMA, max_length=99999)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (b"", "empty"),
        (b"not a picture", "picture"),
        ("missing.png", "missing.png"),
        ("ftp://example.org/a.png", "ftp"),
        (12, "int"),
    ],
)
def test_a_bad_picture_is_named(picture: object, words: str) -> None:
    pipe = load(VLM)
    with pytest.raises(errors.InputError) as caught:
        pipe.generate("What is it?", images=[picture])
    assert words in str(caught.value)
    pipe.close()


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    edit_config(auto_map={"AutoConfig": "evil.Config"}, model_file="evil.py")(folder)
    (folder / "evil.py").write_text("raise SystemExit('run')")
    before = sorted(p.name for p in folder.iterdir())
    pipe = load(folder)
    assert pipe.generate("Hello", max_tokens=2).tokens
    pipe.close()
    assert sorted(p.name for p in folder.iterdir()) == before


def test_overrides_reach_tiles_and_model() -> None:
    """A wide picture: one tile, or four of them with a thumbnail, and an answer from each."""
    folder, wide = FIXTURES / "internvl-qwen2", Image.new("RGB", (160, 40), "red")
    tiles = []
    for most in (1, 4):
        pipe = load(folder, vision_config_overrides={"max_dynamic_patch": most})
        tiles.append(pipe.encode("x", [wide]).media[0].num_tokens // pipe.config.num_image_token)
        assert pipe.generate("x", [wide], max_tokens=2, ignore_eos=True).tokens
        assert pipe.model.pipeline_config.model.vision_config_overrides["max_dynamic_patch"] == most
        pipe.close()
    assert tiles == [1, 5]
    with pytest.raises(errors.ConfigError, match="knows none"):
        load(FIXTURES / "llama-tied", vision_config_overrides={"max_dynamic_patch": 1})


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = copy_case("llama-tied", tmp_path / "plain").rename(tmp_path / os.fsdecode(b"m\xff"))
    line = r"m\\udcff.*: not a name in UTF-8; rename it$"
    with pytest.raises(errors.CheckpointNotFound, match=line):
        load(folder)
    with pytest.raises(errors.CheckpointNotFound, match=line):
        load(LLAMA, adapter=str(folder))
    with pytest.raises(errors.InputError, match=line):
        convert(ConvertOptions(model=LLAMA, out=folder / "out"))
    assert not (folder / "out").exists()
