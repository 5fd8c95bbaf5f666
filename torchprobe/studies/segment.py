"""The units of a dissection on new pictures: a finished dissection and pictures in, a page and pictures with their regions out."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

import torchprobe
from torchprobe.common.files import replacing, to_json
from torchprobe.common.folders import output_folder
from torchprobe.common.messages import counted, listing
from torchprobe.common.runs import CountCallback
from torchprobe.datasets import DatasetError, image_folder
from torchprobe.datasets.geometry import GeometryError
from torchprobe.datasets.photos import read_photo
from torchprobe.dissection import Dissection
from torchprobe.dissection.detectors import Detector, NoDetectorError, caution
from torchprobe.dissection.segment import ConceptMap, PictureError, SegmentedPicture, Segmenter
from torchprobe.rendering.dissection_page import outline, reduced, thumbnail
from torchprobe.rendering.overlays import color, overlay, palette
from torchprobe.rendering.page import Fact, Section, Table
from torchprobe.rendering.segment_page import DrawnPicture, DrawnUnit, SegmentPage, write_segments
from torchprobe.rendering.tables import Column, Row, number, percent, plain_table, shown, shown_columns, text
from torchprobe.studies.dissect import earlier, file_names

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

ON_PAGE = 100
"""Pictures on the page; all of them are written as files."""

PICTURE, GRID = 640, 256
"""Longer sides of a picture on the page and of the grid on which outlines are drawn, in pixels."""

COLUMNS = (
    Column("unit", "unit", "index of the unit within the layer, from 0", "index"),
    Column("label", "concept", "the concept that its region is named after", "text"),
    Column("category", "category", "category of the concept", "text"),
    Column("iou", "IoU", "over the labeled data set: pixels where the unit is active and the concept is, over pixels where either is"),
    Column("precision", "precision", "over the labeled data set: share of the active pixels of the unit that have the concept", "share"),
    Column("recall", "recall", "over the labeled data set: share of the pixels of the concept where the unit is active", "share"),
    Column("average_precision", "AP", "average precision: how well the unit ranks the images that show the concept first", optional=True),
    Column("p_value", "p of IoU", "corrected for all pairs of units and concepts", optional=True),
    Column("threshold", "threshold", "the level that active values exceed"),
    Column("pictures", "pictures", "new pictures in which the unit is active", "count"),
    Column("caveat", "but", "what speaks against the name", "text", optional=True),
)

SUMMARY = (
    "Where units of the layer are above their thresholds on new pictures. Each region is named after the concept that the unit overlapped "
    "in a labeled data set. Nothing is known here about whether the name holds on these pictures."
)


def find_pictures(given: Iterable[str | os.PathLike[str]]) -> list[tuple[str, Path]]:
    """The names and paths of pictures; of folders, all pictures in them.

    Raises:
        DatasetError: there is no such file, or a folder without pictures.
    """
    found: list[tuple[str, Path]] = []
    for path in map(Path, [given] if isinstance(given, (str, os.PathLike)) else given):
        if path.is_dir():
            folder = image_folder(path)
            found += [(folder.name(one), one) for one in folder.paths]
        elif path.is_file():
            found.append((path.name, path))
        else:
            raise DatasetError(f"there is no picture at {path}")
    return found


def find_dissections(path: str | os.PathLike[str], layers: Sequence[str] = ()) -> dict[str, Dissection]:
    """The layers of a folder of ``torchprobe dissect``, or of one file of :meth:`Dissection.save`.

    Raises:
        ValueError: the folder has no finished dissection, a file is damaged, or a layer is not among them.
        FileNotFoundError: the file does not exist.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no dissection at {path}: name the --out folder of torchprobe dissect, or a file of one layer")
    if Path(path).is_dir():
        found: dict[str, Dissection] = next(iter(earlier([path]).values()))
    else:
        one = Dissection.load(path)
        found = {one.layer: one}
    if unknown := [layer for layer in layers if layer not in found]:
        raise ValueError(f"{path} has no layer {unknown[0]!r}; it has {listing([*found])}")
    return {layer: one for layer, one in found.items() if not layers or layer in layers}


def segment_folder(
    dissections: Mapping[str, Dissection],
    model: nn.Module,
    pictures: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    maps: bool = False,
    overwrite: bool = False,
    progress: CountCallback | None = None,
    **options: Any,
) -> dict[str, Segments]:
    """Draws the units of each layer on pictures. For each layer, ``out`` then holds a page ``<layer>.html``, numbers ``<layer>.json``, and
    ``<layer>/<picture>.png``, where the color of a pixel is the concept of the most certain unit that is active there.

    Args:
        dissections: see :func:`find_dissections`.
        model: the network of the dissections.
        pictures: files and folders.
        out: a folder; created if missing.
        maps: also write ``<layer>/concepts/<picture>.png`` with the number of the concept of each pixel, and ``.json`` with the names.
        overwrite: replace the results of another run in ``out``; its files are removed, and no others.
        progress: called with (pictures done, pictures in all), all layers together.
        options: for :func:`torchprobe.dissection.segment.segment_pictures`.

    Returns:
        Layer → :class:`Segments`. A layer without any detector is left out with a warning, if another layer has some.

    Raises:
        DatasetError: no picture can be read and drawn. If some can, the others are named in the result and on the page.
        ValueError: see :func:`torchprobe.dissection.segment.segment_pictures`.
        OtherRunError: ``out`` holds another run.
    """
    found = find_pictures(pictures)
    of = next((str(dissection.metadata.get("model", "")) for dissection in dissections.values()), "")
    with output_folder(out, "segment", of=of, overwrite=overwrite, inputs=[path for _, path in found]) as folder:
        return _draw(dissections, model, found, folder, maps, progress, options)


