"""The miniature of the paper with shorter settings: a CLIP and its two counterparts through the whole analysis."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip", reason="open_clip is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

pytestmark = pytest.mark.slow("trains three encoders and interprets them")

SCRIPT = Path(__file__).parents[1] / "examples" / "tiny_clip.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs on 384 digits: enough to run everything, not to learn much."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [SCRIPT.name, "--output", str(folder), "--epochs", "3", "--limit", "884"])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder


def test_ends_with_the_comparison(folder: Path) -> None:
    found = json.loads((folder / "study" / "comparison.json").read_text())
    assert [row["role"] for row in found["models"]] == ["zero-shot", "fine-tuned", "supervised"]
    for row in found["models"]:
        assert 0 < row["accuracy"] <= 1 and row["robustness"] is not None and row["concepts"] is not None and row["features"] == 64
    assert [row["b"] for row in found["pairs"]] == ["tiny CLIP, fine-tuned", "supervised from scratch"]
    page = (folder / "study" / "index.html").read_text()
    assert "The encoders" in page and "CKA of the layers" in page and "Accuracy along the interpolation" in page


def test_interpolation_ends_at_the_encoders(folder: Path) -> None:
    found = json.loads((folder / "study" / "comparison.json").read_text())
    accuracy = {row["model"]: row["accuracy"] for row in found["models"]}
    scratch = {row["model"] for row in found["models"] if row["role"] == "supervised"}
    for pair, extra in found["extras"].items():
        first, second = pair.split(" → ")
        if second in scratch:  # they share no start
            assert "interpolation" not in extra and "interpolation" in extra["skipped"]
            continue
        along = extra["interpolation"]["accuracy"]["imagenet"]
        assert (along[0], along[-1]) == (accuracy[first], accuracy[second])


def test_every_part_of_every_encoder(folder: Path) -> None:
    for path in (folder / "study").glob("*/results.json"):
        found = json.loads(path.read_text())
        assert set(found["accuracy"]) == {"imagenet", "rotated", "noisy", "blurred"}
        assert set(found["pruning"]["curves"]) == set(found["accuracy"]) and {row["shift"] for row in found["robustness"]["rows"]} == {
            "rotated",
            "noisy",
            "blurred",
        }
        assert set(found["skipped"]) <= {"ablation", "provenance"}  # the encoder may have no outlier features
        assert (path.parent / "index.html").is_file()
