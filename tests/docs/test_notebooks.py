"""Each notebook runs from its first cell to its last with small settings, and is committed with its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

#: Runs of whole models, some of them in processes of their own.
pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
#: What replaces the cell of settings, so that a run takes seconds.
SMALL = {
    "01_first_model": "training_images, validation_images, size, steps = 4, 8, 64, 2",
    "02_your_own_loss": "training_images, validation_images, size, steps, seeds = 4, 8, 64, 1, [0, 1]",
    "03_what_the_mask_loses": None,
    "04_weak_labels": "training_images, validation_images, size, steps = 5, 8, 64, 2",
    "gpu_validation": None,
}


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_the_list_is_complete() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    settings = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    # The notebooks without settings write nothing, and read files of the repository.
    folder = NOTEBOOKS
    if SMALL[name] is not None:
        (cell,) = settings
        cell.source = SMALL[name]
        folder = tmp_path
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_has_its_outputs(name: str) -> None:
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
