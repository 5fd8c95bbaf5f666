"""Interpretations, read from their folders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchprobe.analysis.baseline import IMAGENET
from torchprobe.analysis.concepts import UNITS
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.common.checked import read_checked
from torchprobe.common.csv_files import read_rows
from torchprobe.common.deprecation import RenamedAttribute
from torchprobe.common.facts import file_digests
from torchprobe.common.folders import record
from torchprobe.common.messages import counted
from torchprobe.common.records import Record, decode
from torchprobe.studies.interpret.results import FORMAT, READ_BACK, TABLE_DIGESTS, Results


@dataclass(frozen=True, eq=False)
class Summary(Record):
    """The numbers of one encoder: one row of a comparison. A number that was not computed is nan, or None for a count.

    ``accuracy_low`` to ``accuracy_high`` is over images. ``robustness_low`` to ``robustness_high`` is the interval of the distance from the
    line, or of the mean distance under several shifts; for several, it is nan in results of earlier versions.
    """

    model: str
    role: str
    backbone: str
    pretraining: str
    features: int
    kurtosis: float
    kurtosis_low: float
    kurtosis_high: float
    kurtosis_median: float
    outlier_features: int
    accuracy: float
    robustness: float
    robustness_note: str
    shifts: int | None
    extrapolated: bool | None
    concepts: int | None
    polysemanticity: float
    modality: str | None = None
    accuracy_low: float = math.nan
    accuracy_high: float = math.nan
    robustness_low: float = math.nan
    robustness_high: float = math.nan


@dataclass(frozen=True)
class Saved:
    """One interpretation on disk.

    Attributes:
        folder: of the interpretation.
        results: the content of ``results.json``.
        kurtosis: image → vector kurtosis.
        correct: image → whether the head is correct; empty without a head or labels.
        correct_under_shift: shift → image → the same; empty in results of earlier versions.
    """

    folder: Path
    results: Results
    kurtosis: dict[str, float]
    correct: dict[str, bool] = field(default_factory=dict)
    correct_under_shift: dict[str, dict[str, bool]] = field(default_factory=dict)

    right = RenamedAttribute("correct")
    made = RenamedAttribute("provenance")

    @property
    def name(self) -> str:
        """The name in the suite, or else the name of the encoder."""
        return self.results.title

    def called(self, name: str) -> Saved:
        """The same interpretation with another name."""
        return replace(self, results=replace(self.results, about={**self.results.about, "name": name}))

    def about(self, key: str) -> str:
        """A fact such as role or backbone; empty if unknown."""
        return str(self.results.about.get(key) or "")

    def embeddings(self) -> Embeddings | None:
        """The representations of the unshifted images; None if they were not kept."""
        path = self.folder / "embeddings" / f"{IMAGENET}.safetensors"
        return Embeddings.load(path) if path.is_file() else None

    def provenance(self) -> dict[str, Any]:
        """The facts that the representations and the head depend on."""
        files = sorted((self.folder / "embeddings").glob("*.safetensors"))
        sets = {path.stem: Embeddings.load(path).provenance for path in files}
        return {"sets": sets, "head": self.results["head"], "source": self.about("source")}

    def robustness(self) -> dict[str, float]:
        """Shift → effective robustness, percentage points."""
        return self.results.robustness.by_shift() if self.results.robustness else {}

    def concepts(self) -> set[str] | None:
        """The names of the concepts that units encode; None if they were not computed."""
        return set(self.results.concepts.names[UNITS]) if self.results.concepts else None

    def summary(self) -> Summary:
        """The row of this encoder in a comparison."""
        r = self.results
        robustness, shifts, note = math.nan, None, ""
        accuracy_ends, robustness_ends = (r.accuracy[IMAGENET].interval if r.accuracy else (math.nan, math.nan)), (math.nan, math.nan)
        if r.robustness:
            robustness, shifts = r.robustness.mean()
            single = [(row.line_low, row.line_high) for row in r.robustness.rows if row.shift in r.robustness.by_shift()]
            robustness_ends = single[0] if len(single) == 1 else r.robustness.mean_line_interval
            note = f"{r.robustness.accuracies}, {counted(shifts, 'shift')}{', extrapolated' if r.robustness.extrapolated else ''}"
        units = r.concepts.headline(UNITS) if r.concepts else None
        return Summary(
            model=self.name,
            role=self.about("role"),
            backbone=self.about("backbone"),
            pretraining=self.about("pretraining"),
            features=r.features,
            kurtosis=r.kurtosis.mean,
            kurtosis_low=r.kurtosis.interval[0],
            kurtosis_high=r.kurtosis.interval[1],
            kurtosis_median=r.kurtosis.median,
            outlier_features=len(r.outliers.indices),
            accuracy=r.accuracy[IMAGENET].accuracy if r.accuracy else math.nan,
            robustness=robustness,
            robustness_note=note,
            shifts=shifts,
            extrapolated=r.robustness.extrapolated if r.robustness else None,
            concepts=units.unique if units else None,
            polysemanticity=units.polysemanticity if units else math.nan,
            modality=self.about("modality") or None,
            accuracy_low=accuracy_ends[0],
            accuracy_high=accuracy_ends[1],
            robustness_low=robustness_ends[0],
            robustness_high=robustness_ends[1],
        )


def load_results(folder: str | os.PathLike[str]) -> Saved:
    """Reads what :func:`torchprobe.studies.interpret.interpret` wrote into ``folder``.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: the results are damaged, or of another format; the message names the file.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no results in {folder}: expected {path.name}, as torchprobe interpret writes it")
    if (run := record(folder)) is not None and not run["finished"]:
        raise ValueError(f"the run in {folder} is unfinished: continue it with --resume")
    plain = read_checked(path, required=False)  # earlier versions wrote no checksum
    if plain.get("format") != FORMAT:
        raise ValueError(f"{path} has format {plain.get('format')!r}, this version reads {FORMAT}")
    try:
        saved = Saved(folder, decode(Results, plain), {})
        saved.summary()
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, digest in _digests(path, plain).items():
        if file_digests([folder / name])[0] != digest:
            raise ValueError(f"{folder / name} is damaged: it is not the table that belongs to {path}; run again with --resume")
    kurtosis, correct = _by_image(folder / "kurtosis.csv")
    return replace(saved, kurtosis=kurtosis, correct=correct, correct_under_shift=_under_shift(folder / "correct.csv"))


