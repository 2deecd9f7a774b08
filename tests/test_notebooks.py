"""Every notebook runs from a clean kernel, and is committed with pictures."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 400_000
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said_on_stderr(notebook):
    """What a reader would see as a warning."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


@every
def test_runs_from_a_clean_kernel(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    # A cell that raises ends the run with its error.
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert not said_on_stderr(notebook)


@every
def test_what_is_committed_was_run_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)
    assert notebook.metadata.kernelspec.name == "python3"


@every
def test_what_is_committed_is_small_and_says_nothing_of_a_machine(path):
    assert path.stat().st_size < MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    assert not said_on_stderr(notebook)
    words = [cell.source for cell in notebook.cells]
    words += [json.dumps({k: v for k, v in o.items() if k != "data"}) for cell in code(notebook) for o in cell.outputs]
    assert not re.findall(r"(?:/home|/root|/tmp|/Users|site-packages|ipykernel_)\S*", "\n".join(words))


def test_each_is_in_the_list():
    listed = (FOLDER / "README.md").read_text()
    assert NOTEBOOKS
    assert not [path.name for path in NOTEBOOKS if f"({path.name})" not in listed]
