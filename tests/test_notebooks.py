"""Execute the notebooks and check their printed results and stored outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def output_text(notebook: nbformat.NotebookNode) -> str:
    """Return the text of all outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def execute(name: str, folder: Path) -> str:
    """Execute a notebook in a folder and return the printed text."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(
        notebook, kernel_name="python3", timeout=3600, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return output_text(notebook)


@pytest.mark.slow
def test_patched_model_preserves_its_function_and_trains(tmp_path: Path) -> None:
    text = execute("patch-a-timm-model", tmp_path)
    (difference,) = re.findall(r"largest difference of a logit: (\S+)", text)
    assert float(difference) < 1e-4
    before, after = map(float, re.search(r"\(([\d.]+), ([\d.]+)\)", text.partition("largest difference")[2]).groups())
    assert before > 50  # 10 is guessing
    assert after > before


@pytest.mark.slow
def test_folder_notebook_trains_a_model_that_attends_to_the_shapes(tmp_path: Path) -> None:
    text = execute("folder-to-attention", tmp_path)
    assert float(re.search(r"test_top1 +([\d.]+)", text)[1]) > 80  # 33 is guessing
    attention, pixels = map(int, re.search(r"(\d+) % of the attention on (\d+) % of the pixels", text).groups())
    assert attention > pixels
    assert (tmp_path / "runs" / "shapes" / "summary.json").exists()


@pytest.mark.slow
def test_colab_trains_and_draws_attention_without_installing(tmp_path: Path) -> None:
    text = execute("colab", tmp_path)
    assert float(re.search(r"test_top1 +([\d.]+)", text)[1]) > 80  # 10 is guessing
    assert "<Figure size" in text
    assert "pip" not in text


def test_colab_uses_one_repository() -> None:
    text = (FOLDER / "colab.ipynb").read_text(encoding="utf-8")
    opened = set(
        re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/docs/notebooks/colab", text)
    )
    installed = set(re.findall(r"https://github\.com/([\w.-]+/[\w.-]+)", text))
    site = re.findall(r"^repo_url: https://github\.com/(\S+?)/?$", (FOLDER.parents[1] / "mkdocs.yml").read_text(), re.M)
    assert len(opened) == 1
    assert opened == installed == (set(site) or opened)


def test_stored_outputs_are_complete_small_and_portable() -> None:
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), path
        assert not any(output.output_type == "error" for cell in code for output in cell.outputs), path
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users)/", json.dumps(notebook)), path
        assert path.stat().st_size < 600_000, path
