"""Which words do the units of an encoder agree with? A folder of images without labels in, a folder with tables and pages out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchprobe.common.files import replacing, to_json
from torchprobe.common.folders import output_folder
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import CountCallback
from torchprobe.datasets import ImageSet, open_images
from torchprobe.dissection.walk import clear_checkpoint
from torchprobe.dissection.words import SoftLabels, WordDissection, dissect_words
from torchprobe.dissection.words.report import COMPARISON, OWN, WordsReport
from torchprobe.rendering.tables import Column, Row, number, plain_table, shown, shown_columns, text
from torchprobe.studies.dissect import SHOWN_UNITS, earlier_results, file_names, require_unfinished

if TYPE_CHECKING:
    from rich.console import Console

WORDS = "words"
"""The command whose output folder holds dissections with words."""

_CHECKPOINT = "checkpoint"
LABELS = "soft-labels.safetensors"
"""The soft labels of a run, for ``--labels`` of another."""

Nulls = Mapping[str, Mapping[str, WordDissection]]
"""Name → layer → result."""


def words_folder(
    encoder: nn.Module,
    images: ImageSet | str | os.PathLike[str] | Any,
    layers: str | Iterable[str],
    out: str | os.PathLike[str],
    labeler: Any,
    concepts: Any = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    pages: Callable[[dict[str, WordDissection]], object] | None = None,
    **options: Any,
) -> dict[str, WordDissection]:
    """Dissects layers with words and writes its files: for each layer ``<layer>.safetensors`` (see :meth:`WordDissection.load`) and
    ``<layer>.csv``; for all layers ``summary.json``; and :data:`LABELS`, unless soft labels were given.

    During the run, checkpoints are in ``out/checkpoint``; they are deleted at the end. Under ``torchrun`` all ranks call this with a folder
    that all of them see; the first rank writes.

    Args:
        encoder, images, layers, labeler, concepts: see :func:`torchprobe.dissection.words.dissect_words`.
        out: a folder; created if missing.
        resume: resume an interrupted run in ``out``; without one, a new run starts.
        overwrite: replace the results of another run in ``out``; its files are removed, and no others.
        pages: called on the first rank with the results, to write what belongs to them, as :func:`write_word_pages` does. The run ends
            with it: one that is interrupted here is resumed here.
        options: for :func:`torchprobe.dissection.words.dissect_words`.

    Raises:
        OtherRunError: ``out`` holds a run, and neither ``resume`` nor ``overwrite`` is given.
        ValueError: ``out`` holds a finished run and ``resume`` is True; and the errors of
            :func:`torchprobe.dissection.words.dissect_words`.
    """
    folder = Path(out)
    if resume:
        require_unfinished(folder, folder / _CHECKPOINT)
    files = open_images(images)
    selected = layers if isinstance(layers, str) else list(layers)
    saved = None if isinstance(labeler, SoftLabels) else folder / LABELS
    of, read = str(getattr(encoder, "name", type(encoder).__name__)), [files.root]
    with Ranks() as ranks, output_folder(folder, WORDS, of=of, resume=resume, overwrite=overwrite, inputs=read, ranks=ranks):
        results = dissect_words(
            encoder, selected, files, labeler, concepts, checkpoint=folder / _CHECKPOINT, resume=resume, save_labels=saved, **options
        )
        if ranks.first:
            names = file_names(results)
            for layer, result in results.items():
                result.save(folder / f"{names[layer]}.safetensors")
                result.to_csv(folder / f"{names[layer]}.csv")
            summary = {"layers": [{"file": names[layer], **result.summary()} for layer, result in results.items()]}
            with replacing(folder / "summary.json") as temporary:
                temporary.write_text(to_json(summary), encoding="utf-8")
            if pages is not None:
                pages(results)
            clear_checkpoint(folder / _CHECKPOINT)
        ranks.barrier()
    return results


def write_word_pages(
    folder: str | os.PathLike[str],
    results: Mapping[str, WordDissection],
    images: ImageSet,
    nulls: Nulls | None = None,
    top_images: int = 5,
    progress: CountCallback | None = None,
) -> dict[str, Path]:
    """Writes ``<layer>.html`` for each layer; returns {layer: path}.

    Args:
        folder: where to write.
        results: see :func:`words_folder`.
        images: those of the results.
        nulls: results to compare with; each is shown for the layers that it has.
        top_images: top images of each unit.
        progress: called with (pages done, pages in all).
    """
    names, files = file_names(results), {}
    with output_folder(folder, WORDS, resume=True):
        for done, (layer, result) in enumerate(results.items(), 1):
            path = Path(folder) / f"{names[layer]}.html"
            files[layer or "(output)"] = result.report(path, images, nulls=_of_layer(nulls or {}, layer), top_images=top_images)
            if progress is not None:
                progress(done, len(results))
    return files


def print_words(results: Mapping[str, WordDissection], out: Console, nulls: Nulls | None = None, is_null: bool = False) -> None:
    """Prints each layer and its nulls; for a single layer also the most significant units; and the caveat.

    Args:
        results: layer → result.
        out: where to print.
        nulls: results to compare with.
        is_null: whether this is a null itself; then none is asked for.
    """
    reports = [WordsReport(result, _of_layer(nulls or {}, layer)) for layer, result in results.items()]
    rows = []
    for report in reports:
        name = report.dissection.layer or "(output)"
        rows += [{**row, "layer": name if row["layer"] == OWN else f"  {row['layer']}"} for row in report.comparison()]
    _print(shown_columns(rows, COMPARISON), rows, out)
    if len(reports) == 1:
        units = [unit.values for unit in reports[0].units()[:SHOWN_UNITS]]
        _print([column for column in reports[0].columns() if column.key != "others"], units, out)
    facts = reports[0].dissection.metadata
    if facts.get("unreadable"):
        out.print(text(f"{number(len(facts['unreadable']))} files could not be read; metadata and page name them."))
    if not nulls and not is_null:
        out.print(text("No null was given. Run with --random-init and with --rotate as well, and name those folders with --null."))
    out.print(text(reports[0].notice()))


def earlier_words(folders: Iterable[str | os.PathLike[str]]) -> dict[str, dict[str, WordDissection]]:
    """Earlier results, by the name of their folder and by layer; see :func:`words_folder`.

    Raises:
        ValueError: a folder does not hold finished results, or holds damaged ones.
    """
    return earlier_results(folders, WordDissection.load)


def _of_layer(nulls: Nulls, layer: str) -> dict[str, WordDissection]:
    return {name: layers[layer] for name, layers in nulls.items() if layer in layers}


def _print(columns: Sequence[Column], rows: Sequence[Row], out: Console) -> None:
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(shown(row, column)) for column in columns))
    out.print(table)
