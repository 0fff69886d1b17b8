"""The notebooks run from top to bottom, without network, in a minute of a core each."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools.real_checkpoint import FOLDER_VARIABLE, checkpoint_path

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ("1_quick_start",)  # the others are slow
REAL = EXAMPLES / "9_a_real_model.ipynb"


def marked(path: Path) -> object:
    if path == REAL:
        there = checkpoint_path().is_file()
        missing = pytest.mark.skipif(not there, reason="run: python tools/real_checkpoint.py")
        marks = [pytest.mark.real, missing]
    else:
        marks = [] if path.stem in QUICK else [pytest.mark.slow]
    return pytest.param(path, id=path.stem, marks=marks)


def run(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    return notebook


def kernel_seconds() -> float:
    """Processor time of all kernels that have ended: another's work on the machine is not in it."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("path", [*map(marked, sorted(EXAMPLES.glob("*.ipynb")))])
def test_notebook_runs(path: Path) -> None:
    before = kernel_seconds()
    run(path)
    assert kernel_seconds() - before < 60


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran(path: Path) -> None:
    """Outputs, in order and without errors; whoever cannot see a picture can read what it shows."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert output.metadata["image/png"]["alt"]
    pages = [output.data.get("text/html", "") for output in outputs if "data" in output]
    pages += [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for page in pages:
        assert page.count("<img ") == page.count(' alt="')


@pytest.mark.slow
def test_a_real_model_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CellExecutionError, match="connect to the network and run this again"):
        run(REAL)
