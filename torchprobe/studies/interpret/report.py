"""An interpretation for people: a page, files in its folder, and tables in the terminal.

The page shows each figure with what it shows and how to read it. It gives no verdict.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from torchprobe.analysis.positions import SEVERAL
from torchprobe.analysis.provenance.results import CHANGE_COLUMNS, PARAMETER_COLUMNS, PART_COLUMNS, first
from torchprobe.common.checked import write_checked
from torchprobe.common.facts import file_digests
from torchprobe.common.messages import counted
from torchprobe.rendering.latex import write_latex
from torchprobe.rendering.page import Page, Section, Table
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.tables import Column, Row, plain_table, shown, shown_columns, text, write_csv
from torchprobe.rendering.wording import worded, worded_columns, worded_page, worded_rows
from torchprobe.studies.interpret.accuracy import ACCURACY_COLUMNS, ROBUSTNESS_COLUMNS, accuracy_rows, accuracy_section, robustness_section
from torchprobe.studies.interpret.concepts import CONCEPT_COLUMNS, HEADLINE, concepts_section
from torchprobe.studies.interpret.directions import DIRECTION_COLUMNS, by_importance, directions_section, pruning_section
from torchprobe.studies.interpret.figures import Robust, robustness_pictures, write_figures
from torchprobe.studies.interpret.headline import MISSING_COLUMNS, facts, measured
from torchprobe.studies.interpret.interpretation import Interpretation
from torchprobe.studies.interpret.provenance import provenance_section
from torchprobe.studies.interpret.representation import (
    ABLATION_COLUMNS,
    SHOWN,
    ablation_section,
    kurtosis_section,
    layers_section,
    outlier_section,
)
from torchprobe.studies.interpret.results import READ_BACK, TABLE_DIGESTS, Results
from torchprobe.studies.scan_report import VECTOR, layer_columns, with_vectors

TABLES = (
    *("kurtosis", "correct", "features", "layers", "accuracy", "robustness", "directions", "pruning", "ablation", "concepts"),
    *("provenance-parts", "provenance-parameters", "provenance-changes"),
)
"""The names of all CSV files."""

SHOWN_FEATURES, PRINTED = 8, 3


# -- files ---------------------------------------------------------------------------------------------------------------


def write(found: Interpretation) -> dict[str, Path]:
    """Writes ``results.json``, tables as CSV and LaTeX, figures as PDF, SVG and PNG, and the page; returns the paths by kind.

    Each file replaces an older one at once. ``results.json`` comes last, with a checksum and the digests of the tables that a comparison
    reads: where it fits, the run is complete.
    """
    files = paths(found)
    if files["results"].is_file():  # tables of an earlier run with more inputs do not belong to this run
        for name in set(TABLES) - tables(found).keys():
            for suffix in ("csv", "tex"):
                (found.folder / f"{name}.{suffix}").unlink(missing_ok=True)
    for name, rows in tables(found).items():
        write_csv(rows, files[name])
    for name, (rows, columns) in latex_tables(found).items():
        unit = found.results.unit
        write_latex(worded_rows(rows, unit), worded_columns(columns, unit), found.folder / f"{name}.tex", found.name)
    page = worded_page(interpretation_page(found), found.results.unit)
    write_figures(files["figures"], [picture for section in page.sections for picture in section.pictures])
    write_page(page, files["page"])
    read_back = [files[name] for name in READ_BACK if name in files]
    digests = dict(zip([path.name for path in read_back], file_digests(read_back), strict=True))
    write_checked(files["results"], {**found.results, TABLE_DIGESTS: digests})
    return files


def paths(found: Interpretation) -> dict[str, Path]:
    """The paths of the files of an interpretation, by kind; the page last."""
    folder = found.folder
    csv = {name: folder / f"{name}.csv" for name in tables(found)}
    return {"results": folder / "results.json", **csv, "figures": folder / "figures", "page": folder / "index.html"}


def tables(found: Interpretation) -> dict[str, Sequence[Row]]:
    """The rows of each CSV file, by its name."""
    r = found.results
    images = zip(found.ids, found.kurtosis, found.peaks, found.correct or [None] * len(found.ids), strict=True)
    rows: dict[str, Sequence[Row]] = {
        "kurtosis": [{"image": name, "vector_kurtosis": kappa, "peak": peak, "right": correct} for name, kappa, peak, correct in images],
        "features": r.outliers.rows,
    }
    if found.correct_under_shift:
        rows["correct"] = [
            {"images": name, "image": image, "right": right}
            for name, each in found.correct_under_shift.items()
            for image, right in each.items()
        ]
    if r.layers:
        rows["layers"] = r.layers.rows
    if r.accuracy:
        rows["accuracy"] = accuracy_rows(r.accuracy)
    if r.robustness:
        rows["robustness"] = r.robustness.rows
    if r.directions:
        rows["directions"] = r.directions.rows()
    if r.pruning:
        rows["pruning"] = r.pruning.rows()
    if r.ablation:
        rows["ablation"] = r.ablation.rows
    if r.concepts:
        rows["concepts"] = r.concepts.rows()
    if r.provenance and (origin := r.provenance.found):
        parts: dict[str, Sequence[Row]] = {"parts": origin.parts, "parameters": origin.parameters, "changes": origin.changes}
        rows |= {f"provenance-{name}": each for name, each in parts.items() if each}
    return rows


def latex_tables(found: Interpretation) -> dict[str, tuple[Sequence[Row], Sequence[Column]]]:
    """The rows and columns of each table for a paper, by the name of its CSV file. Numbers are rounded; the CSV has all digits."""
    r = found.results
    made: dict[str, tuple[Sequence[Row], Sequence[Column]]] = {"features": (r.outliers.rows[:SHOWN], r.outliers.columns)}
    if r.layers:
        made["layers"] = with_vectors(r.layers.rows), layer_columns(VECTOR)
    if r.accuracy:
        made["accuracy"] = accuracy_rows(r.accuracy), ACCURACY_COLUMNS
    if r.robustness and r.robustness.rows:
        made["robustness"] = r.robustness.rows, ROBUSTNESS_COLUMNS
    if r.directions:
        made["directions"] = by_importance(r.directions.head)[:SHOWN], DIRECTION_COLUMNS
    if r.ablation:
        made["ablation"] = r.ablation.rows, ABLATION_COLUMNS
    if r.concepts:
        made["concepts"] = r.concepts.headline_rows(), CONCEPT_COLUMNS
    if r.provenance and (origin := r.provenance.found):
        made["provenance-parts"] = first(origin.parts, PRINTED), PART_COLUMNS
        made["provenance-parameters"] = first(origin.parameters, PRINTED), PARAMETER_COLUMNS
        made["provenance-changes"] = origin.changes, CHANGE_COLUMNS
    return made


# -- the terminal --------------------------------------------------------------------------------------------------------


def print_interpretation(found: Interpretation, out: Console) -> None:
    """The headline numbers, a table for each section, and what was left out."""
    r = found.results
    out.print(text(found.name, "bold"))
    table = plain_table("", "", "")
    for fact in facts(r):
        table.add_row(text(fact.label), text(fact.value, "bold"), text(worded(fact.note, r.unit), "dim"))
    out.print(table)
    if rows := r.outliers.rows[: min(SHOWN_FEATURES, len(r.outliers.indices))]:
        print_rows("Outlier features", r.outliers.columns, rows, out)
    if r.accuracy:
        print_rows("Accuracy", ACCURACY_COLUMNS, accuracy_rows(r.accuracy), out)
    if r.robustness:
        print_rows("Effective robustness", ROBUSTNESS_COLUMNS, r.robustness.rows, out)
    if r.directions:
        print_rows(f"The first {PRINTED} directions, by importance", DIRECTION_COLUMNS, by_importance(r.directions.head)[:PRINTED], out)
    if r.ablation:
        print_rows("Without the outlier features", ABLATION_COLUMNS, r.ablation.rows, out)
    if r.concepts:
        print_rows(f"Concepts, AP ≥ {r.concepts.threshold:g}", CONCEPT_COLUMNS, r.concepts.headline_rows(), out)
    if r.provenance and r.provenance.found:
        out.print(text("Where the outlier features come from", "bold"))
        out.print(text(worded(r.provenance.found.summary(), r.unit)))
    for name, data in r.data.items():
        for remark in data.remarks:
            out.print(text(f"{name}: {remark}", "dim"))
        if data.skipped:
            out.print(text(f"{name}: {counted(len(data.skipped), r.unit)} left out because they could not be read", "dim"))
    for remark in remarks(r):
        out.print(text(worded(remark, r.unit), "dim"))
    for section, why in r.skipped.items():
        out.print(text(f"Left out: {section} ({why})", "dim"))


def print_rows(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """A table under a title."""
    columns = shown_columns(rows, columns)
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(shown(row, column)) for column in columns))
    out.print(text(title, "bold"))
    out.print(table)


# -- the page ------------------------------------------------------------------------------------------------------------


def interpretation_page(found: Interpretation) -> Page:
    """The whole page."""
    r = found.results
    about = ", ".join(str(r.about[key]) for key in ("role", "backbone", "pretraining", "modality") if r.about.get(key))
    sections = [
        kurtosis_section(r.kurtosis, found.kurtosis),
        outlier_section(r.outliers),
        r.layers and layers_section(r.layers),
        r.accuracy and accuracy_section(r.accuracy),
        r.robustness and robustness_section(r.robustness, robustness_pictures([Robust(found.name, "", r.robustness)])),
        r.directions and directions_section(r.directions),
        r.pruning and pruning_section(r.pruning),
        r.ablation and ablation_section(r.ablation),
        r.provenance and r.provenance.found and provenance_section(r.provenance.found, r.provenance.features),
        r.concepts and concepts_section(r.concepts),
        *left_out(r),
        _choices(r),
        reading(r),
    ]
    return Page(
        kind="interpret",
        title=found.name,
        summary=f"{about + ': ' if about else ''}{measured(r)}; outlier features, privileged directions, concepts and robustness, "
        "each with the values to compare it with.",
        facts=facts(r),
        sections=[section for section in sections if section],
        footer=footer(r),
    )


def remarks(r: Results) -> list[str]:
    """How this run differs from the default."""
    found = []
    if r.given:
        found.append("The representations were given. What this page calls an image is one row of them, whatever it stands for.")
    if (layer := r.about.get("layer")) is not None:
        position = r.about.get("position")
        found.append(f"The representation is layer {layer}" + (f", position {position}." if position else "."))
        if position in SEVERAL:
            found.append(
                "Each image gives several vectors. Its kurtosis is their mean, and the interval is over images. In the section on outlier "
                "features, shares of images are shares of vectors."
            )
    if r.chosen_features is not None:
        listed = ", ".join(map(str, r.chosen_features)) or "none"
        found.append(f"In the sections on directions and ablation, the outlier features are those that were chosen (--features): {listed}.")
    if r.same_images:
        found.append("Importance and the means of ablated features were measured on the images that are evaluated (--same-images).")
    return found


def _choices(r: Results) -> Section | None:
    found = remarks(r)
    return Section("This run", found) if found else None


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
        sections.append(Section("Not computed", ["These sections were left out."], tables=[Table(rows, MISSING_COLUMNS)]))
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
    choices = (
        f"outlier features lie {r.outliers.definition}",
        "the share kept in pruning is a share of the rank of the head",
        f"a concept is encoded from AP {HEADLINE:g} on, if significant at 0.05 after Holm's correction",
        "negatives are the images annotated for the concept's category",
        "both signs of a direction are tried",
        "importance is measured on the images that are evaluated"
        if r.same_images
        else "importance is measured on one half of the images, chosen by their names, and the other half is evaluated",
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
    known = {
        name: r.about.get(name) for name in ("source", "checkpoint", "representation", "layer", "position", "images", "limit", "broden")
    }
    settings = ", ".join(f"{name} {value}" for name, value in (known | dict(r.settings)).items() if value)
    return [f"torchprobe {r.torchprobe}, torch {r.torch}, Python {platform.python_version()}.", f"Settings: {settings}."]
