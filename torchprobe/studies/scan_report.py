"""A scan as files, as a page, and in the terminal: the numbers, and the values to compare them with. It gives no verdict."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table as Grid

import torchprobe
from torchprobe.analysis.hidden_states import HiddenOutliers
from torchprobe.analysis.outliers import FEATURE_COLUMNS
from torchprobe.common.files import replacing, to_json
from torchprobe.common.folders import output_folder
from torchprobe.common.messages import counted
from torchprobe.encoders.outputs import AUTO, REPRESENTATIONS
from torchprobe.rendering import page, plots
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.tables import LAYER_COLUMNS, Column, Row, layer_table, number, plain_table, shown, text, write_csv
from torchprobe.rendering.wording import worded, worded_columns, worded_page
from torchprobe.studies.layer_pass import MAP_POSITIONS
from torchprobe.studies.scan import DEFINITIONS, Scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_FEATURES = 20
"""Features in the table of the page."""

NAMED_FEATURES = 6
"""Features named by index in the figure."""

SHOWN_IN_TERMINAL = 10
"""Rows of a table, or files, that the terminal shows."""

PER_IMAGE = Column("vectors_per_image", "per image", "vectors per image: 1 for a pooled vector, else the tokens or map positions")
VECTOR = Column("vector", "one vector", "what one vector is: an image, one of its tokens, or one position of its map", "text")
NAMED_OUTLIERS = (
    Column("outlier_indices", "which (where)", "outlier features by the robust rule at each kind of position", "text", optional=True),
    Column("massive", "massive", "features with massive activations (Sun et al. 2024), and where", "text", optional=True),
    Column(
        "long_tokens",
        "long tokens",
        "number of tokens that are more than 6 standard deviations of the bulk, and twice the median, of the tokens of their input long; "
        "their median length × that of the median token; and where",
        "text",
        optional=True,
    ),
)
UNREADABLE = (Column("file", "file", "name within the folder", "text"), Column("reason", "reason", "why it could not be read", "text"))


# -- files ---------------------------------------------------------------------------------------------------------------


def write_scan(scan: Scan, folder: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Path]:
    """Writes the recording, the tables as CSV, the summary as JSON, the plot over depth, and the page.

    Args:
        scan: the result of :func:`torchprobe.studies.scan.scan`.
        folder, overwrite: where to write; whether to remove the files of another run there.

    Returns:
        The paths of ``recording``, ``layers``, ``features``, ``summary``, ``plot`` and ``page``.

    Raises:
        OtherRunError, OSError: the folder holds another run, or cannot be written to.
    """
    with output_folder(folder, "scan", of=scan.model, overwrite=overwrite):
        return write_files(folder, scan, scan.summary(), plots.depth_profile(scan.rows()), worded_page(scan_page(scan), scan.inputs))


def write_files(folder: str | os.PathLike[str], scan: Scan, summary: Mapping[str, Any], plot: Figure, content: Page) -> dict[str, Path]:
    """:func:`write_scan` with another summary, plot and page; ``summary["layers"]`` is the layer table.

    Each file is replaced as a whole, so an interruption leaves no incomplete file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recording, json_file = folder / "recording.safetensors", folder / "summary.json"
    scan.recording.save(recording)
    with replacing(json_file) as temporary:
        temporary.write_text(to_json(summary), encoding="utf-8")
    return {
        "recording": recording,
        "layers": write_csv(summary["layers"], folder / "layers.csv"),
        "features": write_csv(scan.features(), folder / "features.csv"),
        "summary": json_file,
        "plot": plots.write(plot, folder / "depth.png"),
        "page": page.write(content, folder / "index.html"),
    }


# -- the page ------------------------------------------------------------------------------------------------------------


def scan_page(scan: Scan) -> Page:
    """The page of a scan."""
    return Page(
        kind="scan",
        title=scan.model,
        summary=f"One pass over {number(scan.images)} images. Is the activation spread over the features, or do a few features carry it?",
        notice=f"Partial: stopped after {scan.images} of {scan.total} images. All results are about these." if scan.partial else "",
        facts=facts(scan),
        sections=[representation(scan), outlier_features(scan), depth(scan), *unreadable(scan), reading()],
        footer=footer(scan),
    )


