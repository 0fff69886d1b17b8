"""The bench command: what it measures is what it says, and it says it in 80 columns."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from mlx_vlm_pipes import GenerationResult, Timings, Usage, bench, load
from mlx_vlm_pipes.speed.measure import Cell
from mlx_vlm_pipes.speed.stopwatch import decode_rate, text_prompt, tower_seconds
from tests.fixtures_helper import FIXTURES

ROOT = Path(__file__).parent.parent
SMALL = (
    "--prompt-tokens", "5,16", "--rows", "1,3", "--pictures", "64x48", "--new-tokens", "3",
    "--rounds", "1",
)  # fmt: skip


@pytest.mark.parametrize("case", ["idefics3", "internvl-chat", "pixtral", "qwen25vl", "llama-tied"])
def test_prompts_have_exactly_the_tokens_asked_for(case: str) -> None:
    with load(FIXTURES / case) as pipe:
        for tokens in (1, 33):
            prompt = text_prompt(pipe, tokens)
            result = pipe.generate(prompt, max_tokens=2, ignore_eos=True)
            assert (result.usage.prompt_tokens, result.usage.image_tokens) == (tokens, 0)


def test_the_arithmetic() -> None:
    usage, timings = Usage(10, 0, 0, 0, 5), Timings(queued_s=1.0, prompt_s=0.5, generation_s=0.25)
    result = GenerationResult("", [1, 2, 3, 4, 5], "length", usage, timings)
    assert decode_rate(result) == 16.0  # the first token belongs to the prompt
    cell = Cell("rows", ("rows", 2), dict, [{"x": 1.0}, {"x": 9.0}, {"x": 2.0}])
    assert cell.as_dict() == {"rows": 2, "x": 2.0}


def test_a_picture_is_encoded_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken from the cache of pictures, which would be no measurement."""
    with load() as pipe:
        prompt = pipe.encode("Hi", images=[ROOT / "examples/images/shapes.png"])
        pipe.generate(prompt, max_tokens=1)
        seen: list[int] = []
        encode = pipe.model.encode_images
        monkeypatch.setattr(pipe.model, "encode_images", lambda i: seen.append(len(i)) or encode(i))
        assert tower_seconds(pipe, prompt) > 0
    assert seen == [1]


def test_a_whole_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "speed.png"
    assert bench.main([*SMALL, "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"machine", "model", "dtype", "device", "peak_memory_bytes"} <= found.keys()
    assert [row["prompt_tokens"] for row in found["prompts"]] == [5, 16]
    assert [row["rows"] for row in found["rows"]] == [1, 3]
    assert found["pictures"][0]["image_tokens"] == 16
    for row in (*found["prompts"], *found["rows"], *found["pictures"]):
        assert all(value > 0 for value in row.values() if isinstance(value, float))
    for row in found["prompts"]:
        wanted = row["prompt_tokens"] / row["first_token_s"]
        assert row["prompt_tokens_per_s"] == pytest.approx(wanted, rel=1e-3)
    with Image.open(plot) as image:
        assert image.width > image.height > 400


def test_lines_fit_and_what_cannot_be_measured_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ["--model", str(FIXTURES / "llama-tied"), "--max-length", "12"]
    assert bench.main([*SMALL, *model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) < 80 for line in lines)
    assert lines[0].startswith("llama-tied, float32 on ")
    assert lines[0].endswith("; one round, answers of 3 tokens")
    assert any(line.strip().startswith("16  skipped: 16 prompt tokens and 3 new") for line in lines)
    assert "pictures: skipped, a text model" in lines
    assert lines[-1].startswith("peak memory: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "1,x"], "--rows 'x': expected whole numbers"),
        (["--prompt-tokens", "none"], "one length at least"),
        (["--pictures", "64"], "--pictures '64': expected WIDTHxHEIGHT"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--plot", "x.gif"], "expected a name that ends in .png"),
        (["--plot", "/no/such/x.png"], "there is no folder /no/such"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert words in err


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["--plot", "x.png"]) == 2
    assert 'pip install "mlx-vlm-pipes[plot]"' in capsys.readouterr().err