def _digests(path: Path, plain: dict[str, Any]) -> dict[str, Any]:
    """The digests of the tables that belong to the results, by the name of the file; none of earlier versions."""
    found = plain.get(TABLE_DIGESTS, {})
    if not isinstance(found, dict) or not found.keys() <= {f"{name}.csv" for name in READ_BACK}:
        raise ValueError(f"{path} is damaged: {TABLE_DIGESTS!r} names other tables than {' and '.join(READ_BACK)}")
    return found


def _under_shift(path: Path) -> dict[str, dict[str, bool]]:
    found: dict[str, dict[str, bool]] = {}
    for line, row in _rows(path, ("images", "image", "right")):
        if row["right"] not in ("True", "False"):
            raise ValueError(f"{path} is damaged: line {line}: right is {row['right']!r:.80}, not True or False")
        of_shift = found.setdefault(row["images"], {})
        if row["image"] in of_shift:
            raise ValueError(f"{path} is damaged: line {line}: the image {row['image']!r:.80} is there twice")
        of_shift[row["image"]] = row["right"] == "True"
    return found


def _by_image(path: Path) -> tuple[dict[str, float], dict[str, bool]]:
    kurtosis, right = dict[str, float](), dict[str, bool]()
    for line, row in _rows(path, ("image", "vector_kurtosis")):
        image, decision = row["image"], row.get("right", "")
        if image in kurtosis:
            raise ValueError(f"{path} is damaged: line {line}: the image {image!r:.80} is there twice")
        if decision not in ("", "True", "False"):
            raise ValueError(f"{path} is damaged: line {line}: right is {decision!r:.80}, not True or False")
        try:
            kurtosis[image] = float(row["vector_kurtosis"] or "nan")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: line {line}: {error}") from error
        if decision:
            right[image] = decision == "True"
    return kurtosis, right


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table as mappings; none if the file does not exist."""
    if not path.is_file():
        return
    lines = read_rows(path)
    _, header = next(lines, (1, []))
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"{path} is damaged: it lacks the column {missing[0]}")
    for line, values in lines:
        if len(values) != len(header):
            raise ValueError(f"{path} is damaged: line {line} has {len(values)} cells, the first line {len(header)}")
        yield line, dict(zip(header, values, strict=True))
