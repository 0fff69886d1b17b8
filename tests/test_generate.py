"""The command line: answers on stdout, figures on stderr, one line for a user's mistake."""

import io
import json
import sys
from pathlib import Path

import pytest

from mlx_vlm_pipes import __version__
from mlx_vlm_pipes.generate import build_parser, given_options, main

ROOT = Path(__file__).parent.parent
SHAPES = str(ROOT / "examples" / "images" / "shapes.png")
WANTED = "a large red circle above a small blue square"


def test_answer_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--image", SHAPES, "--prompt", "Describe the picture."]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == WANTED
    assert "bundled model" in err.splitlines()[0]
    figures = err.splitlines()[-1]
    assert figures.startswith("prompt: ")
    assert "image tokens" in figures
    assert "peak memory" in figures


def test_json_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--image", SHAPES, "--json", "--quiet", "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert WANTED.startswith(record["text"].strip())
    assert record["completion_tokens"] == len(record["tokens"]) == 3
    assert record["finish_reason"] == "length"
    assert err == ""


def test_image_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(SHAPES).read_bytes())))
    assert main(["--image", "-", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == WANTED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/folder"], "no model folder"),
        (["--image", "/no/such/picture.png"], "picture.png"),
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "999999"], "999999"),
        (["--raw", "--prompt", "<image>"], "image"),
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
