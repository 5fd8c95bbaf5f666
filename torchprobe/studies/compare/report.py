"""A comparison for people: a page, files in a folder, and tables in the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import torchprobe
from torchprobe.analysis.baseline import IMAGENET
from torchprobe.analysis.resampling import LEVEL
from torchprobe.common.files import replacing, to_json
from torchprobe.common.folders import output_folder, record
from torchprobe.rendering.curves import Series, curves
from torchprobe.rendering.differences import MOST as MOST_PAIRS
from torchprobe.rendering.heatmap import heat_map
from torchprobe.rendering.latex import write_latex
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.tables import Column, Row, number, text, write_csv
from torchprobe.studies.compare.comparison import Comparison, Interpolation, LayerSimilarity, PairMeasures
from torchprobe.studies.compare.figures import LABELS, SHIFT_COLUMNS, model_pictures, pair_pictures, shift_pictures, shift_rows
from torchprobe.studies.compare.modalities import GAP_COLUMNS, modality_sections
from torchprobe.studies.compare.pairs import ZERO_SHOT
from torchprobe.studies.interpret.concepts import HEADLINE
from torchprobe.studies.interpret.figures import write_figures
from torchprobe.studies.interpret.report import print_rows

SUITE = "interpret --suite"
"""The command whose folder holds the encoders and their comparison."""


def write(found: Comparison, folder: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Path]:
    """Writes ``comparison.json``, tables as CSV and LaTeX, figures as PDF, SVG and PNG, and the page; returns the paths by kind.

    Args:
        found: the comparison.
        folder: made if needed.
        overwrite: replace the results of another run in the folder; its files are removed, and no others.

    Raises:
        OtherRunError: the folder holds another run. That of a suite, which holds the encoders, gets its comparison.
    """
    folder = Path(folder)
    run = record(folder)
    of = ", ".join(saved.name for saved in found.saved)
    if run is not None and run["command"] == SUITE and all(saved.folder.resolve().parent == folder.resolve() for saved in found.saved):
        whole = output_folder(folder, SUITE, of=run["of"], resume=True)
    else:
        whole = output_folder(folder, "compare", of=of, overwrite=overwrite, inputs=[saved.folder for saved in found.saved])
    with whole:
        return _write(found, folder)


def _write(found: Comparison, folder: Path) -> dict[str, Path]:
    with replacing(folder / "comparison.json") as temporary:
        temporary.write_text(to_json(found.summary()), encoding="utf-8")
    files = {"comparison": folder / "comparison.json"}
    tables = {name: getattr(found, name) for name in ("models", "pairs", "correlations", "overlaps", "gaps", "gap_features")}
    for name, rows in {**tables, "robustness": shift_rows(found.saved)}.items():
        if rows:
            files[name] = write_csv(rows, folder / f"{name}.csv")
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)  # of an earlier comparison
    for name, (rows, columns) in latex_tables(found).items():
        if rows:
            write_latex(rows, columns, folder / f"{name}.tex", "comparison")
        else:
            (folder / f"{name}.tex").unlink(missing_ok=True)
    page = comparison_page(found)
    files["figures"] = folder / "figures"
    write_figures(files["figures"], [picture for section in page.sections for picture in section.pictures])
    files["page"] = write_page(page, folder / "index.html")
    return files


def latex_tables(found: Comparison) -> dict[str, tuple[Sequence[Row], Sequence[Column]]]:
    """The rows and columns of each table for a paper, by the name of its CSV file."""
    return {
        "models": (found.models, MODEL_COLUMNS),
        "pairs": (found.pairs, PAIR_COLUMNS),
        "correlations": (found.correlations, CORRELATION_COLUMNS),
        "overlaps": (found.overlaps, OVERLAP_COLUMNS),
        "gaps": (found.gaps, GAP_COLUMNS),
        "robustness": (shift_rows(found.saved), SHIFT_COLUMNS),
    }


def print_comparison(found: Comparison, out: Console) -> None:
    """Encoders, pairs, correlations, and the encoders that were not run."""
    print_rows("Encoders", [column for column in MODEL_COLUMNS if not column.key.endswith(("_low", "_high"))], found.models, out)
    if found.pairs:
        print_rows("Pairs", PAIR_COLUMNS, found.pairs, out)
    if found.gaps:
        terse = [column for column in GAP_COLUMNS if column.key not in ("relative", "unpaired_cosine", "within_a", "within_b")]
        print_rows("Gaps between modalities", terse, found.gaps, out)
    if found.correlations:
        print_rows("Rank correlations", CORRELATION_COLUMNS, found.correlations, out)
    for remark in found.remarks:
        out.print(text(remark))
    for one in found.skipped:
        out.print(text(f"Left out: {one.model} ({one.why})", "dim"))


# -- the page ------------------------------------------------------------------------------------------------------------


MODEL_COLUMNS = (
    Column("model", "encoder", "its name in the suite", "text"),
    Column("kurtosis", "vector κ", "vector kurtosis, mean over images"),
    Column("kurtosis_low", "from", f"{LEVEL:.0%} interval over images: lower end"),
    Column("kurtosis_high", "to", "its upper end"),
    Column("robustness", "ER", "effective robustness, percentage points, mean over the available shifts"),
    Column("robustness_low", "from", f"{LEVEL:.0%} interval of ER, without the scatter of standard models", optional=True),
    Column("robustness_high", "to", "its upper end", optional=True),
    Column("outlier_features", "outliers", "outlier features", "count"),
    Column("accuracy", "accuracy", "on the unshifted images", "share"),
    Column("role", "role", "its role in the comparison", "text"),
    Column("backbone", "backbone", "architecture; differences are taken within one backbone", "text"),
    Column("modality", "modality", "what the rows of its representations stand for", "text", optional=True),
    Column("features", "d", "width of the representation", "count"),
    Column(
        "robustness_note",
        "ER from",
        "measured or published accuracies; number of shifts; whether outside the range of the standard models",
        "text",
        optional=True,
    ),
    Column("concepts", "concepts", "unique concepts that units encode", "count"),
    Column("polysemanticity", "per unit", "concepts per unit"),
)

PAIR_COLUMNS = (
    Column("pair", "difference", "the first encoder minus the second; same backbone", "text"),
    Column("kurtosis", "Δ vector κ", "mean over the common images"),
    Column("kurtosis_low", "from", f"{LEVEL:.0%} bootstrap interval over the common images: lower end"),
    Column("kurtosis_high", "to", "its upper end"),
    Column("images", "images", "number of common images", "count"),
    Column("accuracy", "Δ accuracy", "on the unshifted images", "share"),
    Column("accuracy_low", "from", f"{LEVEL:.0%} interval over the common images (Bonett and Price): lower end", "share"),
    Column("accuracy_high", "to", "its upper end", "share"),
    Column("robustness", "Δ ER", "effective robustness, percentage points, mean over the common shifts"),
    Column("robustness_low", "from", f"{LEVEL:.0%} interval: the common images and the line; both encoders are paired", optional=True),
    Column("robustness_high", "to", "its upper end", optional=True),
    Column("concepts", "Δ concepts", "unique concepts", "count"),
    Column("shared_concepts", "shared", "concepts that both encode", "count"),
    Column("cka", "CKA", "linear CKA of the two representations over the common images"),
    Column("remark", "unlike", "what differs apart from the weights: the numbers differ for that reason too", "text", optional=True),
)

CORRELATION_COLUMNS = (
    Column("models", "encoders", "all, or those of one role", "text"),
    Column("x", "x", "first measure", "text"),
    Column("y", "y", "second measure", "text"),
    Column("rho", "Spearman ρ", "rank correlation"),
    Column("p_value", "p", "two-sided, by permutation; assumes independent encoders, which variants of one encoder are not"),
    Column("n", "n", "encoders with both measures", "count"),
)

OVERLAP_COLUMNS = (
    Column("a", "one", "encoder", "text"),
    Column("b", "other", "encoder", "text"),
    Column("shared", "shared", "concepts that both encode", "count"),
    Column("only_a", "only one", "concepts that only the first encodes", "count"),
    Column("only_b", "only other", "concepts that only the second encodes", "count"),
    Column("jaccard", "Jaccard", "shared, as a share of all that either encodes", "share"),
)

SKIPPED_COLUMNS = (Column("model", "encoder", "of the suite", "text"), Column("why", "why", "what is missing", "text"))

FEWEST_ENCODERS = 5
"""Encoders below which a rank correlation is no headline: of four, no order has a p-value of 5 %."""

MOST = 10
"""The largest number of curves in one figure."""

_PARTS = {"cka": "CKA"}


def comparison_page(found: Comparison) -> Page:
    """All encoders, pairs and correlations, and the measures that need two networks at the same time."""
    return Page(
        kind="compare",
        title=f"{len(found.models)} encoders",
        summary="Outlier features, concepts and robustness of several encoders, and differences between them.",
        notice=" ".join(found.remarks),
        facts=_facts(found),
        sections=[
            _models(found),
            *_pairs(found),
            *_shifts(found),
            *modality_sections(found.gaps, found.gap_features),
            *_correlations(found),
            *_pruning(found),
            *(_extra(pair, extra) for pair, extra in found.extras.items()),
            *_overlaps(found),
            *_skipped(found),
            _reading(),
        ],
        footer=_footer(found),
    )


def _facts(found: Comparison) -> list[Fact]:
    facts = [Fact("Encoders", number(len(found.models)), f"{len(found.skipped)} left out" if found.skipped else "none left out")]
    facts.append(Fact(_which_pairs(found), number(len(found.pairs))))
    for x, y in (("kurtosis", "robustness"), ("concepts", "robustness")):
        row = next((row for row in found.correlations if (row.models, row.x, row.y) == ("all", x, y)), None)
        if row is not None and row.n >= FEWEST_ENCODERS:
            facts.append(Fact(f"ρ of {LABELS[x]} and ER", number(row.rho, 2), f"p = {number(row.p_value, 2)}, {row.n} encoders"))
    return facts


def _models(found: Comparison) -> Section:
    return Section(
        "The encoders",
        [
            "Each point is an encoder; a line joins the encoders of one backbone. The width of the representation limits the kurtosis, and "
            "it is the number of units that can encode concepts. So compare along the lines rather than across them. Bars are "
            f"{LEVEL:.0%} intervals; those of effective robustness are without the scatter of standard models.",
        ],
        model_pictures(found.models),
        [Table(found.models, MODEL_COLUMNS, "All encoders; a click on a column head sorts")],
    )


def _which_pairs(found: Comparison) -> str:
    return "Pairs within a backbone" if all(row.backbone for row in found.pairs) else "Pairs"


def _pairs(found: Comparison) -> list[Section]:
    if not found.pairs:
        return []
    zero_shot = any(row.role == ZERO_SHOT for row in found.models)
    text = "The zero-shot encoder minus its twin. " if zero_shot else "The first encoder minus the second. "
    if not all(row.backbone for row in found.pairs):
        text += "The backbone of some encoders is unknown, and differences between backbones say little. "
    text += (
        "If an interval does not contain 0, the choice of images does not explain the difference. The interval does "
        "not include the choice of training runs, because there is only one run of each encoder."
    )
    text += " Hollow points have no interval." + (
        f" The figure shows the first {MOST_PAIRS} pairs." if len(found.pairs) > MOST_PAIRS else ""
    )
    return [Section(_which_pairs(found), [text], pair_pictures(found.pairs), [Table(found.pairs, PAIR_COLUMNS)])]


def _shifts(found: Comparison) -> list[Section]:
    if not (rows := shift_rows(found.saved)):
        return []
    text = (
        "Accuracy under each shift with the standard models, on logit axes. The band holds 95 % of standard models; the bar of an encoder "
        "is its interval without their scatter (line from … to). A figure shows the encoders that are compared with the same line."
    )
    return [Section("Effective robustness", [text], shift_pictures(found.saved), [Table(rows, SHIFT_COLUMNS)])]


def _correlations(found: Comparison) -> list[Section]:
    if not found.correlations:
        return []
    text = (
        "Do two numbers rise together over encoders? A rank correlation does not assume a line. Encoders that share data or architecture "
        "are not independent, so the p-values are too small. If two numbers rise together, this does not show that one causes "
        "the other."
    )
    return [Section("Rank correlations", [text], tables=[Table(found.correlations, CORRELATION_COLUMNS)])]


def _pruning(found: Comparison) -> list[Section]:
    """The curves by importance, all encoders in one figure."""
    curves_of = {one.name: one.results.pruning.curves[IMAGENET]["importance"] for one in found.saved if one.results.pruning}
    if len(curves_of) < 2:
        return []
    series = []
    for name, curve in list(curves_of.items())[:MOST]:
        at = curve.distinct()
        series.append(Series(name, _percent([curve.keep[i] for i in at]), _percent([(curve.accuracy or [])[i] for i in at])))
    text = (
        "Accuracy on the unshifted images if the head keeps only its most important directions. The longer a curve stays flat to the left, "
        "the fewer directions its decisions need."
        + (f" The figure shows the first {MOST} of {len(curves_of)} encoders." if len(curves_of) > MOST else "")
    )
    draw = partial(curves, series, "directions kept, % of the rank", "accuracy, %")
    return [
        Section(
            "Pruning",
            [text],
            [Picture(lambda width: draw(width=width), "Accuracy of each encoder against the share of directions kept", "pruning")],
        )
    ]


def _extra(pair: str, extra: PairMeasures) -> Section:
    """The measures of one pair that need two networks at the same time."""
    pictures = []
    paragraphs = []
    if extra.interpolation:
        paragraphs.append(
            "Between the two networks, weights and heads are mixed: θ = (1 − α) θ_first + α θ_second (WiSE-FT). The first figure shows the "
            "accuracy on each set, the second the vector kurtosis of the representation. We scale both heads to a weight of length 1, and "
            "recalibrate batch norms on some of the unshifted images, without their labels."
            + (f" The first {MOST} sets are shown." if len(extra.interpolation.accuracy) > MOST else "")
        )
        pictures.append(
            Picture(partial(_interpolation, extra.interpolation), f"Accuracy along the interpolation: {pair}", f"interpolation-{pair}")
        )
        pictures.append(
            Picture(
                partial(_kurtosis_along, extra.interpolation),
                f"Vector kurtosis along the interpolation: {pair}",
                f"interpolation-kurtosis-{pair}",
            )
        )
    if extra.cka:
        paragraphs.append(
            f"Linear CKA (unbiased, {number(extra.cka.images)} images in batches of {extra.cka.batch_size}; maps and tokens flattened) of "
            "every layer of one encoder with every layer of the other. It is 1 if the representations agree up to rotation and scale. "
            "Features of large variance dominate it."
        )
        pictures.append(Picture(partial(_heat_map, extra.cka), f"CKA of the layers: {pair}", f"cka-{pair}"))
    paragraphs += [f"No {_PARTS.get(name, name)}: {why}." for name, why in extra.skipped.items()]
    return Section(pair, paragraphs, pictures)


def _overlaps(found: Comparison) -> list[Section]:
    if not found.overlaps:
        return []
    text = "The concepts that two encoders share, counted by name, among the concepts that units encode at the headline threshold."
    return [Section("Concepts in common", [text], tables=[Table(found.overlaps, OVERLAP_COLUMNS)])]


def _skipped(found: Comparison) -> list[Section]:
    if not found.skipped:
        return []
    return [Section("Left out", ["These encoders of the suite were not run."], tables=[Table(found.skipped, SKIPPED_COLUMNS)])]


def _reading() -> Section:
    return Section(
        "How to read this",
        terms=[
            ("vector kurtosis", "across the features of the representation of one image, mean over images; Gaussian features give 3."),
            ("ER", "accuracy under shift beyond that of standard models with the same unshifted accuracy, mean over the available shifts."),
            (
                "unique concepts",
                f"distinct concepts that at least one unit ranks with an average precision of {HEADLINE:g} or more, significant after "
                "correction.",
            ),
            (
                "what it does not say",
                "encoders differ in data, objective and training at once. The comparison shows what coincides, not what causes what.",
            ),
        ],
    )


def _footer(found: Comparison) -> list[str]:
    names = ", ".join(f"{one.name} ({one.folder.name})" for one in found.saved)
    return [f"torchprobe {torchprobe.__version__}, Python {platform.python_version()}.", f"From: {names}."]


# -- figures ---------------------------------------------------------------------------------------------------------------


def _interpolation(found: Interpolation, width: float) -> Any:
    series = [Series(name, found.alphas, _percent(accuracy)) for name, accuracy in found.accuracy.items()]
    return curves(series[:MOST], "α", "accuracy, %", width=width)


def _kurtosis_along(found: Interpolation, width: float) -> Any:
    return curves([Series("", found.alphas, found.kurtosis)], "α", "vector kurtosis", log=True, width=width, height=2.6)


def _heat_map(found: LayerSimilarity, width: float) -> Any:
    layers = found.layers_a, found.layers_b
    return heat_map(found.matrix, *layers, "CKA", row_label=found.a, column_label=found.b, limits=(0.0, 1.0), width=width)


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]