def _draw(
    dissections: Mapping[str, Dissection],
    model: nn.Module,
    found: Sequence[tuple[str, Path]],
    folder: Path,
    maps: bool,
    progress: CountCallback | None,
    options: Mapping[str, Any],
) -> dict[str, Segments]:
    results: dict[str, Segments] = {}
    names, missing = file_names(dissections), list[NoDetectorError]()
    for before, (layer, dissection) in enumerate(dissections.items()):
        try:
            segmenter = Segmenter(dissection, model, **options)
        except NoDetectorError as error:
            missing.append(error)
            continue
        segments = results[layer] = Segments(dissection, folder, names[layer], maps)
        segments.detectors = segmenter.detectors
        with segmenter:
            for done, (name, path) in enumerate(found, 1):
                segments.draw(segmenter, name, path)
                if progress is not None:
                    progress(before * len(found) + done, len(dissections) * len(found))
        segments.finish()
    if not results and missing:
        raise missing[0]
    for problem in missing:
        warnings.warn(str(problem), stacklevel=2)
    return results


class Segments:
    """The pictures of one layer, while they are drawn, and their files.

    Attributes:
        detectors: the units, most certain first.
        pictures: one dict for each picture: name, size, files, and the units that are active there with their shares.
        unreadable: the name of each picture that could not be read or drawn, and why.
        files: by kind: the page, the numbers and the folder of pictures.
    """

    def __init__(self, dissection: Dissection, folder: Path, name: str, maps: bool) -> None:
        self.dissection, self.folder, self.name, self.maps = dissection, folder, name, maps
        self.detectors: Sequence[Detector] = ()
        self.pictures: list[dict[str, Any]] = []
        self.unreadable: list[tuple[str, str]] = []
        self.files: dict[str, Path] = {}
        self._drawn: list[DrawnPicture] = []
        self._taken: set[str] = set()

    def draw(self, segmenter: Segmenter, name: str, path: Path) -> None:
        """Adds one picture and writes its files."""
        try:
            picture = segmenter.segment(read_photo(path), name)
        except (DatasetError, GeometryError, PictureError) as error:
            self.unreadable.append((name, str(error)))
            return
        concepts, stem = picture.concept_map(), self._free(name)
        folder = self.folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        lines = {region.detector.concept: _line(region.detector) for region in reversed(picture.active)}
        legend = {n: lines[concepts.names[n]] for n in np.unique(concepts.numbers).tolist() if concepts.names[n] in lines}
        _save(overlay(picture.image, concepts.numbers, legend, picture.shown), folder / f"{stem}.png")
        record = {"name": name, "width": picture.size[0], "height": picture.size[1], "file": f"{self.name}/{stem}.png"}
        if self.maps:
            write_concept_map(concepts, folder / "concepts" / stem)
            record["concepts"] = f"{self.name}/concepts/{stem}.png"
        units = [{"unit": r.detector.unit, "concept": r.detector.concept, "share": r.share, "largest": r.largest} for r in picture.active]
        self.pictures.append({**record, "shown": list(picture.box), "units": units})
        if len(self._drawn) < ON_PAGE:
            self._drawn.append(self._on_page(picture))

    def finish(self) -> None:
        """Writes the page and the numbers.

        Raises:
            DatasetError: no picture could be drawn.
        """
        if not self.pictures:
            raise DatasetError("no picture could be drawn: " + "; ".join(why for _, why in self.unreadable[:3]))
        rows = [asdict(detector) for detector in self.detectors]
        value = {"layer": self.dissection.layer, "caution": caution(self.dissection), "units": rows, "pictures": self.pictures}
        with replacing(self.folder / f"{self.name}.json") as temporary:
            temporary.write_text(to_json({**value, "unreadable": [list(pair) for pair in self.unreadable]}), encoding="utf-8")
        page = write_segments(self.page(), self.folder / f"{self.name}.html")
        self.files = {"pictures": self.folder / self.name, "numbers": self.folder / f"{self.name}.json", "page": page}

    def rows(self) -> list[Row]:
        """One row for each unit, with the columns :data:`COLUMNS`."""
        active = [(found["unit"], found["concept"]) for picture in self.pictures for found in picture["units"]]
        return [{**asdict(one), "pictures": active.count((one.unit, one.concept))} for one in self.detectors]

    def page(self) -> SegmentPage:
        """The page."""
        d, count = self.dissection, len(self.pictures)
        notices = [caution(d)]
        if self.unreadable:
            notices.append(
                f"{counted(len(self.unreadable), 'picture')} could not be drawn: {listing([name for name, _ in self.unreadable])}."
            )
        if count > ON_PAGE:
            notices.append(f"The page shows the first {ON_PAGE} of {count:,} pictures; all are in the folder {self.name}.")
        return SegmentPage(
            kind="segments",
            title=f"{d.metadata.get('model', 'model')} · {d.layer or 'output'}",
            summary=SUMMARY,
            notice=" ".join(filter(None, notices)),
            facts=[
                Fact("Pictures", number(count)),
                Fact("Units", number(len(self.detectors)), f"of {number(d.units)}"),
                Fact("Concepts", number(len(self._concepts())), listing(self._concepts(), 6)),
            ],
            sections=[
                Section("The units", ["Numbers are those of the labeled data set."], tables=[Table(self.rows(), COLUMNS)]),
                _reading(),
            ],
            footer=[f"torchprobe {torchprobe.__version__}, Python {platform.python_version()}."],
            pictures=self._drawn,
            note="The large picture shows all active units, the most certain ones on top. Below, each unit alone: its region is bright.",
        )

    def _on_page(self, picture: SegmentedPicture) -> DrawnPicture:
        grid = reduced(picture.shown, GRID)
        concepts = self._concepts()
        units = [
            DrawnUnit(
                region.detector.concept,
                f"unit {region.detector.unit} · IoU {number(region.detector.iou, 2)} · precision {percent(region.detector.precision, 2)}"
                + ("" if (ap := region.detector.average_precision) is None else f" · AP {number(ap, 2)}")
                + f" · {percent(region.share, 2)} of the picture",
                outline(reduced(region.mask, GRID)),
                color(concepts.index(region.detector.concept)),
                region.detector.caveat,
            )
            for region in picture.active
        ]
        note = (
            f"{number(picture.size[0])} × {number(picture.size[1])} pixels. {len(units)} of {counted(len(picture.regions), 'unit')} active."
        )
        whole = bool(picture.shown.all())
        if not whole:
            note += " The network was not shown the dark part."
        shape = (grid.shape[0], grid.shape[1])
        return DrawnPicture(thumbnail(picture.image, picture.name, shape, PICTURE), note, units, "" if whole else outline(grid))

    def _concepts(self) -> list[str]:
        return list(dict.fromkeys(detector.concept for detector in self.detectors))

    def _free(self, name: str) -> str:
        """A file name without suffix that is valid on every system and not taken yet."""
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).with_suffix("").as_posix()).strip(".")[:100] or "picture"
        free, count = plain, 1
        while free.lower() in self._taken:
            count += 1
            free = f"{plain}-{count}"
        self._taken.add(free.lower())
        return free