def facts(scan: Scan) -> list[Fact]:
    """The numbers at the head of the page."""
    r = scan.headline
    low, high = r.interval
    missing = f"{len(scan.unreadable)} could not be read" if scan.unreadable else "all could be read"
    return [
        Fact(
            "Vector kurtosis",
            number(r.vector_kurtosis, 3),
            f"{r.interval_level:.0%} interval {number(low, 3)} … {number(high, 3)}, median {number(r.vector_kurtosis_median, 3)}",
        ),
        Fact("Gaussian features", number(r.gaussian), f"± {number(r.gaussian_std, 2)} from vector to vector"),
        Fact("Ceiling", number(r.ceiling, 3), f"for {number(r.features)} features"),
        Fact("max|h| / mean|h|", number(r.peak, 3), "mean over images"),
        Fact("Images", number(scan.images), missing),
    ]


def representation(scan: Scan) -> Section:
    """The vector kurtosis of the images."""
    r = scan.headline
    return Section(
        "The representation",
        [
            f"{_what(scan)} of {number(r.features)} features{_seen_by_head(scan)}. The "
            "histogram shows the kurtosis of each image. Independent Gaussian features would lie in the gray range. The "
            "dashed line is the largest value that this number of features can reach.",
            which_output(scan),
            relu_note(scan),
        ],
        [
            Picture(
                lambda width: plots.kurtosis_histogram(scan.kurtosis, r.features, interval=r.interval, width=width),
                f"Histogram of the vector kurtosis of {scan.images} images",
            )
        ],
    )


def _what(scan: Scan) -> str:
    return "Each image gives one vector" if scan.vectors is None else "Each image gives several vectors"


def _seen_by_head(scan: Scan) -> str:
    return ": the input of the head, before normalization" if scan.settings.get("layer") is None else ""


def which_output(scan: Scan) -> str:
    """Which output of the network the representation is, if it has several, or which layer."""
    if (layer := scan.settings.get("layer")) is not None:
        position = scan.settings.get("position")
        chosen = f"The representation is layer “{layer}”" + (f", position “{position}”." if position else ".")
        several = f" The {number(scan.images)} inputs give {number(scan.vectors)} vectors; the kurtosis of an input is their mean."
        return chosen + (several if scan.vectors else "") + " It is not what the head of the encoder sees."
    chosen = str(scan.settings.get("representation", AUTO))
    return "" if chosen == AUTO else f"Of the outputs of the network, the representation is “{chosen}”: {REPRESENTATIONS[chosen]}."


def relu_note(scan: Scan) -> str:
    """The effect of a ReLU alone on the kurtosis, and whether this representation looks like the output of one."""
    low, high = plots.POOLED_RELU
    found = (
        "No value of this representation is negative, as after a ReLU."
        if scan.headline.nonnegative
        else "This representation has negative values, so it is not the output of a ReLU."
    )
    return (
        f"{found} Pooled features after a ReLU can have a kurtosis of {low:g} to {high:g} without any outlier, because their "
        "distribution is skewed. Compare like with like."
    )


def outlier_features(scan: Scan) -> Section:
    """The features that stand out, by index."""
    moments, rows = scan.representation, scan.features()
    named = [row["feature"] for row in rows[:NAMED_FEATURES] if row["outlier_share"] > 0]
    return Section(
        "Features by index",
        [
            "Above: the average size of each feature compared with the others. Below: the share of the images in which it lies "
            "more than 6 standard deviations from the mean of its vector. " + outlier_sentence(scan),
        ],
        [
            Picture(
                lambda width: plots.feature_profile(moments.mean_abs.cpu(), moments.outlier_frequency.cpu(), named=named, width=width),
                f"Relative size and outlier share of {moments.features} features",
            )
        ],
        [
            Table(
                rows[:SHOWN_FEATURES],
                FEATURE_COLUMNS,
                f"The {min(SHOWN_FEATURES, len(rows))} features that stand out most; all features are in features.csv",
            )
        ],
    )


def outlier_sentence(scan: Scan) -> str:
    """The number of outlier features, in words."""
    moments = scan.representation
    if bool(moments.outlier_frequency.isnan().all()):
        return f"With {moments.features} features no feature can lie that far out, so the share is undefined."
    outliers = scan.outliers()
    if not outliers:
        return "No feature is an outlier in any image."
    often = sum(row["outlier_share"] >= 0.5 for row in outliers)
    return (
        f"{number(len(outliers))} of {number(moments.features)} features are outliers in at least one image, "
        f"{number(often)} in at least half of them."
    )


