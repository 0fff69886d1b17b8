"""The trained models answer about unseen pictures and clips, through this package."""

from pathlib import Path

import pytest

from mlx_vlm_pipes.loading import BUNDLED
from tools.train_tiny.evaluate import evaluate

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"


# those that have seen the question before the picture in training too
@pytest.mark.parametrize(
    "folder", [BUNDLED, EXAMPLES / "tiny-qwen2_5vl"], ids=lambda path: path.name
)
def test_question_first_on_20_unseen_cases(folder: Path) -> None:
    report = evaluate(folder, cases=20, seed=2, media_last=True)
    assert report["exact"] >= 0.9, report["wrong"]


def test_bundled_model_on_20_unseen_pictures() -> None:
    report = evaluate(BUNDLED, cases=20, seed=2)
    assert report["exact"] >= 0.9, report["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted(EXAMPLES.glob("tiny-*")), ids=lambda path: path.name)
def test_example_model_on_20_unseen_cases(folder: Path) -> None:
    report = evaluate(folder, cases=20, seed=2)
    assert report["exact"] >= 0.9, report["wrong"]


@pytest.mark.parametrize("folder", [BUNDLED, *sorted(EXAMPLES.glob("tiny-*"))])
def test_a_trained_model_is_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 4_000_000