def write_concept_map(concepts: ConceptMap, path: Path) -> None:
    """Writes ``path`` with .png: the number of the concept of each pixel, with 8 bits and colors or, for 256 numbers or more, gray of 16
    bits; and ``path`` with .json: the names."""
    from PIL import Image as pil

    path.parent.mkdir(parents=True, exist_ok=True)
    if max(concepts.names) < 256:
        image = pil.fromarray(concepts.numbers.astype(np.uint8))
        image.putpalette(palette(max(concepts.names)))
    else:
        image = pil.fromarray(concepts.numbers)
    _save(image, path.with_name(f"{path.name}.png"))
    with replacing(path.with_name(f"{path.name}.json")) as temporary:
        temporary.write_text(to_json(concepts.names), encoding="utf-8")


def print_segments(found: Mapping[str, Segments], out: Console) -> None:
    """Prints for each layer its units, and what could not be read."""
    for layer, segments in found.items():
        out.print(text(f"{layer or '(output)'}: {counted(len(segments.pictures), 'picture')}", "bold"))
        rows = segments.rows()
        columns = shown_columns(rows, COLUMNS)
        table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
        for row in rows:
            table.add_row(*(text(shown(row, column)) for column in columns))
        out.print(table)
        out.print(text(caution(segments.dissection)))


def _line(detector: Detector) -> str:
    """A line of the legend of a picture."""
    caveat = f" ({detector.caveat})" if detector.caveat else ""
    return f"{detector.concept}: unit {detector.unit}, IoU {number(detector.iou, 2)}{caveat}"


def _reading() -> Section:
    return Section(
        "How to read this",
        terms=[
            ("region", "The map of the unit, resized to the picture, exceeds the threshold of the unit, which comes from the data set."),
            (
                "most certain",
                "The unit with the highest IoU over the labeled data set. It gives a pixel its concept; elsewhere it is unsure.",
            ),
            (
                "precision",
                "The share of the active pixels of the unit that had the concept, in annotated images of the data set. On other "
                "pictures it may be lower. A unit is active on a small share of all positions, so an empty region does not say that "
                "the concept is absent.",
            ),
        ],
    )


def _save(image: Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, "PNG")
