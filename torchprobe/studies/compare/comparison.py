"""Several encoders beside each other, from their saved interpretations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchprobe.analysis.concepts import UNITS, concept_overlap
from torchprobe.analysis.correlation import rank_correlation
from torchprobe.studies.compare.pairs import difference, pairs_within
from torchprobe.studies.compare.saved import Saved, load_results

CORRELATED = (
    ("kurtosis", "robustness"),
    ("concepts", "robustness"),
    ("polysemanticity", "robustness"),
    ("kurtosis", "concepts"),
    ("kurtosis", "accuracy"),
)
"""Which numbers are asked whether they rise together over encoders."""


@dataclass
class Comparison:
    """What several encoders come to beside each other.

    Attributes:
        models: one row for each, see :meth:`Saved.summary`.
        pairs: one row for each pair within a backbone, see :func:`difference`.
        correlations: rank correlations over all encoders, and over those of each role with at least three.
        overlaps: concepts shared, for each pair of encoders.
        extras: pair → what was computed with both networks at hand: ``cka`` and ``interpolation``.
        skipped: encoders that are not there, with the reason.
        remarks: in what the encoders were not shown the same.
    """

    models: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    correlations: list[dict[str, Any]]
    overlaps: list[dict[str, Any]]
    saved: list[Saved] = field(default_factory=list)
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "models": self.models,
            "pairs": self.pairs,
            "correlations": self.correlations,
            "overlaps": self.overlaps,
            "extras": self.extras,
            "skipped": self.skipped,
            "remarks": self.remarks,
        }


def compare(
    folders: Sequence[str | os.PathLike[str]],
    *,
    extras: Mapping[str, dict[str, Any]] | None = None,
    skipped: Sequence[Mapping[str, str]] = (),
    seed: int = 0,
) -> Comparison:
    """Puts saved interpretations beside each other.

    Numbers are compared as they are: it is for the caller to have used the same images and concepts for all, and ``remarks`` say where
    that is not so. Where two have seen other images, the intervals of their difference are over those that both have seen.

    Args:
        folders: two or more, as :func:`torchprobe.studies.interpret.interpret` wrote them.
        extras: pair → what :func:`torchprobe.studies.suite_pairs.run_pair` found.
        skipped: encoders that are not there: ``model`` and ``why``.
        seed: of bootstrap and permutations.

    Raises:
        FileNotFoundError, ValueError: a folder without results, or with damaged ones; fewer than two; one twice.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison takes at least two interpretations, got {len(folders)}")
    places = [Path(folder).resolve() for folder in folders]
    if twice := [place for place in places if places.count(place) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    saved = _told_apart([load_results(folder) for folder in folders])
    models = [one.summary() for one in saved]
    concepts = {one.name: one.results["concepts"]["names"][UNITS] for one in saved if "concepts" in one.results}
    return Comparison(
        models=models,
        pairs=[difference(one, other, seed) for one, other in pairs_within(saved)],
        correlations=_correlations(models, seed),
        overlaps=concept_overlap(concepts),
        saved=saved,
        extras=dict(extras or {}),
        skipped=[dict(one) for one in skipped],
        remarks=_remarks(saved),
    )


def _told_apart(saved: Sequence[Saved]) -> list[Saved]:
    """Those of one name with their folders in it."""
    names = [one.name for one in saved]
    return [one.called(f"{one.name} ({one.folder})") if names.count(one.name) > 1 else one for one in saved]


def _remarks(saved: Sequence[Saved]) -> list[str]:
    """In what the encoders were not shown the same."""
    remarks = []
    if other := [one.name for one in saved if one.kurtosis.keys() != saved[0].kurtosis.keys()]:
        remarks.append(f"{', '.join(other)} and {saved[0].name} have not seen the same images: their numbers differ for that reason too.")
    concepts = [(one.name, one.results["concepts"]) for one in saved if "concepts" in one.results]
    if other := [name for name, found in concepts if any(found[key] != concepts[0][1][key] for key in ("images", "labels"))]:
        remarks.append(f"{', '.join(other)} and {concepts[0][0]} were not shown the same concepts: their counts differ too.")
    return remarks


def _correlations(models: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Over all encoders, and over those of each role."""
    groups = {"all": list(models)} | {
        role: [row for row in models if row["role"] == role] for role in dict.fromkeys(r["role"] for r in models)
    }
    rows = []
    for group, members in groups.items():
        if group == "" or (group != "all" and len(members) in (len(models), 0, 1, 2)):
            continue
        for x, y in CORRELATED:
            found = rank_correlation([_number(row[x]) for row in members], [_number(row[y]) for row in members], seed=seed)
            if found.n >= 3:
                rows.append({"models": group, "x": x, "y": y, "rho": found.rho, "p_value": found.p_value, "n": found.n})
    return rows


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
