"""The notebooks run from top to bottom, and what they show is right."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def shown(notebook: Any) -> str:
    """Everything that the cells print and show as text or HTML."""
    parts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            parts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join(parts)


@pytest.mark.slow("runs three notebooks in kernels of their own")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nbclient", "ipykernel", "matplotlib", "sklearn", "PIL", "jinja2"):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_site"))
    try:
        from run_notebooks import run

        text = shown(run(path, tmp_path))
    finally:
        sys.modules.pop("run_notebooks", None)
    if path.stem == "fine-tuning":
        (accuracy,) = re.findall(r"step 200: loss [\d.]+, accuracy ([\d.]+)", text)
        assert float(accuracy) > 0.8 and "2@gradient" in text and "History(20 steps" in text
    elif path.stem == "outlier-features":
        before, after = map(float, re.findall(r"([\d.]+) with them, ([\d.]+) without them", text)[0])
        assert before > 3 * after
        if "CLIP ViT-B/16" in text:
            assert before == pytest.approx(87.2, abs=0.1) and "442" in text
    else:
        assert "60 images, 3 labels, problems: []" in text and "14 units, 3 labels, 60 images" in text


def test_what_is_kept_is_small_and_names_no_machine() -> None:
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert len(text) < 300_000 and not re.search(r"/home/|/root/|/tmp/|[A-Z]:\\\\Users", text), path.name
