"""The notebooks run from top to bottom on a finished experiment; stored outputs are those of the stored results."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted(Path(__file__).parents[2].glob("notebooks/*.ipynb"))
STORED = ("03_results",)
"""Notebooks that read nothing but what lies beside them: they show the same numbers on every machine."""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_picture(cells):
    return any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def shown(notebook):
    """Return what the cells print and show, without warnings, pictures and the ids that pandas draws by chance."""
    found = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.get("name") != "stderr":
                text = output.get("text") or output.get("data", {}).get("text/html", "")
                found.append(re.sub(r"T_[0-9a-f]+", "T", text))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, finished, monkeypatch):
    monkeypatch.setenv("COIN_RUN", str(finished))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert has_picture(code_cells(notebook))
    if path.stem in STORED:
        stored = nbformat.read(path, as_version=4)
        assert shown(notebook) == shown(stored), "run it again and commit what it shows"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert kinds
    assert "error" not in kinds
    if path.stem not in STORED:  # the finding first
        assert has_picture(cells[:1])