def depth(scan: Scan, band: Sequence[Sequence[Row]] = (), band_label: str = "", label: str = "mean over vectors") -> Section:
    """The layers, in the order of execution."""
    rows = scan.rows()
    return Section(
        "Over depth",
        [
            "Kurtosis across the features of one vector, mean and median over all vectors of a layer. The table says what one "
            "vector is in each layer: the image, one of its tokens, or one position of its map. The value depends on it, so compare a "
            "layer with the same layer of another network rather than with its neighbor.",
            "If the mean is far above the median, a few vectors, such as single tokens, carry the kurtosis.",
            hidden_sentence(scan.hidden),
        ],
        [
            Picture(
                lambda width: plots.depth_profile(rows, band=band, label=label, band_label=band_label, width=width),
                f"Vector kurtosis of {len(rows)} layers",
            )
        ],
        [Table(with_vectors(rows), layer_columns(VECTOR), "All recorded layers; click on a column head to sort")],
    )


def hidden_sentence(found: HiddenOutliers | str | None) -> str:
    """Outlier features, massive activations and those of LLM.int8() in the hidden states, in words."""
    if found is None or isinstance(found, str):
        return f"Outlier features were not told apart by position: {found}." if found else ""
    counts = [counted(len({i for one in found.layers for i in getattr(one, key)}), "feature") for key in ("indices", "massive")]
    of_maps = f" (at most {MAP_POSITIONS} random ones of a map)" if any("positions" in one.vectors for one in found.layers) else ""
    sentence = (
        f"In the hidden states of {counted(found.inputs, 'input')}, {counts[0]} stand out by the robust rule in a layer and kind of "
        f"position{of_maps}. With massive activations, |x| > 100 and 1000 times the median of the vector: {counts[1]}."
    )
    long, beyond = (sum(sum(getattr(one, key).values()) for one in found.layers) for key in ("long", "registers"))
    sentence += (
        f" Tokens can stand out too, as registers do: {counted(long, 'token')} of all layers "
        f"{'is' if long == 1 else 'are'} at least twice as long as the median token of the input and outside the bulk; "
        f"{counted(beyond, 'token')} {'has' if beyond == 1 else 'have'} a norm above 150, the threshold of Darcet et al. 2024 for one "
        "network."
    )
    if found.llm_int8 is None:
        return sentence
    listed = ", ".join(map(str, found.llm_int8[:SHOWN_IN_TERMINAL])) or "none"
    return f"{sentence} By LLM.int8(), |x| ≥ 6 in 25 % of the layers and at 6 % of the positions, {number(len(found.llm_int8))}: {listed}."


def layer_columns(extra: Column = PER_IMAGE) -> list[Column]:
    """The columns of the layer table, with a column that says what one vector is."""
    columns = list(LAYER_COLUMNS)
    columns.insert(1 + [column.key for column in columns].index("vectors"), extra)
    after = 1 + [column.key for column in columns].index("outlier_features")
    columns[after:after] = NAMED_OUTLIERS
    return columns


