"""A comparison of several encoders, from their saved interpretations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from torchprobe.analysis.concepts import UNITS, concept_overlap
from torchprobe.analysis.resampling import rank_correlation
from torchprobe.common.records import Key, Record, encode
from torchprobe.common.runs import Clock, ProgressCallback
from torchprobe.studies.compare.modalities import Gap, GapFeature, gaps, modality
from torchprobe.studies.compare.pairs import Difference, difference, pairs_within
from torchprobe.studies.compare.saved import Saved, Summary, load_results

S = TypeVar("S")
T = TypeVar("T")

CORRELATED = (
    ("kurtosis", "robustness"),
    ("concepts", "robustness"),
    ("polysemanticity", "robustness"),
    ("kurtosis", "concepts"),
    ("kurtosis", "accuracy"),
)
"""The pairs of numbers whose rank correlation over encoders is computed."""


@dataclass(frozen=True, eq=False)
class Correlation(Record):
    """The rank correlation of two numbers over encoders; see :class:`torchprobe.analysis.RankCorrelation`.

    ``models`` is "all" or a role, ``x`` and ``y`` are fields of :class:`Summary`.
    """

    models: str
    x: str
    y: str
    rho: float
    p_value: float
    n: int


@dataclass(frozen=True, eq=False)
class Skipped(Record):
    """An encoder of the suite that was not run, and the reason."""

    model: str
    why: str


@dataclass(frozen=True, eq=False)
class LayerSimilarity(Record):
    """CKA of the layers of two encoders; see :class:`torchprobe.analysis.Similarity`.

    Attributes:
        matrix: (layers of ``a``, layers of ``b``).
        layers_a, layers_b: the names of the layers.
        a, b: the names of the encoders.
        images: number of images.
        batch_size: images in a batch.
    """

    matrix: Annotated[list[list[float]], Key("values")]
    layers_a: list[str]
    layers_b: list[str]
    a: str
    b: str
    images: int
    batch_size: int


@dataclass(frozen=True, eq=False)
class Interpolation(Record):
    """Measures along the interpolation of two encoders.

    Attributes:
        alphas: the share of the second encoder.
        accuracy: set → accuracy at each α.
        kurtosis: mean vector kurtosis at each α.
    """

    alphas: list[float]
    accuracy: dict[str, list[float]]
    kurtosis: list[float]


@dataclass(frozen=True, eq=False)
class PairMeasures(Record):
    """Measures that need two networks at the same time; ``skipped`` says why one is missing."""

    skipped: dict[str, str]
    cka: LayerSimilarity | None = None
    interpolation: Interpolation | None = None


@dataclass
class Comparison:
    """A comparison of several encoders.

    Attributes:
        models: one row per encoder.
        pairs: one row per pair within a backbone.
        correlations: rank correlations over all encoders, and over those of each role with at least three encoders.
        overlaps: common concepts of each pair of encoders, see :func:`torchprobe.analysis.concept_overlap`.
        saved: the interpretations.
        extras: pair → measures that need two networks at the same time.
        skipped: encoders that were not run, with the reason.
        remarks: how the inputs of the encoders differ.
        gaps: one row for each gap between two modalities of one model.
        gap_features: the features of each gap, that with the largest share first.
    """

    models: list[Summary]
    pairs: list[Difference]
    correlations: list[Correlation]
    overlaps: list[dict[str, Any]]
    saved: list[Saved] = field(default_factory=list)
    extras: dict[str, PairMeasures] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    gap_features: list[GapFeature] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        names = ("models", "pairs", "correlations", "overlaps", "extras", "skipped", "remarks", "gaps")
        return {name: encode(getattr(self, name)) for name in names if name != "gaps" or self.gaps}


def compare(
    folders: Sequence[str | os.PathLike[str]],
    *,
    extras: Mapping[str, PairMeasures] | None = None,
    skipped: Sequence[Skipped] = (),
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Compares saved interpretations.

    The numbers are compared as they are. Use the same images and concepts for all encoders; ``remarks`` say where they differ. If two
    encoders have seen different images, the intervals of their difference are over the common images.

    Args:
        folders: two or more, as :func:`torchprobe.studies.interpret.interpret` wrote them.
        extras: pair → the result of :func:`torchprobe.studies.suite.run_pair`.
        skipped: encoders that were not run.
        seed: of bootstrap and permutations.
        progress: called with a :class:`torchprobe.common.runs.Progress` before each part, and after each folder and each pair.

    Raises:
        FileNotFoundError, ValueError: a folder without results, or with damaged ones; fewer than two folders; a folder given twice.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs at least two interpretations, got {len(folders)}")
    places = [Path(folder).resolve() for folder in folders]
    if twice := [place for place in places if places.count(place) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    clock = Clock(progress, stages=1)  # the parts are unlike, so the time left is that of the present one
    saved = _with_distinct_names(list(_counted(clock, "reading", "folders", folders, load_results)))
    models = list(_counted(clock, "summaries", "encoders", saved, Saved.summary))
    pairs = list(_counted(clock, "pairs", "pairs", pairs_within(saved), lambda pair: difference(pair[0], pair[1], seed)))
    clock.start("gaps, correlations and concepts", 0, 0)
    between, gap_features = gaps(saved)
    concepts = {one.name: one.results.concepts.names[UNITS] for one in saved if one.results.concepts}
    return Comparison(
        models=models,
        pairs=pairs,
        correlations=_correlations(models, seed),
        overlaps=concept_overlap(concepts),
        saved=saved,
        extras=dict(extras or {}),
        skipped=list(skipped),
        remarks=_remarks(saved),
        gaps=between,
        gap_features=gap_features,
    )


def _counted(clock: Clock, stage: str, unit: str, items: Sequence[S], work: Callable[[S], T]) -> Iterator[T]:
    """The results of one part, each of which is reported."""
    clock.start(stage, 0, len(items), unit)
    for done, item in enumerate(items, 1):
        yield work(item)
        clock.tell(done)


def _with_distinct_names(saved: Sequence[Saved]) -> list[Saved]:
    """Interpretations of the same name get their folders in it."""
    names = [one.name for one in saved]
    return [one.called(f"{one.name} ({one.folder})") if names.count(one.name) > 1 else one for one in saved]


def _remarks(saved: Sequence[Saved]) -> list[str]:
    """How the inputs of the encoders differ."""
    remarks = []
    if other := [one.name for one in saved if one.kurtosis.keys() != saved[0].kurtosis.keys()]:
        remarks.append(f"{', '.join(other)} and {saved[0].name} have not seen the same images: their numbers differ for that reason too.")
    if any(one.results.given for one in saved) and any(name.startswith("row ") for one in saved for name in list(one.kurtosis)[:1]):
        remarks.append("Rows without names are paired by their position: row i of one file with row i of another of the same length.")
    remarks += _unlike(saved)
    concepts = [(one.name, one.results.concepts) for one in saved if one.results.concepts]
    if other := [name for name, found in concepts if (found.images, found.labels) != (concepts[0][1].images, concepts[0][1].labels)]:
        remarks.append(
            f"{', '.join(other)} and {concepts[0][0]} were not shown the same concepts: their counts differ for that reason too."
        )
    known = [one for one in saved if one.about("backbone")]
    if known and (unknown := [one.name for one in saved if not one.about("backbone")]):
        remarks.append(
            f"The backbone of {', '.join(unknown)} is unknown (--backbone), so no difference with "
            f"{', '.join(one.name for one in known)} is taken."
        )
    return remarks


def _unlike(saved: Sequence[Saved]) -> list[str]:
    """What decides a vector kurtosis beside the encoder, where it differs."""
    signs = {True: "no negative feature, as after a ReLU", False: "features of both signs"}
    properties = {
        "do not stand for the same kind of input": {one.name: modality(one) or "not said" for one in saved},
        "do not have the same width": {one.name: f"{one.results.features} features" for one in saved},
        "do not have the same signs": {one.name: signs[one.results.kurtosis.nonnegative] for one in saved},
    }
    remarks = []
    for what, found in properties.items():
        if len(set(found.values())) > 1:
            groups = {value: [name for name in found if found[name] == value] for value in found.values()}
            listed = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
            remarks.append(f"The representations {what} ({listed}). Their kurtosis differs for that reason too.")
    return remarks


def _correlations(models: Sequence[Summary], seed: int) -> list[Correlation]:
    """Over all encoders, and over those of each role."""
    groups = {"all": list(models)} | {role: [row for row in models if row.role == role] for role in dict.fromkeys(r.role for r in models)}
    rows = []
    for group, members in groups.items():
        if group == "" or (group != "all" and len(members) in (len(models), 0, 1, 2)):
            continue
        for x, y in CORRELATED:
            found = rank_correlation(_column(members, x), _column(members, y), seed=seed)
            if found.n >= 3:
                rows.append(Correlation(group, x, y, found.rho, found.p_value, found.n))
    return rows


def _column(models: Sequence[Summary], name: str) -> list[float]:
    """One number of each encoder, nan if missing."""
    return [float("nan") if row[name] is None else float(row[name]) for row in models]
