"""The notebooks run from top to bottom on the bundled model, without network, in a minute each."""

import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    stored = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in stored), "outputs are stored"
    begun = time.perf_counter()
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    assert time.perf_counter() - begun < 60
