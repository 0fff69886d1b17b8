"""Hostile model folders: never a crash, a hang, a flood of memory, a write outside, a traceback.

Bounded and seeded; HOSTILE_CASES multiplies the number of random cases.
"""

import contextlib
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_vlm_pipes import check, convert, generate
from mlx_vlm_pipes.errors import ConfigError
from mlx_vlm_pipes.hf_config import HuggingFaceConfig
from tests.fixtures_helper import FIXTURES, copy_case
from tests.torture.mutations import file_of, header_of, spoiled

FAMILIES = ["llama-stop", "phi3-longrope", "idefics3", "pixtral-v5", "internvl-chat",
            "internvl-qwen3", "qwen2vl", "qwen25vl", "qwen3vl"]  # fmt: skip
WEIGHTS = "model.safetensors"
MAX_SECONDS = 5.0
MAX_BYTES = 1_000_000_000
EFFORT = float(os.environ.get("HOSTILE_CASES", "1"))


def snapshot(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def run(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """A command in this process: its exit status, once it has been seen to behave.

    An exception other than SystemExit is a traceback on the command line, and fails the test.
    """
    out, err = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    assert time.perf_counter() - started < MAX_SECONDS, argv
    assert code in (0, 1, 2)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error")]
    assert len(lines) == (1 if code == 2 else 0), err.getvalue()
    if code == 2:
        assert len(err.getvalue().splitlines()) == 1, err.getvalue()
    return code


def survives(folder: Path, *, load: bool = True) -> None:
    """The doctor, and with `load` the generator, end in order and leave the folder as it was."""
    before = snapshot(folder.parent)
    run(check.main, [str(folder)])
    if load:
        argv = ["--model", str(folder), "--prompt", "hi", "--max-tokens", "2", "--quiet"]
        run(generate.main, argv)
    assert snapshot(folder.parent) == before


@pytest.fixture(autouse=True)
def memory_stays_small() -> Iterator[None]:
    mx.reset_peak_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < MAX_BYTES
    assert mx.get_peak_memory() < MAX_BYTES


@pytest.mark.parametrize("case", FAMILIES)
def test_config_values(case, tmp_path):
    folder = copy_case(case, tmp_path / "model")
    rng = random.Random(case)
    text = (folder / "config.json").read_text()
    for i, bad in enumerate(spoiled(text, rng, int(40 * EFFORT))):
        (folder / "config.json").write_text(bad)
        survives(folder, load=i % 8 == 0)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
     "preprocessor_config.json", "processor_config.json", "chat_template.json"],
)  # fmt: skip
def test_processor_values(name, tmp_path):
    rng = random.Random(name)
    for case in ("idefics3", "qwen25vl", "pixtral-v5", "internvl-chat"):
        if not (FIXTURES / case / name).exists():
            continue
        folder = copy_case(case, tmp_path / case)
        text = (folder / name).read_text()
        for i, bad in enumerate(spoiled(text, rng, int(6 * EFFORT))):
            (folder / name).write_text(bad)
            survives(folder, load=i % 4 == 0)


