"""Runs the notebooks from top to bottom, and keeps what they show: ``python docs/_site/run_notebooks.py``."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; it runs in ``folder``."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
    return notebook


if __name__ == "__main__":
    for one in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(run(one, FOLDER), one)
        print(f"{one.name}: {one.stat().st_size / 1000:.0f} kB")
