"""Names of the analysis and its studies that were renamed still work, with a warning that says the new name."""

from __future__ import annotations

import importlib
from pathlib import Path

import interpret_sets as sets
import pytest
import torch

from torchprobe.analysis import Embeddings, effective_robustness, evaluate, mean_effective_robustness, robustness, summarize
from torchprobe.analysis.baseline import FITS, SHIFTS, Baseline
from torchprobe.datasets import labeled_folder
from torchprobe.studies.compare import load_results
from torchprobe.studies.interpret import interpret

ACCURACIES = {"imagenet": 60.0, "imagenet_r": 40.0, "imagenet_on_r_classes": 80.0}


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("torchprobe.analysis", "summarise", "summarize"),
        ("torchprobe.analysis", "centred", "centered"),
        ("torchprobe.analysis.kurtosis", "summarise", "summarize"),
        ("torchprobe.analysis.kurtosis", "centred_kurtosis", "centered_kurtosis"),
        ("torchprobe.analysis.directions", "centred", "centered"),
        ("torchprobe.analysis.evaluation", "right", "is_correct"),
        ("torchprobe.encoders.suite", "Row", "SuiteRow"),
    ],
)
def test_functions(module: str, old: str, new: str) -> None:
    room = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is deprecated, use {module}\.{new}"):
        found = getattr(room, old)
    assert found is getattr(room, new)


def test_attributes() -> None:
    embeddings = Embeddings(torch.eye(3), torch.tensor([0, 1, -1]), ["a", "b", "c"], provenance={"encoder": "e"})
    with pytest.warns(DeprecationWarning, match="Embeddings.labelled is deprecated, use labeled"):
        assert embeddings.labelled().ids == ["a", "b"]
    with pytest.warns(DeprecationWarning, match="Embeddings.made is deprecated, use provenance"):
        assert embeddings.made == {"encoder": "e"}
    with pytest.warns(DeprecationWarning, match="Evaluation.unlabelled is deprecated, use unlabeled"):
        assert evaluate(torch.eye(3), embeddings).unlabelled == 1
    summary = summarize(torch.randn(5, 8))
    with pytest.warns(DeprecationWarning, match="KurtosisSummary.centred is deprecated, use centered"):
        assert summary.centred == summary.centered
    assert summary.as_dict()["centred"] == summary.centered  # the key of files stays
    with pytest.warns(DeprecationWarning, match="Fit.x is deprecated, use imagenet_classes"):
        assert FITS["imagenet_r", "subset"].x == "subset"


def test_arguments() -> None:
    with pytest.warns(DeprecationWarning, match="Embeddings: the argument 'made' is deprecated, use 'provenance'"):
        assert Embeddings(torch.eye(2), torch.zeros(2, dtype=torch.int64), ["a", "b"], made={"k": 1}).provenance == {"k": 1}  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="robustness: the argument 'x' is deprecated, use 'imagenet_classes'"):
        assert robustness(ACCURACIES, x="subset") == robustness(ACCURACIES, imagenet_classes="subset")  # type: ignore[call-arg]
    every = ACCURACIES | dict.fromkeys(SHIFTS, 30.0)
    with pytest.warns(DeprecationWarning, match="mean_effective_robustness: the argument 'x' is deprecated"):
        assert mean_effective_robustness(every, x="full") == mean_effective_robustness(every)  # type: ignore[call-arg]
    baseline = Baseline({"imagenet": [60, 70, 80], "imagenet_r": [20, 30, 45]})
    with pytest.warns(DeprecationWarning, match=r"Baseline\.fit: the argument 'x' is deprecated"):
        assert baseline.fit("imagenet_r", x="full") == baseline.fit("imagenet_r")  # type: ignore[call-arg]


def test_the_short_name_of_effective_robustness_stays() -> None:
    """Without a warning: the test suite turns warnings into errors."""
    short = effective_robustness(40.0, 80.0, shift="imagenet_r", x="subset")
    assert short == effective_robustness(40.0, 80.0, shift="imagenet_r", imagenet_classes="subset")


def test_studies(tmp_path: Path) -> None:
    images = labeled_folder(sets.write_classes(tmp_path / "images", each=3), names=sets.CLASSES)
    model = sets.encoder()
    with pytest.warns(DeprecationWarning, match="interpret: the argument 'x' is deprecated, use 'imagenet_classes'"):
        found = interpret(model, images, tmp_path / "out", head=sets.head(model), layer_images=0, x="subset")  # type: ignore[call-arg]
    assert found.results.pruning is not None and found.results.pruning.imagenet_classes == "subset"
    with pytest.warns(DeprecationWarning, match="Interpretation.right is deprecated, use correct"):
        assert found.right == found.correct and len(found.correct) == 9
    saved = load_results(tmp_path / "out")
    with pytest.warns(DeprecationWarning, match="Saved.right is deprecated, use correct"):
        assert saved.right == saved.correct == dict(zip(found.ids, found.correct, strict=True))
    with pytest.warns(DeprecationWarning, match="Saved.made is deprecated, use provenance"):
        assert saved.made() == saved.provenance()
