"""Notebooks define nothing, are committed without outputs, and run from top to bottom."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

REPO = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defines_nothing_and_holds_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in _code(notebook):
        assert cell.outputs == []
        if cell.source.startswith("%%writefile"):
            continue  # a file of the user's, shown where it is written
        python = "\n".join(line for line in cell.source.splitlines() if line[:1] not in ("%", "!"))
        for node in ast.walk(ast.parse(python)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda), cell.source


@pytest.mark.heavy
@pytest.mark.alone
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("path", "figures"),
    [
        pytest.param(REPO / "notebooks" / f"{name}.ipynb", figures, marks=marks, id=name)
        for name, figures, marks in (
            ("hit_rates", 6, ()),
            ("ttft", 3, pytest.mark.engine),
            ("strategies", 3, ()),
            ("store", 1, ()),
        )
    ],
)
def test_runs_from_top_to_bottom(path: Path, figures: int, tmp_path: Path) -> None:
    from nbclient import NotebookClient

    # A copy, so that it finds no results and makes its own small run.
    for folder in ("experiments", "benchmarks"):
        shutil.copytree(REPO / folder, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    # What a kernel on a busy machine prints later than 4 seconds would be left out without a word.
    late: dict[str, Any] = {"iopub_timeout": 120, "raise_on_iopub_timeout": True}
    NotebookClient(notebook, timeout=800, kernel_name="python3", resources=where, **late).execute()
    drawn = [i for i, cell in enumerate(notebook.cells) for output in cell.get("outputs", ())
             if "image/png" in output.get("data", {})]  # fmt: skip
    assert len(drawn) == figures, f"figures of cells {drawn}"


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"hit_rates", "ttft", "strategies", "store"}