def with_vectors(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a scan with ``vector``: what one vector is, in words."""
    described = []
    for row in rows:
        unit = "position" if row["feature_dim"] == 1 else "token"
        per_image = row["vectors_per_image"]
        described.append({**row, "vector": "image" if per_image == 1 else f"1 of {number(per_image)} {unit}s"})
    return described


def unreadable(scan: Scan) -> list[Section]:
    """The files that could not be read, if any."""
    if not scan.unreadable:
        return []
    rows = [{"file": file, "reason": reason} for file, reason in scan.unreadable]
    title = f"Left out: {len(rows)} files"
    return [Section(title, ["These files could not be read. No number on this page includes them."], tables=[Table(rows, UNREADABLE)])]


def reading() -> Section:
    """Definitions, choices, and limits."""
    terms = [
        *DEFINITIONS.items(),
        (
            "vector",
            "in the representation, the output of the encoder for one image; in a layer, the features of one position along “dim”, "
            "taken at every position of every image.",
        ),
        (
            "our choices",
            "6 standard deviations for an outlier; equal weight for all positions of a layer; the mean as the headline, with the "
            "median next to it; the interval over images; the preprocessing that belongs to the weights.",
        ),
        (
            "what it does not say",
            "A high value describes how the activation is spread over the features of this encoder on these images. In some families "
            "of encoders it coincides with other properties. It does not show that it causes them, and there is no threshold.",
        ),
    ]
    return Section("How to read this", terms=terms)


def footer(scan: Scan) -> list[str]:
    """Versions and settings."""
    settings = ", ".join(f"{key} {value}" for key, value in scan.settings.items() if value is not None)
    return [
        f"torchprobe {torchprobe.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
        f"Settings: {settings}.",
    ]


# -- the terminal --------------------------------------------------------------------------------------------------------


def print_scan(scan: Scan, out: Console) -> None:
    """Prints the representation, the outlier features, the layers, and the definitions."""
    out.print(text(f"{scan.model}: {counted(scan.images, scan.inputs)}", "bold"))
    if scan.unreadable:
        out.print(text(f"{len(scan.unreadable)} of {scan.total:,} files could not be read and are left out:", "yellow"))
        for file, reason in scan.unreadable[:SHOWN_IN_TERMINAL]:
            out.print(text(f"  {file}: {reason}"))
        if len(scan.unreadable) > SHOWN_IN_TERMINAL:
            out.print(text(f"  … and {len(scan.unreadable) - SHOWN_IN_TERMINAL} more; summary.json lists all"))
    out.print()
    print_representation(scan, out)
    out.print(text(worded(relu_note(scan), scan.inputs)))
    out.print()
    out.print(text("Outlier features: |h_i − mean h| > 6 std of the vector", "bold"))
    out.print(text(worded(outlier_sentence(scan), scan.inputs)))
    if rows := scan.outliers()[:SHOWN_IN_TERMINAL]:
        titles = [column.title for column in FEATURE_COLUMNS]
        table = plain_table(*titles, right=titles)
        for row in rows:
            table.add_row(*(text(shown(row, column)) for column in FEATURE_COLUMNS))
        out.print(table)
    out.print()
    out.print(text("Layers", "bold"))
    out.print(layer_table(scan.rows(), columns=worded_columns(layer_columns(), scan.inputs), width=out.width))
    out.print(text(hidden_sentence(scan.hidden)))
    out.print(text("Definitions", "bold"))
    definitions = Grid.grid(padding=(0, 2, 0, 0))
    for term, meaning in DEFINITIONS.items():
        definitions.add_row(text(term), text(worded(meaning, scan.inputs), "dim"))
    out.print(definitions)


def print_representation(scan: Scan, out: Console, at_random: Sequence[float] = ()) -> None:
    """Prints the numbers of the representation, and the values to compare them with.

    Args:
        scan: of the encoder.
        out: where to print.
        at_random: vector kurtosis of the same network at random initializations, if known.
    """
    r = scan.headline
    low, high = r.interval
    interval = f"{r.interval_level:.0%} interval {number(low)} … {number(high)}"
    lines = [
        ("vector kurtosis", number(r.vector_kurtosis), interval),
        ("  median over images", number(r.vector_kurtosis_median), ""),
        ("  Gaussian features", number(r.gaussian), f"± {number(r.gaussian_std, 2)} from vector to vector"),
        ("  ceiling", number(r.ceiling), f"for {number(r.features)} features"),
        ("max|h| / mean|h|", number(r.peak), "mean over images"),
    ]
    if at_random:
        between = f"{number(min(at_random))} … {number(max(at_random))}"
        lines.insert(2, ("  at random initialization", between, f"{len(at_random)} seeds"))
    if skipped := r.constant_vectors + r.invalid_vectors:
        why = f"{number(r.constant_vectors)} constant, {number(r.invalid_vectors)} with a nonfinite element"
        lines.append(("left out", number(skipped), why))
    table = Grid.grid(padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column()
    for line in lines:
        table.add_row(*(text(worded(part, scan.inputs)) for part in line))
    vectors = "one vector per image" if scan.vectors is None else f"{number(scan.vectors)} vectors"
    out.print(text(worded(f"The representation: {vectors}, the interval over images", scan.inputs), "bold"))
    out.print(table)
