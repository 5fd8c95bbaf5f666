"""Figures for a paper: effective robustness on logit axes, and every figure of a page as a file with a name that stays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torchprobe.analysis.baseline import MEAN
from torchprobe.analysis.standard_models import cloud
from torchprobe.common.files import replacing
from torchprobe.rendering.curves import Mark
from torchprobe.rendering.logit import logit_scatter
from torchprobe.rendering.page import Picture
from torchprobe.rendering.plots import write as write_figure
from torchprobe.rendering.style import COLUMN, TEXT
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.accuracy import Robustness, ShiftRow

FORMATS = ("pdf", "svg", "png")
_LISTED = "files.txt"


def write_figures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Each picture as PDF, SVG and PNG in the width of a text; those for a paper also in that of a column, with ``-column`` in the name.

    The names do not depend on numbers in the results, so that a document that includes them stays whole. Figures of an earlier run that
    this one does not have are removed; ``files.txt`` lists the files. Other files in the folder are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    for picture in pictures:
        for width, end in ((TEXT, ""), *([(COLUMN, "-column")] if picture.paper else [])):
            figure = picture.draw(width)
            figure.set_facecolor("white")
            stem = _free(f"{picture.name or picture.description}{end}", written)
            written += [write_figure(figure, folder / f"{stem}.{suffix}").name for suffix in FORMATS]
    before = (folder / _LISTED).read_text(encoding="utf-8").split() if (folder / _LISTED).is_file() else []
    for name in set(before) - set(written):
        if Path(name).name == name and Path(name).suffix[1:] in FORMATS:
            (folder / name).unlink(missing_ok=True)
    with replacing(folder / _LISTED) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in written), encoding="utf-8")


def _free(name: str, written: Sequence[str]) -> str:
    """A file name without ending that no figure has: names of sets and encoders are in it, so two may be the same."""
    stem = plain = file_names([name])[name]
    taken, count = {one.lower() for one in written}, 1
    while f"{stem}.{FORMATS[0]}".lower() in taken:
        count += 1
        stem = f"{plain}-{count}"
    return stem


class Robust(NamedTuple):
    """An encoder in a figure of effective robustness: its name, its role, and its results."""

    name: str
    role: str
    found: Robustness


def robustness_pictures(encoders: Sequence[Robust]) -> list[Picture]:
    """A figure for each shift: the standard models, their line, and the encoders, on logit axes.

    Only encoders that are compared with the line of the first one are in the figure of a shift.
    """
    shifts = dict.fromkeys(row.shift for one in encoders for row in one.found.rows)
    pictures = []
    for shift in shifts:
        rows = [(one, row) for one in encoders for row in one.found.rows if row.shift == shift]
        alike = [(one, row) for one, row in rows if _line(row) == _line(rows[0][1])]
        described = "the mean accuracy under five shifts" if shift == MEAN else shift
        draw = partial(_robustness, alike, described)
        text = f"Accuracy under the shift against unshifted accuracy, logit axes, with standard models and their line: {described}"
        pictures.append(Picture(lambda width, draw=draw: draw(width=width), text, f"robustness-{shift}", paper=True))  # type: ignore[misc]
    return pictures


def robustness_mark(row: ShiftRow, name: str, role: str = "") -> Mark:
    """An encoder in the figure. The bar is the interval of its effective robustness without the scatter of standard models, which is the
    band around the line."""
    return Mark(name, row.imagenet, row.accuracy, role, y_low=row.predicted + row.line_low, y_high=row.predicted + row.line_high)


def _line(row: ShiftRow) -> tuple[object, ...]:
    """What makes two lines one. The scatter about it is unknown in results of earlier versions."""
    return row.slope, row.intercept, row.n, row.imagenet_classes, row.source


def _robustness(rows: Sequence[tuple[Robust, ShiftRow]], described: str, width: float) -> Any:
    first, row = rows[0]
    fit = row.fit()
    known = (first.found.standard_models or {}).get(row.shift) or cloud(fit) or []
    names: Mapping[str, str] = {"full": "unshifted accuracy, %", "subset": "unshifted accuracy on the classes of the shift, %"}
    return logit_scatter(
        [robustness_mark(one, robust.name, robust.role or ("this encoder" if len(rows) == 1 else "")) for robust, one in rows],
        known,
        fit.predict,
        None if math.isnan(fit.residual_std) else fit.interval,
        names[row.imagenet_classes],
        f"accuracy, %: {described}",
        width=width,
    )
