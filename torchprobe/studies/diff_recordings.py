"""Two recordings on disk, compared: a table, a page, and the terminal."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torchprobe
from torchprobe.analysis.changes import ALPHA, RecordingComparison, compare_recordings
from torchprobe.common.files import replacing, to_json
from torchprobe.common.folders import output_folder
from torchprobe.common.messages import counted, listing
from torchprobe.common.numbers import shown
from torchprobe.common.storage import holds_only_tensors
from torchprobe.recording import load
from torchprobe.recording.storage import holds_recording
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.plots import depth_profile
from torchprobe.rendering.tables import WIDER, Column, cell, number, plain_table, shown_columns, text, write_csv
from torchprobe.rendering.tables import shown as shown_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

COLUMNS = (
    Column("layer", "layer", "name in the first recording; “(output)” is the output of the model itself", "text"),
    Column("verdict", "verdict", "changed: beyond the noise of the windows; within noise: not told apart; or why there is none", "text"),
    Column("field", "surest change", "the number of the layer whose change is surest", "text", optional=True),
    Column("before", "before", "its mean over windows, before", optional=True),
    Column("after", "after", "its mean over windows, after", optional=True),
    Column("times_noise", "× noise", "its change in standard errors, from the spread of the windows", optional=True),
    Column("p", "p", "its p-value, adjusted for all numbers of all layers", optional=True),
    Column("wasserstein", "distance", "Wasserstein distance of its features, in standard deviations; its noise is not known"),
    Column("mean_shift", "mean shift", "the part of it that moved the means", optional=True),
    Column("mean_shift_max", "largest", "the largest shift of the mean of a feature, in standard deviations", optional=True),
    Column("mean_shift_feature", "feature", "the feature with that shift", "index", optional=True),
    Column("std_ratio", "std ratio", "standard deviation after / before", optional=True),
    Column("kurtosis_ratio", "κ ratio", "vector kurtosis after / before", optional=True),
    Column("outliers_gained", "outliers gained", "features that are outliers in half of the vectors only after", "text", optional=True),
    Column("outliers_lost", "outliers lost", "features that are so only before", "text", optional=True),
    Column("outlier_shift", "outlier shift", "the largest change of the share of vectors in which a feature is an outlier", optional=True),
    Column("outlier_shift_feature", "of feature", "the feature with that change", "index", optional=True),
    Column("constant_moved", "constants", "features that are constant in both, at different values", "count", optional=True),
    Column("nonfinite", "nonfinite", "nan and inf values, before", "count", optional=True),
    Column("other_nonfinite", "nonfinite after", "nan and inf values, after", "count", optional=True),
    Column("features", "d", "number of features", "count"),
    Column("other_features", "d after", "number of features after, if another", "count", optional=True),
    Column("other", "name after", "its name in the second recording, if another", "text", optional=True),
)
"""The columns of a table of layers."""

TERMINAL = ("layer", "verdict", "field", "before", "after", "times_noise", "p", "wasserstein", "std_ratio", "outliers_gained",
            "outliers_lost", "nonfinite", "other_nonfinite", "other_features")  # fmt: skip
"""Those for the terminal."""

_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")

MOST = 20
"""The number of layers that the terminal shows."""


def are_recordings(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether both are recordings, or folders of recordings; False if none is.

    Raises:
        ValueError: only one of them is, or one is a checkpoint.
        FileNotFoundError: a file does not exist.
    """
    for path in map(Path, (first, second)):
        if path.is_file() and (path.suffix.lower() in _CHECKPOINTS or holds_only_tensors(path)):
            raise ValueError(
                f"{path} is a checkpoint of weights, and no recording. Weights alone do not say what a model does. Load both models, "
                f"record them on the same data (torchprobe.record(model), rec.save(path)), and compare the recordings: docs/compare-runs.md"
            )
    kinds = [bool(_recordings(path)) for path in (first, second)]
    if kinds[0] != kinds[1]:
        one, other = (first, second) if kinds[0] else (second, first)
        raise ValueError(f"{one} is a recording, and {other} is none: compare two recordings, or two dissections")
    return kinds[0]


def diff_recordings(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    alpha: float = ALPHA,
    rename: Mapping[str, str] | None = None,
) -> RecordingComparison:
    """Compares recordings on disk; see :func:`torchprobe.analysis.compare_recordings`.

    Args:
        first, second: files of :meth:`torchprobe.Recording.save`, or folders with one for each rank.
        alpha: the probability of a false verdict about any layer.
        rename: name or glob of a layer of the first → name in the second.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not a recording, or is damaged, or the two cannot be compared.
    """
    sides = [[load(path) for path in _recordings(side)] for side in (first, second)]
    return compare_recordings(sides[0], sides[1], alpha=alpha, rename=rename)


def _recordings(path: str | os.PathLike[str]) -> list[Path]:
    """The file, or the recordings in a folder, in the order of their names; empty if something else is in it, such as a dissection."""
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    return files if all(map(holds_recording, files)) else []


def write_recording_diff(
    found: RecordingComparison, folder: str | os.PathLike[str], names: Sequence[str], *, overwrite: bool = False
) -> dict[str, Path]:
    """Writes ``comparison.json``, ``layers.csv`` and ``index.html``; returns the paths by kind.

    Args:
        found: see :func:`diff_recordings`.
        folder: created if missing.
        names: what the two are called.
        overwrite: replace the results of another run in the folder; its files are removed, and no others.

    Raises:
        OtherRunError: the folder holds another run.
    """
    folder = Path(folder)
    with output_folder(folder, "diff", of=" and ".join(names), overwrite=overwrite):
        with replacing(folder / "comparison.json") as temporary:
            temporary.write_text(to_json(found.summary()), encoding="utf-8")
        write_csv(found.rows(), folder / "layers.csv")
        page = write_page(recording_page(found, names), folder / "index.html")
    return {"comparison": folder / "comparison.json", "table": folder / "layers.csv", "page": page}


