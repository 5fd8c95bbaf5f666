"""Interpretations read back from their folders."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchprobe.analysis.embeddings import Embeddings
from torchprobe.common.messages import counted
from torchprobe.studies.interpret.measures import IMAGENET, mean_robustness
from torchprobe.studies.interpret.result import FORMAT

_BOUND = 1 << 28  # bytes of a results file that is read


@dataclass(frozen=True)
class Saved:
    """One interpretation on disk.

    Attributes:
        folder: where it lies.
        results: what ``results.json`` says.
        kurtosis: image → vector kurtosis.
        right: image → whether the head is right; empty without head or labels.
    """

    folder: Path
    results: dict[str, Any]
    kurtosis: dict[str, float]
    right: dict[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the suite calls it, else the name of the encoder."""
        return str(self.results["about"].get("name") or self.results["name"])

    def called(self, name: str) -> Saved:
        """The same under another name."""
        return replace(self, results={**self.results, "about": {**self.results["about"], "name": name}})

    def about(self, key: str) -> str:
        """A fact such as role or backbone, or nothing."""
        return str(self.results["about"].get(key) or "")

    def embeddings(self) -> Embeddings | None:
        """The representations of the unshifted images, if they were kept."""
        path = self.folder / "embeddings" / f"{IMAGENET}.safetensors"
        return Embeddings.load(path) if path.is_file() else None

    def made(self) -> dict[str, Any]:
        """What the representations and the head were made from."""
        sets = {name: Embeddings.load(path).made for name, path in self._sets().items()}
        return {"sets": sets, "head": self.results["head"], "source": self.about("source")}

    def _sets(self) -> dict[str, Path]:
        return {path.stem: path for path in sorted((self.folder / "embeddings").glob("*.safetensors"))}

    def robustness(self) -> dict[str, float]:
        """Shift → effective robustness, percentage points."""
        rows = self.results["robustness"]["rows"] if "robustness" in self.results else []
        return {
            row["shift"]: row["effective_robustness"] for row in rows if row["shift"] != "mean" and row["effective_robustness"] is not None
        }

    def summary(self) -> dict[str, Any]:
        """One row of the comparison: None for what was not computed."""
        r = self.results
        row: dict[str, Any] = {
            "model": self.name,
            "role": self.about("role"),
            "backbone": self.about("backbone"),
            "pretraining": self.about("pretraining"),
            "features": r["features"],
            "kurtosis": r["kurtosis"]["mean"],
            "kurtosis_low": r["kurtosis"]["interval"][0],
            "kurtosis_high": r["kurtosis"]["interval"][1],
            "kurtosis_median": r["kurtosis"]["median"],
            "outlier_features": len(r["outliers"]["indices"]),
            "accuracy": r["accuracy"][IMAGENET]["accuracy"] if "accuracy" in r else None,
            "robustness": None,
            "robustness_note": "",
            "shifts": None,
            "extrapolated": None,
            "concepts": None,
            "polysemanticity": None,
        }
        if "robustness" in r:
            row["robustness"], row["shifts"] = mean_robustness(r["robustness"])
            row["extrapolated"] = any(one["extrapolated"] for one in r["robustness"]["rows"])
            beyond = ", extrapolated" if row["extrapolated"] else ""
            row["robustness_note"] = f"{r['robustness']['accuracies']}, {counted(row['shifts'], 'shift')}{beyond}"
        if "concepts" in r:
            headline = next(one for one in r["concepts"]["sweep"]["units"] if one["threshold"] == r["concepts"]["threshold"])
            row |= {"concepts": headline["unique"], "polysemanticity": headline["polysemanticity"]}
        return row


def load_results(folder: str | os.PathLike[str]) -> Saved:
    """What :func:`torchprobe.studies.interpret.interpret` wrote into ``folder``.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged, or of another format; names the file.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no results in {folder}: expected {path.name}, as torchprobe interpret writes it")
    if path.stat().st_size > _BOUND:
        raise ValueError(f"{path} is larger than any results are")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"{path} has format {found!r}, this version reads {FORMAT}")
    if missing := [key for key in ("name", "about", "features", "kurtosis", "outliers", "data") if key not in results]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    saved = Saved(folder, results, *_by_image(folder / "kurtosis.csv"))
    try:
        saved.summary()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return saved


def _by_image(path: Path) -> tuple[dict[str, float], dict[str, bool]]:
    if not path.is_file():
        return {}, {}
    with open(path, newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.DictReader(file))
            kurtosis = {row["image"]: float(row["vector_kurtosis"] or "nan") for row in rows}
            return kurtosis, {row["image"]: row["right"] == "True" for row in rows if row.get("right")}
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
