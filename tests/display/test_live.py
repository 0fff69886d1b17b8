"""A handle shows its answer in a cell while it comes, and can be read afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_vlm_pipes import Pipeline, load
from mlx_vlm_pipes.display import live
from mlx_vlm_pipes.result import collect
from tests.display.test_html import Checker

SHAPES = Path(__file__).parent.parent.parent / "examples" / "images" / "shapes.png"
QUESTION = "What is in the picture?"
ANSWER = "a large red circle above a small blue square"


class Screen:
    """Stands for a notebook: what each of its outputs showed, one after the other."""

    def __init__(self) -> None:
        self.outputs: list[list[dict[str, str]]] = []

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        shown = [bundle]
        self.outputs.append(shown)

        class Output:
            def update(self, bundle: dict[str, str], *, raw: bool) -> None:
                assert raw
                shown.append(bundle)

        return Output()


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with load() as made:
        yield made


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    made = Screen()
    monkeypatch.setattr(live, "has_cells", lambda: True)
    monkeypatch.setattr(live, "PERIOD_S", 0)
    monkeypatch.setattr("IPython.display.display", made.display)
    return made


@pytest.mark.parametrize("method", ["submit", "stream"])
def test_an_answer_grows_in_its_cell(pipe: Pipeline, screen: Screen, method: str) -> None:
    running = getattr(pipe, method)(QUESTION, SHAPES)
    running._ipython_display_()
    pictures, answer = screen.outputs
    assert len(pictures) == 1
    assert len(Checker(pictures[0]["text/html"]).images) == 1
    texts = [bundle["text/plain"] for bundle in answer]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert len(set(texts)) > 5
    assert texts[-1] == ANSWER
    shown = Checker(answer[-1]["text/html"]).text
    assert ANSWER in shown
    assert "ended by stop" in shown
    again = running if method == "submit" else running._handle
    assert collect(again).text.strip() == ANSWER


def test_boxes_of_the_answer_are_drawn_at_the_end(screen: Screen) -> None:
    with load(SHAPES.parent.parent / "models" / "tiny-internvl") as internvl:
        media = tuple(internvl.encode(QUESTION, SHAPES).media)
    cell = live.Cell(media)
    for piece in ("<script> a ci", "rcle[[100, 200, ", "300, 400]]"):
        cell.add(piece)
    cell.finish("done")
    pictures, answer = screen.outputs
    assert len(pictures) == 2
    assert "1 a circle" in Checker(pictures[-1]["text/html"]).text.replace("<script> ", "")
    assert "<script>" in Checker(answer[-1]["text/html"]).text


def test_failures_are_raised_and_the_cell_says_how_far_it_came(
    pipe: Pipeline, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = pipe.submit(QUESTION, SHAPES)
    take = handle.next_chunk

    def interrupted() -> Any:
        monkeypatch.setattr(handle, "next_chunk", stop)
        return take()

    def stop() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(handle, "next_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle._ipython_display_()
    assert handle.is_closed
    assert Checker(screen.outputs[-1][-1]["text/html"]).text.endswith("ended early")


def test_a_terminal_gets_the_text(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.submit(QUESTION, SHAPES)._ipython_display_()
    assert capsys.readouterr().out == f"{ANSWER}\n"
