"""The page of one layer and words: what its units agree with, their top images, and what the labels are worth."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import torchprobe
from torchprobe.common.messages import counted, listing
from torchprobe.common.runs import CountCallback
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.protocol import ImageSet
from torchprobe.dissection.report_sparse import ACTIVE, DENSITY_COLUMNS, UNITS_OF, density_facts, kind_of
from torchprobe.dissection.words.measures import TopPrecision
from torchprobe.dissection.words.passes import images_fact
from torchprobe.dissection.words.soft_labels import CAVEAT
from torchprobe.dissection.words.word_tables import UnitWord, WordTables
from torchprobe.rendering.dissection_page import CategoryBar, DissectionPage, Shown, Thumbnail, UnitRow, thumbnail, write_dissection
from torchprobe.rendering.page import Fact, Section, Table, require
from torchprobe.rendering.tables import Column, Row, number, percent

OTHERS = 4
"""Further concepts that a row names."""

UNITS_NAMED = 12
"""Units that the table of concepts names."""

WORKERS = 2
"""Threads that decode images."""

SUMMARY = (
    "Which words does the activation of each unit agree with, over images without labels? Another model, the labeler, says how much each "
    "image shows each word. The word of a unit is the one that it agrees with most."
)

CHANCE = (
    "The p-values say that units agree with the labeler more than they would if the images were permuted. Units of a network with random "
    "weights do, too: they respond to color and contrast. What training adds shows in comparison with such a network, and with a random "
    "rotation."
)
NO_NULL = "No null was given for this page."

MEASURE_TERMS = {
    "soft_wpmi": "Soft weighted pointwise mutual information: how probable the top images of the unit are if the word is the concept, "
    "compared with the average unit. The first images count as more certain.",
    "wpmi": "Weighted pointwise mutual information: how probable the top images of the unit are if the word is the concept, compared with "
    "the average unit.",
    "cosine_cubed": "The cosine of activations and soft labels over the images, both centered and cubed.",
    "rank_reorder": "Minus the error of the activations of the top images if they are put into the order of the soft labels, divided by "
    "that of a random order, and by a power of the mean soft label.",
    "average_precision": "Average precision of the activations, if the images with the highest soft labels show the word.",
}

OWN = "this layer"
COMPARISON = (
    Column("layer", "", "which network", "text"),
    Column("units", "units", "units, directions or latents", "count"),
    Column("matched_units", "matched", "units whose best word is significant for all units and words together", "count"),
    Column("share", "share", "their share of all units", "share"),
    Column("matched_concepts", "words", "distinct best words of these units", "count"),
    Column("undefined_units", "undefined", "units without a score: their activations are equal for all images", "count", optional=True),
    Column("density", "density", "share of positions where a latent is active, median over latents", "share", optional=True),
    Column("dead", "dead", "latents that are active in no image", "count", optional=True),
)

CONCEPT_COLUMNS = (
    Column("concept", "word", "best word of these units, significantly", "text"),
    Column("kind", "kind", "kind of the word", "text"),
    Column("units", "units", "number of units", "count"),
    Column("which", "which", "their indices, best unit first", "text"),
)


@dataclass
class WordsReport:
    """The tables of a page.

    Attributes:
        dissection: of the layer.
        nulls: name → the same layer in conditions where its units cannot know the words: random weights, a random rotation.
        alpha: the level at which a unit matches a word, for all units and words together.
    """

    dissection: WordTables
    nulls: Mapping[str, WordTables] = field(default_factory=dict)
    alpha: float = 0.05

    @cached_property
    def best(self) -> list[UnitWord]:
        """One for each unit."""
        return self.dissection.best()

    def matches(self, row: UnitWord) -> bool:
        """Whether the best word of a unit is significant."""
        return row.adjusted is not None and row.adjusted <= self.alpha

    def bars(self) -> list[CategoryBar]:
        """Each unit that matches its best word, once; kinds in the order of the list."""
        counts = Counter((row.kind, row.concept) for row in self.best if self.matches(row))
        kinds = [kind for kind in dict.fromkeys(self.dissection.concepts.kinds) if any(kind == of for of, _ in counts)]
        return [CategoryBar(kind or "words", [(word, n) for (of, word), n in counts.most_common() if of == kind]) for kind in kinds]

    def columns(self) -> list[Column]:
        """The columns of the table of units."""
        measure = self.dissection.metadata.get("measure", {}).get("name", "score")
        columns = [
            Column("unit", "unit", "index of the unit within the layer, from 0", "index"),
            Column("label", "word", "the word with the highest score of the unit", "text"),
            Column("category", "kind", "kind of the word", "text", optional=True),
            Column("score", str(measure).replace("_", " "), MEASURE_TERMS.get(measure, "the measure")),
            Column("p", "p", "probability that an unrelated unit reaches this score; for this pair alone"),
            Column("adjusted", "adjusted p", "probability that any unrelated pair of unit and word does as well as this pair"),
            Column("matches", "matches", f"words with an adjusted p of at most {self.alpha:g}", "count"),
        ]
        if self.dissection.density is not None:
            columns += DENSITY_COLUMNS
        return [*columns, Column("others", "then", "the next best words", "text")]

    def units(self, shown: dict[int, list[Shown]] | None = None) -> list[UnitRow]:
        """One row for each unit, the most significant first."""
        d = self.dissection
        values, index = (part.tolist() for part in d.ranked(OTHERS + 1))
        matches = d.matched(self.alpha).sum(1).tolist()
        shares = [{}] * d.units if d.density is None else d.density.rows()
        rows = []
        for row in self.best:
            found = [] if row.index < 0 else list(zip(index[row.unit], values[row.unit], strict=True))[1:]
            cells: dict[str, Any] = {
                "unit": row.unit,
                "label": row.concept,
                "category": row.kind or ("words" if row.concept else ""),
                "score": row.score,
                "p": row.p,
                "adjusted": row.adjusted,
                "matches": matches[row.unit],
                "others": ", ".join(f"{d.concepts.names[i]} {number(value, 2)}" for i, value in found),
                "detector": self.matches(row),
                **shares[row.unit],
            }
            search = " ".join(d.concepts.names[i] for i, _ in found)
            rows.append(UnitRow(cells, (shown or {}).get(row.unit, ()), search))
        return rows

    def concepts(self) -> list[Row]:
        """One row for each word that units match, with these units."""
        kind = dict(zip(self.dissection.concepts.names, self.dissection.concepts.kinds, strict=True))
        return [
            {"concept": word, "kind": kind[word], "units": len(units), "which": listing([str(unit) for unit in units], UNITS_NAMED)}
            for word, units in self.dissection.named(self.alpha).items()
        ]

    def comparison(self) -> list[Row]:
        """The layer and its nulls, one row for each, with the columns :data:`COMPARISON`."""
        rows: list[Row] = []
        for name, d in {OWN: self.dissection, **self.nulls}.items():
            row: dict[str, Any] = {**d.summary(self.alpha), "layer": name}
            row["share"] = row["matched_units"] / row["units"]
            if d.density is not None:
                row |= {"density": row["density"]["median"], "dead": row["density"]["dead"]}
            rows.append(row)
        return rows

    def facts(self) -> list[Fact]:
        """The numbers at the head of the page."""
        d, summary = self.dissection, self.dissection.summary(self.alpha)
        units = summary["matched_units"]
        note = f"{percent(units / d.units, 2)}; significant at {self.alpha:g} for all units and words together"
        undefined = f"{number(summary['undefined_units'])} have no score" if summary["undefined_units"] else ""
        return [
            Fact(UNITS_OF[kind_of(d.metadata.get("basis"))], number(d.units), undefined),
            Fact("Matched with a word", number(units), note),
            Fact("Words matched", number(summary["matched_concepts"]), f"of {number(len(d.concepts))}"),
            Fact("Images", number(len(d.images)), str(d.metadata.get("dataset", {}).get("name", ""))),
            *density_facts(d.density),
        ]

    def notice(self) -> str:
        """What the page says first."""
        own = (
            " Here the labeler is the network itself, so it may agree with itself."
            if self.dissection.metadata.get("labeler_is_model")
            else ""
        )
        return f"Labeler: {self.dissection.metadata.get('labeler', 'unknown')}. {CAVEAT}{own}"

    def reading(self) -> Section:
        """Choices and definitions."""
        m = self.dissection.metadata
        measure = m.get("measure", {})
        numbers = ", ".join(f"{key} {value:g}" for key, value in measure.items() if isinstance(value, (int, float)))
        null = (
            "The null is a random ranking of the images, corrected by Holm's method for all units and words."
            if measure.get("name") == TopPrecision.name
            else "The null is a unit that is unrelated to the words: its activations are permuted over the images, "
            f"{m.get('permutations')} times, all units alike. For all pairs together, the largest statistic of each permutation is "
            f"compared (maxT). No p-value is below {1 / (1 + (m.get('permutations') or 1)):.2g}."
        )
        unreadable = m.get("unreadable") or []
        terms = [
            ("score", f"{MEASURE_TERMS.get(measure.get('name', ''), '')} {numbers and f'Numbers: {numbers}.'}"),
            ("p, adjusted p", f"{null} A small p-value says that unit and labeler agree, not that the labeler is right."),
            ("activation of an image", f"The {m.get('pooling', 'mean')} over its positions ({m.get('positions', 'all')})."),
            ("labeler", f"{m.get('labeler', 'unknown')}. Captions: {_captions(m.get('templates'))}"),
            (
                "limits",
                "The words are correlational: a unit may agree with a word because of something that goes with it in these images. A "
                "concept that is not on the list cannot be found, and the nearest word is named in its place. Images from one source are "
                "not independent.",
            ),
        ]
        if self.dissection.density is not None:
            terms.insert(3, ("active", ACTIVE))
        if unreadable:
            names = listing([name for name, _ in unreadable], 5)
            terms.append(("left out", f"{counted(len(unreadable), 'file')} that could not be read: {names}."))
        terms += [("remark", remark) for remark in m.get("concepts", {}).get("remarks", [])]
        return Section("How to read this", terms=terms)

    def page(self, thumbnails: Sequence[Thumbnail] = (), shown: dict[int, list[Shown]] | None = None) -> DissectionPage:
        """The whole page."""
        d = self.dissection
        concepts = self.concepts()
        lead = [Section("Words and their units", tables=[Table(concepts, CONCEPT_COLUMNS)])] if concepts else []
        chance = [CHANCE] if self.nulls else [CHANCE, NO_NULL]
        lead.append(Section("Compared with chance", chance, tables=[Table(self.comparison(), COMPARISON)] if self.nulls else []))
        note = "All units, the most significant first; click on a column head to sort. A number in the search field is the index of a unit."
        pictures = (
            " The pictures are the images with the highest activations of the unit." if shown else " The page was made without pictures."
        )
        return DissectionPage(
            kind="words",
            title=f"{d.metadata.get('model', 'model')} · {d.layer or 'output'}",
            summary=SUMMARY,
            notice=self.notice(),
            facts=self.facts(),
            lead=lead,
            sections=[self.reading()],
            footer=_footer(d),
            bars=self.bars(),
            bars_note="Each unit whose best word is significant, counted once, with that word. A bar shows the number of units; a click "
            "lists them.",
            units=self.units(shown),
            units_note=note + pictures,
            columns=self.columns(),
            thumbnails=thumbnails,
            annotated=False,
            detectors="matched only",
        )


def write_words_report(
    dissection: WordTables,
    path: str | os.PathLike[str],
    images: ImageSet | None = None,
    *,
    nulls: Mapping[str, WordTables] | None = None,
    top_images: int = 5,
    units: Sequence[int] | None = None,
    alpha: float = 0.05,
    progress: CountCallback | None = None,
) -> Path:
    """Writes one self-contained HTML page about a layer, and returns the path.

    Args:
        dissection: of the layer.
        path: the file.
        images: those of the dissection; without them the page has no pictures.
        nulls: name → the same layer in conditions to compare with: random weights, a random rotation.
        top_images: how many of the top images are shown for each unit.
        units: units whose pictures are shown; default: all.
        alpha: the level at which a unit matches a word.
        progress: called with (pictures done, pictures in all).

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is missing; the message has the command.
        DatasetError: an image is missing or cannot be read, or these are not the images of the dissection, by their names and sizes.
        ValueError: a unit that the layer does not have.
    """
    require()
    if units is not None and (wrong := [unit for unit in units if not 0 <= unit < dissection.units]):
        raise ValueError(f"layer {dissection.layer!r} has the units 0 to {dissection.units - 1}, got {wrong[0]}")
    thumbnails: list[Thumbnail] = []
    shown: dict[int, list[Shown]] = {}
    if images is not None and dissection.top is not None and top_images > 0:
        wanted = range(dissection.units) if units is None else units
        thumbnails, shown = _pictures(dissection, images, wanted, top_images, progress)
    return write_dissection(WordsReport(dissection, nulls or {}, alpha).page(thumbnails, shown), path)


def _pictures(
    dissection: WordTables, images: ImageSet, units: Sequence[int], count: int, progress: CountCallback | None
) -> tuple[list[Thumbnail], dict[int, list[Shown]]]:
    """Each picture once, and the pictures of each unit."""
    assert dissection.top is not None
    ids, scores = (part[:, :count] for part in dissection.top)
    used = torch.unique(ids[list(units)])
    used = used[used >= 0].tolist()
    path = {images.name(file): file for file in images.paths}
    if missing := [dissection.images[i] for i in used if dissection.images[i] not in path]:
        raise DatasetError(f"{len(missing)} of the top images are not among the images given: {listing(missing, 3)}")
    _check_images(dissection, images)
    thumbnails = []
    for done, found in enumerate(_thumbnails(images, [(dissection.images[i], path[dissection.images[i]]) for i in used]), 1):
        thumbnails.append(found)
        if progress is not None:
            progress(done, len(used))
    at = {image: i for i, image in enumerate(used)}
    shown = {
        unit: [Shown(at[i], score) for i, score in zip(ids[unit].tolist(), scores[unit].tolist(), strict=True) if i >= 0] for unit in units
    }
    return thumbnails, shown


def _check_images(dissection: WordTables, images: ImageSet) -> None:
    made = dissection.metadata.get("dataset", {})
    if "digest" in made and made["digest"] != images_fact(images):
        raise DatasetError(
            f"these are not the images of the dissection, which are {counted(made['images'], 'image')} of {made['name']}: some have other "
            "names or sizes, or there are more or fewer: give the same"
        )


def _thumbnails(images: ImageSet, files: Sequence[tuple[str, Any]]) -> Iterator[Thumbnail]:
    def make(file: tuple[str, Any]) -> Thumbnail:
        name, path = file
        try:
            return thumbnail(images.picture(path), name, (1, 1))
        except Exception as error:  # a decoder may raise anything on damaged bytes
            raise DatasetError(f"{name} cannot be read: {error}") from error

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="torchprobe-images") as threads:
        yield from threads.map(make, files)


def _captions(templates: Any) -> str:
    if not isinstance(templates, dict) or not templates:
        return "unknown; the soft labels were given."
    first = next(iter(templates.values()))
    several = (
        "" if len({tuple(each) for each in templates.values()}) == 1 else " for the first kind; other kinds have captions of their own"
    )
    return f"{listing([f'“{caption}”' for caption in first], 6)}{several}."


def _footer(d: WordTables) -> list[str]:
    keys = ("positions", "pooling", "permutations", "batch_size", "seed")
    settings = [f"{key} {d.metadata[key]}" for key in keys if d.metadata.get(key) is not None]
    lines = [f"torchprobe {torchprobe.__version__}, torch {torch.__version__}, Python {platform.python_version()}."]
    return [*lines, f"Settings: {', '.join(settings)}."] if settings else lines
