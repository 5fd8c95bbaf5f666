"""The page of an interpretation: each figure with what it shows and how to read it. It gives no verdict."""

from __future__ import annotations

import math
import platform

from torchprobe.analysis.baseline import IMAGENET
from torchprobe.analysis.concepts import SHUFFLED, UNITS
from torchprobe.analysis.resampling import LEVEL
from torchprobe.common.messages import counted
from torchprobe.rendering.page import Fact, Page, Section, Table
from torchprobe.rendering.tables import Column, number, percent
from torchprobe.studies.interpret.accuracy import accuracy_section, robustness_section
from torchprobe.studies.interpret.concepts import HEADLINE, concepts_section
from torchprobe.studies.interpret.directions import directions_section, pruning_section
from torchprobe.studies.interpret.representation import SHOWN, ablation_section, kurtosis_section, layers_section, outlier_section
from torchprobe.studies.interpret.results import Interpretation, Results

SKIPPED_COLUMNS = (Column("section", "section", "the missing section", "text"), Column("why", "why", "the missing input", "text"))


def interpretation_page(found: Interpretation) -> Page:
    """The whole page."""
    r = found.results
    about = ", ".join(str(r.about[key]) for key in ("role", "backbone", "pretraining") if r.about.get(key))
    sections = [
        kurtosis_section(r.kurtosis, found.kurtosis),
        outlier_section(r.outliers),
        r.layers and layers_section(r.layers),
        r.accuracy and accuracy_section(r.accuracy),
        r.robustness and robustness_section(r.robustness),
        r.directions and directions_section(r.directions),
        r.pruning and pruning_section(r.pruning),
        r.ablation and ablation_section(r.ablation),
        r.concepts and concepts_section(r.concepts),
        *left_out(r),
        reading(r),
    ]
    return Page(
        kind="interpret",
        title=found.name,
        summary=f"{about + ': ' if about else ''}{counted(r.data[IMAGENET].images, 'image')} through the encoder; outlier features, "
        "privileged directions, concepts and robustness, each with the values to compare it with.",
        facts=facts(r),
        sections=[section for section in sections if section],
        footer=footer(r),
    )


def facts(r: Results) -> list[Fact]:
    """The headline numbers."""
    low, high = (number(end, 3) for end in r.kurtosis.interval)
    interval = f"{LEVEL:.0%} interval {low} … {high}; Gaussian {number(r.kurtosis.gaussian, 3)}"
    heads = [
        Fact("Vector kurtosis", number(r.kurtosis.mean, 3), interval),
        Fact("Outlier features", number(len(r.outliers.indices)), f"of {number(r.features)}"),
    ]
    if r.accuracy:
        one = r.accuracy[IMAGENET]
        heads.append(Fact("Accuracy", percent(one.accuracy), f"{number(one.images)} images, {number(one.classes)} classes"))
    if r.robustness:
        mean, shifts = r.robustness.mean()
        extrapolated = ", extrapolated" if r.robustness.extrapolated else ""
        note = f"percentage points, mean over {counted(shifts, 'shift')}{extrapolated}"
        heads.append(Fact("Effective robustness", "–" if math.isnan(mean) else f"{mean:+.1f}", note))
    if r.concepts:
        unique, null = (r.concepts.headline(basis).unique for basis in (UNITS, SHUFFLED))
        note = f"AP ≥ {r.concepts.threshold:g}, beyond chance; {null} with shuffled labels"
        heads.append(Fact("Unique concepts", number(unique), note))
    return heads


def left_out(r: Results) -> list[Section]:
    """What is unexpected in the folders, sections without their input, and images that could not be read."""
    sections = []
    if remarks := [{"section": name, "why": remark} for name, data in r.data.items() for remark in data.remarks]:
        columns = (Column("section", "set", "images", "text"), Column("why", "remark", "what is unexpected", "text"))
        sections.append(
            Section("The sets of images", ["What is unexpected in the folders of the images."], tables=[Table(remarks, columns)])
        )
    if r.skipped:
        rows = [{"section": name, "why": why} for name, why in r.skipped.items()]
        sections.append(Section("Not computed", ["These sections were left out."], tables=[Table(rows, SKIPPED_COLUMNS)]))
    unreadable = [{"section": f"{name}: {one.file}", "why": one.reason} for name, data in r.data.items() for one in data.skipped]
    if unreadable:
        shown = unreadable[: 10 * SHOWN]
        more = f" The first {len(shown)} are listed." if len(shown) < len(unreadable) else ""
        columns = (Column("section", "file", "set and name", "text"), Column("why", "reason", "why it could not be read", "text"))
        text = f"{counted(len(unreadable), 'image')} could not be read and do not count in any number.{more}"
        sections.append(Section(f"Left out: {counted(len(unreadable), 'image')}", [text], tables=[Table(shown, columns)]))
    return sections


def reading(r: Results) -> Section:
    """Definitions and choices."""
    sigma, share = f"{r.outliers.sigma:g} standard deviations", percent(r.outliers.frequency)
    choices = (
        f"an outlier feature lies more than {sigma} from the mean of its vector in at least {share} of the images",
        "the share kept in pruning is a share of the rank of the head",
        f"a concept is encoded from AP {HEADLINE:g} on, if significant at 0.05 after Holm's correction",
        "negatives are the images annotated for the concept's category",
        "both signs of a direction are tried",
        "importance is measured on one half of the images, chosen by their names, and the other half is evaluated",
        "pruning leaves out shifted images with the name of an image on which importance was measured",
    )
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
            ("our choices", "; ".join(choices) + "."),
            (
                "what it does not say",
                "these numbers describe one encoder on these images. If two of them rise together across encoders, this does not show "
                "that one causes the other.",
            ),
        ],
    )


def footer(r: Results) -> list[str]:
    """Versions and settings."""
    known = {name: r.about.get(name) for name in ("source", "checkpoint", "images", "limit", "broden")}
    settings = ", ".join(f"{name} {value}" for name, value in (known | dict(r.settings)).items() if value)
    return [f"torchprobe {r.torchprobe}, torch {r.torch}, Python {platform.python_version()}.", f"Settings: {settings}."]
