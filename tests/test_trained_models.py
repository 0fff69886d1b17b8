"""The trained models answer about unseen pictures and clips, through this package."""

from pathlib import Path

import pytest

from mlx_vlm_pipes.loading import BUNDLED
from tools.train_tiny.evaluate import evaluate

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"


@pytest.mark.parametrize("media_last", [False, True], ids=["picture first", "question first"])
def test_bundled_model_on_20_unseen_pictures(*, media_last: bool) -> None:
    report = evaluate(BUNDLED, cases=20, seed=2, media_last=media_last)
    assert report["exact"] >= 0.9, report["wrong"]


@pytest.mark.parametrize("folder", sorted(EXAMPLES.glob("tiny-*")), ids=lambda path: path.name)
def test_example_model_on_20_unseen_cases(folder: Path) -> None:
    report = evaluate(folder, cases=20, seed=2)
    assert report["exact"] >= 0.9, report["wrong"]


@pytest.mark.parametrize("folder", [BUNDLED, *sorted(EXAMPLES.glob("tiny-*"))])
def test_a_trained_model_is_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 4_000_000
