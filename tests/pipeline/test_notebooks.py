"""The notebooks run from top to bottom on a finished experiment; stored outputs are those of the stored results."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
STORED = ("03_results",)
"""Notebooks that read nothing but what lies beside them: they show the same numbers on every machine."""


def said(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what the cells print and show, without warnings, pictures and the ids that pandas draws by chance."""
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    outputs = [output for output in outputs if output.get("name") != "stderr"]
    shown = [
        output.get("text") or output.get("data", {}).get("text/html", "") for output in outputs
    ]
    return [re.sub(r"T_[0-9a-f]+", "T", text) for text in shown]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COIN_RUN", str(finished))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if path.stem in STORED:
        assert said(notebook) == said(nbformat.read(path, as_version=4)), (
            "run it again and commit what it shows"
        )


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_committed(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert kinds
    assert "error" not in kinds
    if path.stem not in STORED:  # the finding first
        assert any("image/png" in output.get("data", {}) for output in cells[0].outputs)
