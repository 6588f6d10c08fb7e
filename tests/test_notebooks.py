"""The notebooks run from the first cell to the last, and say what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells gave out."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def executed(name: str, folder: Path) -> str:
    """What a notebook prints when its cells run in a folder, one after the other."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(
        notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return printed(notebook)


def test_a_patched_model_computes_what_it_did_and_learns_on(tmp_path: Path) -> None:
    told = executed("patch-a-timm-model", tmp_path)
    (difference,) = re.findall(r"largest difference of a logit: (\S+)", told)
    assert float(difference) < 1e-4
    before, after = map(float, re.search(r"\(([\d.]+), ([\d.]+)\)", told.partition("largest difference")[2]).groups())
    assert before > 50  # 10 is guessing
    assert after > before


def test_a_folder_becomes_a_model_that_looks_at_the_shapes(tmp_path: Path) -> None:
    told = executed("folder-to-attention", tmp_path)
    assert float(re.search(r"test_top1 +([\d.]+)", told)[1]) > 80  # 33 is guessing
    attention, pixels = map(int, re.search(r"(\d+) % of the attention on (\d+) % of the pixels", told).groups())
    assert attention > pixels
    assert (tmp_path / "runs" / "shapes" / "summary.json").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole_small_and_of_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users)/", json.dumps(notebook))
    assert path.stat().st_size < 600_000
