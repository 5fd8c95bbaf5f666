"""Tables of accuracies: a baseline, and the standard models. Texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzz.target import Target
from torchprobe.analysis import Baseline
from torchprobe.analysis import standard_models as standard
from torchprobe.datasets import DatasetError, text_file

_LINES = ["model,imagenet,imagenet_v2,noisy,remark"] + [f"model {i},{40 + 5 * i},{30 + 5 * i + i % 2},{20 + 4 * i},text" for i in range(8)]


def _make(folder: Path) -> None:
    (folder / "baseline.csv").write_text("\n".join(_LINES) + "\n")


def _read(folder: Path) -> Any:
    found = Baseline.from_csv(folder / "baseline.csv")
    return (
        found.models,
        {name: values.tolist() for name, values in found.accuracies.items()},
        [_fit(found, shift) for shift in found.shifts],
    )


def _fit(found: Baseline, shift: str) -> Any:
    try:
        return str(found.fit(shift)), found.points(shift)
    except ValueError as error:  # too few models are left
        return str(error)


def _make_standard(folder: Path) -> None:
    (folder / "standard.csv").write_bytes(Path(standard.__file__).with_name("standard_models.csv").read_bytes())


def _read_standard(folder: Path) -> Any:
    found = Baseline.from_csv(folder / "standard.csv", minimum=55)
    return found.models, {name: values.tolist() for name, values in found.accuracies.items()}


def _make_texts(folder: Path) -> None:
    (folder / "a.txt").write_text("a cat\n\na dog\n")
    (folder / "a.jsonl").write_text('{"text": "a cat", "id": 7}\n"a dog"\n{"caption": "x"}\n')


def _read_texts(folder: Path) -> Any:
    return [[texts.name(path) for path in texts.paths] for texts in (text_file(folder / "a.txt"), text_file(folder / "a.jsonl"))]


TARGETS = [
    Target("baseline", {"baseline.csv": "csv"}, _make, _read, (ValueError,)),
    Target("standard-models", {"standard.csv": "csv"}, _make_standard, _read_standard, (ValueError,)),
    Target("texts", {"a.txt": "raw", "a.jsonl": "lines"}, _make_texts, _read_texts, (DatasetError,)),
]
