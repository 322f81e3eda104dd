"""The notebooks run from top to bottom: a tiny model, three steps a task."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_stored_notebooks_are_valid_and_have_no_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["merge_three", "two_tasks"]
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, llama_folder, tmp_path, monkeypatch):
    own = {"PEFT_MORA_MODEL": llama_folder, "PEFT_MORA_STEPS": "3", "OMP_NUM_THREADS": "1"}  # the other core is busy
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "notebooks").mkdir()  # where out/ goes
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place).execute()
    shown = "".join(o.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs)
    assert "method   MORA, routing dense" in shown or "method   LORA" in shown
