"""The command line: answers on stdout, figures on stderr, one line for a user's mistake."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_pipes import Chunk, __version__, load
from mlx_vlm_pipes.__main__ import COMMANDS
from mlx_vlm_pipes.__main__ import main as all_commands
from mlx_vlm_pipes.generate import Answer, build_parser, given_options, main

ROOT = Path(__file__).parent.parent
SHAPES = str(ROOT / "examples" / "images" / "shapes.png")
WANTED = "a large red circle above a small blue square"


def test_answer_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--image", SHAPES, "--prompt", "Describe the picture."]) == 0
    out, err = capsys.readouterr()
    assert out == WANTED + "\n"  # the model's leading space is not shown
    said, prompt, answer = err.splitlines()
    assert "bundled model" in said
    assert re.fullmatch(r"prompt: 30 tokens \(16 image\), [\d.]+ s, \d+ tokens/s", prompt)
    assert re.fullmatch(r"answer: 10 tokens, \d+ tokens/s, ended by stop; peak \d+ MB", answer)


def test_a_cut_answer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--image", SHAPES, "--max-new-tokens", "2", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert WANTED.startswith(out.strip())
    assert "2 tokens" in err
    assert "cut at --max-tokens" in err


def test_an_interrupted_answer_ends_its_line_and_has_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def chunks() -> Iterator[Chunk]:
        yield Chunk(" a", 1)
        yield Chunk(" large", 2)
        raise KeyboardInterrupt

    with load() as pipe:
        assert Answer(build_parser().parse_args([])).print(pipe, chunks()) == 130
    out, err = capsys.readouterr()
    assert out == "a large\n"
    assert err.splitlines()[0] == "interrupted"
    assert err.splitlines()[1].startswith("answer: 2 tokens so far")


def test_json_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--image", SHAPES, "--json", "--quiet", "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert WANTED.startswith(record["text"])
    assert record["completion_tokens"] == len(record["tokens"]) == 3
    assert record["finish_reason"] == "length"
    assert err == ""


def test_show_writes_what_was_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load() as pipe:
        wanted = pipe.show(SHAPES).picture
    answered, planned = tmp_path / "answered.png", tmp_path / "planned.png"
    assert main(["--image", SHAPES, "--quiet", "--max-tokens", "1", "--show", str(answered)]) == 0
    assert main(["--image", SHAPES, "--quiet", "--plan", "--show", str(planned)]) == 0
    for path in (answered, planned):
        with Image.open(path) as written:
            assert written.size == wanted.size
            np.testing.assert_array_equal(np.asarray(written)[:300], np.asarray(wanted)[:300])
    monkeypatch.setattr("mlx_vlm_pipes.loading.load", None)  # mistakes are told before it
    capsys.readouterr()
    for wrong, reason in (
        (["--image", SHAPES, "--show", "a.txt"], "a picture's name ends in .png"),
        (["--image", SHAPES, "--show", str(tmp_path / "no" / "a.png")], "is no folder; make it"),
        (["--prompt", "Hi", "--show", "a.png"], "there is no picture to show"),
    ):
        assert main(wrong) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert reason in err
        assert err.count("\n") == 1


def test_image_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(SHAPES).read_bytes())))
    assert main(["--image", "-", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == WANTED


def test_prompt_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Describe the picture.")))
    assert main(["--image", SHAPES, "--prompt", "-", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == WANTED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "Hi", "--model", "/no/such/folder"], "no model at"),
        (["--image", "/no/such/picture.png"], "picture.png"),
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--prompt", "Hi", "--max-tokens", "999999"], "999999"),
        (["--raw", "--prompt", "<image>"], "image"),
        ([], "nothing to answer; give --prompt, --image or --video"),
        (["--prompt", "-", "--image", "-"], "standard input holds one of them"),
        (["--prompt", "x", *["--image", "-"] * 2], "standard input holds one of them"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_flags_become_options() -> None:
    flags = (
        "--system Hi --fps 4 --min-pixels 784 --max-pixels 7840 --num-frames 3 --raw "
        "--max-tokens 5 --min-tokens 2 --temperature 0.7 --top-p 0.9 --top-k 4 --min-p 0.1 "
        "--repetition-penalty 1.1 --presence-penalty -0.5 --frequency-penalty 0.25 --seed 3 "
        "--stop A --stop B --ignore-eos"
    )
    assert given_options(build_parser().parse_args(flags.split())) == {
        "system": "Hi", "fps": 4.0, "min_pixels": 784, "max_pixels": 7840, "num_frames": 3,
        "raw": True, "max_tokens": 5, "min_tokens": 2, "temperature": 0.7, "top_p": 0.9,
        "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": -0.5,
        "frequency_penalty": 0.25, "seed": 3, "stop": ("A", "B"), "ignore_eos": True,
    }  # fmt: skip
    assert given_options(build_parser().parse_args(["--adapter", "folder"])) == {}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_flags_of_other_programs_say_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--max-kv-size", "100"])
    assert "--max-kv-size: no cache forgets here" in capsys.readouterr().err


def test_all_commands_behind_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert all_commands([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert all_commands(["check", "--families"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert all_commands(["--image", SHAPES, "--quiet"]) == 0  # the old form: generate's options
    assert capsys.readouterr().out.strip() == WANTED
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            all_commands([name, "--help"])
        assert f"mlx_vlm_pipes.{name} " in capsys.readouterr().out


def test_the_package_runs_as_a_module() -> None:
    run = [sys.executable, "-m", "mlx_vlm_pipes", "generate", "--image", SHAPES, "--quiet"]
    answer = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == WANTED


def test_tools_and_variables_of_the_template_as_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "f"}]')

    def options(*flags: str) -> dict[str, object]:
        return given_options(build_parser().parse_args(flags))

    assert options("--tools", str(tools), "--no-enable-thinking") == {
        "tools": ({"name": "f"},), "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    both = options("--enable-thinking", "--chat-template-config", '{"x": [1]}')
    assert both == {"chat_template_kwargs": {"enable_thinking": True, "x": [1]}}
    tools.write_text("[")
    for flags, line in {
        ("--tools", str(tools)): "is no JSON; expected a list of tools",
        ("--tools", str(tmp_path / "none")): "cannot be read (No such file or directory)",
        ("--chat-template-kwargs", "5"): """expected JSON as '{"enable_thinking": false}'""",
    }.items():
        with pytest.raises(SystemExit):
            options(*flags)
        assert line in capsys.readouterr().err
    assert main(["--prompt", "Hello", "--enable-thinking"]) == 2
    assert "does not read enable_thinking; leave it out" in capsys.readouterr().err


def test_an_answer_in_a_form_by_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "form.lark"
    schema.write_text('{"enum": ["red", "blue"]}')
    grammar.write_text('start: "a" "b"')
    for flags, wanted in {
        ("--schema", str(schema)): ('"red"', '"blue"'),
        ("--grammar", str(grammar)): ("ab",),
        ("--regex", "[xy]"): ("x", "y"),
    }.items():
        assert main(["--prompt", "Which?", "--quiet", *flags]) == 0
        assert capsys.readouterr().out.strip() in wanted
    assert main(["--prompt", "Which?", "--thinking-budget", "3"]) == 2
    assert "this tokenizer has no </think>" in capsys.readouterr().err


def test_a_prompt_cache_is_written_once_and_read_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cache"

    def run(*more: str) -> tuple[dict[str, Any], list[str]]:
        argv = ["--image", SHAPES, "--json", "--max-tokens", "4", "--prompt-cache", str(file)]
        assert main([*argv, *more]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), [line for line in err.splitlines() if "prompt cache" in line]

    cold, said = run()
    assert cold["cached_tokens"] == 0
    assert said == [f"prompt cache: {cold['prompt_tokens']} tokens, 0.0699 MB written to {file}"]
    written = file.read_bytes()
    warm, said = run()
    assert (warm["tokens"], warm["cached_tokens"]) == (cold["tokens"], cold["prompt_tokens"] - 1)
    assert said == []
    assert run("--prompt", "Describe the small shape.")[0]["cached_tokens"] > 16  # the picture
    assert file.read_bytes() == written
    _, said = run("--kv-bits", "8")
    assert "not used" in said[0]
    assert "this pipeline has 8 bits" in said[0]
    assert said[1].startswith("prompt cache: ")
    assert run("--kv-bits", "8")[0]["cached_tokens"] == cold["prompt_tokens"] - 1
    file.write_bytes(written[:100])
    assert main(["--image", SHAPES, "--prompt-cache-file", str(file)]) == 2
    assert "no whole prefix file; choose another name" in capsys.readouterr().err
    assert main(["--image", SHAPES, "--prompt-cache", str(tmp_path / "none" / "cache")]) == 2
    out, err = capsys.readouterr()
    assert "there is no such folder; make it first" in err
    assert out == ""  # said before the answer is made
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