def test_safetensors_headers(tmp_path):
    folder = copy_case("idefics3", tmp_path / "model")
    good = (folder / WEIGHTS).read_bytes()
    header, body = header_of(good)
    rng = random.Random(1)
    texts = [*spoiled(json.dumps(header), rng, int(40 * EFFORT))]
    files = [file_of(text, body) for text in texts]
    for _ in range(int(40 * EFFORT)):  # bytes of the header, its length included
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(2000)] = rng.randrange(256)
        files.append(bytes(data))
    files += [good[: rng.randrange(len(good))] for _ in range(10)]
    for i, data in enumerate(files):
        (folder / WEIGHTS).write_bytes(data)
        survives(folder, load=i % 6 == 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        file_of("[" * 100_000, b""),
        file_of('{"a":' * 100_000, b""),
        file_of("{" + '"a":1,' * 50_000 + '"a":1}', b""),
        file_of('{"a":{"dtype":"F32","shape":[2147483647,2147483647],"data_offsets":[0,0]}}', b""),
        file_of('{"a":{"dtype":"F32","shape":[0,4294967296],"data_offsets":[0,0]}}', b""),
        file_of(
            '{"' + "a" * 1_000_000 + '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b""
        ),
        file_of('{"../../x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b""),
        file_of('{"\\u0000.\\n.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"0000"),
        file_of("NaN", b""),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=range(14),
)
def test_hand_made_headers(data, tmp_path):
    folder = copy_case("llama-stop", tmp_path / "model")
    (folder / WEIGHTS).write_bytes(data)
    survives(folder)


@pytest.mark.parametrize(
    "index",
    [
        "", "[]", "{}", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": {}}',
        '{"weight_map": {"a": "../../../etc/passwd"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/dev/zero.safetensors"}}',
        '{"weight_map": {"a": "a\\u0000.safetensors"}}',
        '{"weight_map": {"a": "' + "a" * 5000 + '.safetensors"}}',
        '{"weight_map": {"a": ["model.safetensors"]}}',
        '{"weight_map": {"a": "pipe.safetensors"}}',
        '{"weight_map": {"a": "folder.safetensors"}}',
        '{"weight_map": {"a": "loop.safetensors"}}',
        '{"weight_map": {"a": "outside.safetensors"}}',
    ],
    ids=range(17),
)  # fmt: skip
def test_index_files(index, tmp_path):
    folder = copy_case("llama-stop", tmp_path / "model")
    (tmp_path / "secret.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "outside.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    survives(folder)
    assert run(check.main, [str(folder)]) == 1


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
     "preprocessor_config.json", "chat_template.jinja", "model.safetensors"],
)  # fmt: skip
def test_files_that_are_none(name, kind, tmp_path):
    folder = copy_case("idefics3", tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "endless":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    survives(folder)


ESCAPES = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "import": "{% import 'os' as os %}{{ os.listdir('.') }}",
    "include": "{% include '/etc/passwd' %}",
    "endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "loop over output": "{% for i in range(99999) %}{{ 'A' * 9999 }}{% endfor %}",
    "giant text": "{{ 'A' * 10 ** 12 }}",
    "doubling": "{% set ns = namespace(a='A') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "padding": "{{ 'a'.ljust(10 ** 11) }}",
    "list": "{{ ([0] * 10 ** 10) | length }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long source": "x" * 2_000_000,
    "broken": "{% for %}",
    "raise": "{{ raise_exception('no\nsecond line') }}",
    "mutation": "{{ messages.append(1) }}{{ messages.clear() }}",
    "surrogate": "{{ '\\ud800' }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_chat_templates(name, tmp_path, monkeypatch):
    folder = copy_case("llama-stop", tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(ESCAPES[name])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    survives(folder)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_huge_sizes_are_refused_early():
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"):
        for value in (10**9, -1, 2.5, "7", [3]):
            with pytest.raises(ConfigError, match=key):
                HuggingFaceConfig({"model_type": "llama", key: value})
    nested: dict[str, Any] = {}
    for _ in range(200):
        nested = {"text_config": nested}
    with pytest.raises(ConfigError, match="deeper"):
        HuggingFaceConfig(nested)


def test_converting_hostile_folders_writes_nothing(tmp_path):
    rng = random.Random(5)
    folder = copy_case("idefics3", tmp_path / "model")
    texts = list(spoiled((folder / "config.json").read_text(), rng, int(25 * EFFORT)))
    for i, text in enumerate(texts):
        (folder / "config.json").write_text(text)
        out = tmp_path / f"out-{i}"
        code = run(convert.main, ["--model", str(folder), "--out", str(out), "--bits", "8",
                                  "--group-size", "32", "--no-measure"])  # fmt: skip
        assert out.exists() is (code == 0)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_code_in_the_folder_is_never_run(tmp_path, monkeypatch):
    folder = copy_case("internvl-chat", tmp_path / "model")
    trap = f"open({str(tmp_path / 'pwned')!r}, 'w')\n"
    for name in ("modeling_internvl_chat.py", "configuration.py", "tokenization.py", "__init__.py"):
        (folder / name).write_text(trap)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_file": "configuration.py", "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(values))
    monkeypatch.chdir(folder)
    survives(folder)
    assert run(check.main, [str(folder), "--run"]) == 0
    assert run(convert.main, ["--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["generate", "--model", "FOLDER", "--prompt", "hi"], 2),
        (["convert", "--model", "FOLDER", "--out", "OUT", "--bits", "4"], 2),
        (["check", "FOLDER"], 1),
        (["check", "NOWHERE"], 2),
    ],
)
def test_command_line_ends_with_one_line(argv, code, tmp_path):
    folder = copy_case("llama-stop", tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 10**9}))
    names = {"FOLDER": folder, "OUT": tmp_path / "out", "NOWHERE": tmp_path / "nowhere"}
    words = [str(names.get(word, word)) for word in argv]
    done = subprocess.run(
        [sys.executable, "-m", f"mlx_vlm_pipes.{words[0]}", *words[1:]],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code == 2:
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
    else:
        assert "num_hidden_layers" in done.stdout
