"""The page of an interpretation: each figure with what it shows and how to read it; no verdict."""

from __future__ import annotations

import platform
from typing import Any

from torchprobe.analysis.concepts import SHUFFLED, UNITS
from torchprobe.analysis.intervals import LEVEL
from torchprobe.rendering.page import Fact, Page, Section, Table
from torchprobe.rendering.tables import Column, number
from torchprobe.studies.interpret.columns import (
    SKIPPED_COLUMNS,
)
from torchprobe.studies.interpret.measures import HEADLINE, IMAGENET, mean_robustness
from torchprobe.studies.interpret.result import Interpretation
from torchprobe.studies.interpret.sections import (
    SHOWN,
    ablation,
    accuracy,
    concepts,
    count,
    depth,
    directions,
    images,
    outlier_features,
    per_cent,
    pruning,
    representation,
    robustness,
)


def interpretation_page(found: Interpretation) -> Page:
    """Everything in one page."""
    r = found.results
    about = ", ".join(str(r["about"][key]) for key in ("role", "backbone", "pretraining") if r["about"].get(key))
    return Page(
        kind="interpret",
        title=found.name,
        summary=f"{about + ': ' if about else ''}{images(r['data'][IMAGENET]['images'])} through the encoder; outlier features, "
        "privileged directions, concepts and robustness, each beside what it is read against.",
        facts=facts(r),
        sections=[
            *representation(found),
            *outlier_features(r),
            *depth(r),
            *accuracy(r),
            *robustness(r),
            *directions(r),
            *pruning(r),
            *ablation(r),
            *concepts(r),
            *left_out(r),
            reading(r),
        ],
        footer=footer(r),
    )


def facts(r: dict[str, Any]) -> list[Fact]:
    """The numbers at the head."""
    k = r["kurtosis"]
    low, high = k["interval"]
    heads = [
        Fact(
            "Vector kurtosis",
            number(k["mean"], 3),
            f"{LEVEL:.0%} interval {number(low, 3)} … {number(high, 3)}; Gaussian {number(k['gaussian'], 3)}",
        ),
        Fact("Outlier features", number(len(r["outliers"]["indices"])), f"of {number(r['features'])}"),
    ]
    if "accuracy" in r:
        one = r["accuracy"][IMAGENET]
        heads.append(Fact("Accuracy", per_cent(one["accuracy"]), f"{number(one['images'])} images, {number(one['classes'])} classes"))
    if "robustness" in r:
        value, shifts = mean_robustness(r["robustness"])
        said = "–" if value is None else f"{value:+.1f}"
        beyond = ", extrapolated" if any(row["extrapolated"] for row in r["robustness"]["rows"]) else ""
        heads.append(Fact("Effective robustness", said, f"percentage points, mean over {count(shifts, 'shift')}{beyond}"))
    if "concepts" in r:
        c = r["concepts"]
        headline = next(row for row in c["sweep"][UNITS] if row["threshold"] == c["threshold"])
        null = next(row for row in c["sweep"][SHUFFLED] if row["threshold"] == c["threshold"])
        heads.append(
            Fact(
                "Unique concepts",
                number(headline["unique"]),
                f"AP ≥ {c['threshold']:g}, beyond chance; {null['unique']} with shuffled labels",
            )
        )
    return heads


def left_out(r: dict[str, Any]) -> list[Section]:
    """Sections without their input, what is not as expected in the sets, and images that could not be read."""
    sections = []
    remarks = [{"section": name, "why": remark} for name, data in r["data"].items() for remark in data["remarks"]]
    if remarks:
        columns = (Column("section", "set", "images", "text"), Column("why", "remark", "what the folders hold", "text"))
        text = "What the folders of the images hold beside, or instead of, what was expected."
        sections.append(Section("The sets of images", [text], tables=[Table(remarks, columns)]))
    if r["skipped"]:
        rows = [{"section": name, "why": why} for name, why in r["skipped"].items()]
        sections.append(Section("Not computed", ["These parts were left out."], tables=[Table(rows, SKIPPED_COLUMNS)]))
    unreadable = [
        {"section": f"{name}: {one['file']}", "why": one["reason"]} for name, data in r["data"].items() for one in data["skipped"]
    ]
    if unreadable:
        shown = unreadable[: 10 * SHOWN]
        more = f" The first {len(shown)} are listed." if len(shown) < len(unreadable) else ""
        columns = (Column("section", "file", "set and name", "text"), Column("why", "reason", "why it could not be read", "text"))
        text = f"Could not be read, and in none of the numbers: {images(len(unreadable))}.{more}"
        sections.append(Section(f"Left out: {images(len(unreadable))}", [text], tables=[Table(shown, columns)]))
    return sections


def reading(r: dict[str, Any]) -> Section:
    """Definitions and choices."""
    o = r["outliers"]
    return Section(
        "How to read this",
        terms=[
            (
                "vector kurtosis",
                "κ(h) = mean((h − mean h)⁴) / mean((h − mean h)²)² over the features of one vector; Pearson's, Gaussian = 3.",
            ),
            ("importance", "σ_i · mean_n |cos(v_i, h_n)| for the head W = Σ σ_i u_i v_iᵀ."),
            (
                "effective robustness",
                "accuracy − logit⁻¹(slope · logit(unshifted accuracy) + intercept), percentage points (Taori et al. 2020).",
            ),
            (
                "choices of ours",
                f"an outlier feature lies {o['sigma']:g} standard deviations out in {per_cent(o['frequency'])} of the images; the share "
                f"kept in pruning is of the rank of the head; a concept is encoded from AP {HEADLINE:g}, significant at 0.05 after Holm's "
                "correction; negatives are the images annotated for the concept's category; both signs are tried everywhere; half of the "
                "images, chosen by their names, measure importance and the other half evaluates; shifted images of a name that measured "
                "importance are left out of pruning.",
            ),
            (
                "what it does not say",
                "these numbers describe one encoder on these images. That two of them go along with each other across encoders does not "
                "show that one causes the other.",
            ),
        ],
    )


def footer(r: dict[str, Any]) -> list[str]:
    """Versions and settings."""
    known = {key: r["about"].get(key) for key in ("source", "checkpoint", "images", "limit", "broden")}
    settings = ", ".join(f"{key} {value}" for key, value in (known | r["settings"]).items() if value)
    return [f"torchprobe {r['torchprobe']}, torch {r['torch']}, Python {platform.python_version()}.", f"Settings: {settings}."]
