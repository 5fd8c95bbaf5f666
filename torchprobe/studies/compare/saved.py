"""Interpretations read back from their folders."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchprobe.analysis.embeddings import Embeddings
from torchprobe.studies.interpret.measures import IMAGENET
from torchprobe.studies.interpret.result import FORMAT

_BOUND = 1 << 28  # bytes of a results file that is read


@dataclass(frozen=True)
class Saved:
    """One interpretation on disk.

    Attributes:
        folder: where it lies.
        results: what ``results.json`` says.
        kurtosis: image → vector kurtosis.
    """

    folder: Path
    results: dict[str, Any]
    kurtosis: dict[str, float]

    @property
    def name(self) -> str:
        """What the suite calls it, else the name of the encoder."""
        return str(self.results["about"].get("name") or self.results["name"])

    def about(self, key: str) -> str:
        """A fact such as role or backbone, or nothing."""
        return str(self.results["about"].get(key) or "")

    def embeddings(self) -> Embeddings | None:
        """The representations of the unshifted images, if they were kept."""
        path = self.folder / "embeddings" / f"{IMAGENET}.safetensors"
        return Embeddings.load(path) if path.is_file() else None

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
            "extrapolated": None,
            "concepts": None,
            "polysemanticity": None,
        }
        if "robustness" in r:
            rows = [one for one in r["robustness"]["rows"] if one["shift"] != "mean" and one["effective_robustness"] is not None]
            row["robustness"] = math.fsum(one["effective_robustness"] for one in rows) / len(rows) if rows else None
            row["extrapolated"] = any(one["extrapolated"] for one in rows)
            row["shifts"] = len(rows)
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
    return Saved(folder, results, _kurtosis(folder / "kurtosis.csv"))


def _kurtosis(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return {row["image"]: float(row["vector_kurtosis"] or "nan") for row in csv.DictReader(file)}
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