def recording_page(found: RecordingComparison, names: Sequence[str]) -> Page:
    """The page of a comparison."""
    rows = _rows(found)
    pictures = [
        Picture(functools.partial(_profile, rows, key), f"{what} of each layer, in the order of the run", name=key)
        for key, what in (("wasserstein", "Distance of the features"), ("times_noise", "Surest change in units of its noise"))
        if any(number(row.get(key)) not in ("–", "∞") for row in rows)
    ]
    rate = (
        f"If the windows of both could be exchanged, the probability that any layer is called changed is at most {found.alpha:g}: a "
        f"permutation test over the {found.windows[0]} and {found.windows[1]} windows, for all numbers of all layers at once "
        f"(Westfall and Young, 1993)."
        if found.noise == "windows"
        else f"There is no verdict: {found.why}."
    )
    limits = (
        "The verdict is about numbers of whole layers. A change that keeps all of them, such as a permutation of features, has a distance "
        "and no verdict. A distance is never 0 between different batches; compare it with that of two recordings of one model."
    )
    return Page(
        kind="diff",
        title=f"{names[0]} and {names[1]}",
        summary=found.answer(),
        notice=" ".join(remark[:1].upper() + remark[1:] + "." for remark in found.remarks),
        facts=[
            Fact("Layers changed", number(len(found.changed)) if found.noise == "windows" else "–", listing(found.changed, 6)),
            Fact("First in the order of the run", "–" if found.first is None else found.first or "(output)"),
            Fact("Layers compared", number(len(found.layers)), f"{found.windows[0]} and {found.windows[1]} windows"),
        ],
        sections=[Section("Layers in the order of the run", [rate, limits], pictures=pictures, tables=[Table(rows, COLUMNS)])],
        footer=[f"torchprobe {torchprobe.__version__}, Python {platform.python_version()}."],
    )


def _rows(found: RecordingComparison) -> list[dict[str, Any]]:
    """The rows for people: names of fields with spaces."""
    return [{**row, "field": row.get("field", "").replace("_", " ")} for row in found.rows()]


def _profile(rows: Sequence[Mapping[str, object]], key: str, width: float) -> Figure:
    return depth_profile([{**row, "layer": row["layer"] or "(output)"} for row in rows], field=key, width=width)


def changed_most(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most this many rows of :meth:`RecordingComparison.rows`, in their order: those that changed most.

    Layers that are nonfinite in one recording only count first, then those whose verdict is "changed", and then the distance. Layers that
    cannot be compared come last.

    >>> rows = [{"layer": "a", "wasserstein": 0.1}, {"layer": "b", "wasserstein": 0.3}, {"layer": "c", "wasserstein": 0.2}]
    >>> [row["layer"] for row in changed_most(rows, 2)]
    ['b', 'c']
    """

    def size(value: Any) -> float:
        return abs(value) if isinstance(value, (int, float)) and not math.isnan(value) else -1.0

    def rank(at: int) -> tuple[bool, bool, bool, float, float]:
        row = rows[at]
        apart = bool(row.get("nonfinite")) != bool(row.get("other_nonfinite"))
        return (
            apart,
            row.get("verdict") == "changed",
            row.get("verdict") not in ("other width", "not seen"),
            size(row.get("wasserstein")),
            size(row.get("times_noise")),
        )

    return [rows[at] for at in sorted(sorted(range(len(rows)), key=rank, reverse=True)[:most])]


def print_recording_diff(found: RecordingComparison, out: Console, most: int = MOST) -> None:
    """Prints the answer, the remarks, and a table of the layers that changed most."""
    out.print(text(found.answer(), "bold"))
    for remark in found.remarks:
        out.print(text(remark))
    everything = _rows(found)
    rows = changed_most(everything, most)
    columns = shown_columns(rows, [column for column in COLUMNS if column.key in TERMINAL])
    table = plain_table(
        *(column.title for column in columns),
        right={column.title for column in columns if column.numeric},
        dispensable=("before", "after", "p", "std ratio"),
        more=f"{WIDER} The page and layers.csv have all.",
    )
    for row in rows:
        style = "bold" if row["verdict"] == "changed" else ""
        table.add_row(*(text(str(cell(row, column)) if column.key == "layer" else shown_cell(row, column), style) for column in columns))
    out.print(table)
    if len(everything) > len(rows):
        kept = f"These {len(rows)} changed most" if len(rows) > 1 else "This one changed most"
        rest = f"{counted(len(everything) - len(rows), 'more layer')} {'is' if len(everything) - len(rows) == 1 else 'are'}"
        out.print(text(f"{kept}, in the order of the run. {rest} on the page and in layers.csv; --most N prints more."))


def renaming(pairs: Sequence[str]) -> dict[str, str]:
    """``rename`` from texts such as "blocks.*=layers.*".

    Raises:
        ValueError: a text has no "=", or a pattern comes twice.

    >>> renaming(["blocks.*=layers.*"])
    {'blocks.*': 'layers.*'}
    """
    found: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not equals or old in found:
            raise ValueError(f"--rename takes OLD=NEW, each OLD once, such as 'blocks.*=layers.*'; got {shown(pair)}")
        found[old] = new
    return found
