"""What do the units of an encoder detect? A folder in the format of Broden in, a folder with tables and pages for every layer out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from torchprobe.analysis.interpolation import recalibrate_batch_norms
from torchprobe.common.deprecation import renamed
from torchprobe.common.files import replacing, to_json
from torchprobe.common.folders import output_folder, record
from torchprobe.common.messages import listing
from torchprobe.common.ranks import Ranks
from torchprobe.common.reading import read_json
from torchprobe.common.runs import CountCallback
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, WordDissection, dissect, random_rotation
from torchprobe.dissection.activity import explanation
from torchprobe.dissection.batches import Preprocess, find_preprocess, stack, to_tensor
from torchprobe.dissection.report import Report, write_report
from torchprobe.dissection.report_images import caption
from torchprobe.dissection.report_text import COMPARISON, OWN
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.walk import clear_checkpoint
from torchprobe.rendering.tables import Column, Row, number, plain_table, shown, shown_columns, text, write_csv
from torchprobe.studies.calibration import CALIBRATION

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["dissect_folder", "earlier", "file_names", "print_dissections", "recalibrate", "write", "write_pages"]

DISSECT = "dissect"
"""The command whose output folder holds dissections."""

_CHECKPOINT = "checkpoint"
_UNITS = ("encoded_by", "detected_by")

Result = TypeVar("Result", Dissection, WordDissection)

Nulls = Mapping[str, Mapping[str, Dissection]]
"""Name → layer → dissection."""

SHOWN_UNITS = 8
"""Units in a table for the terminal."""


def dissect_folder(
    encoder: nn.Module,
    broden: Broden | str | os.PathLike[str],
    layers: str | Iterable[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    pages: Callable[[dict[str, Dissection]], object] | None = None,
    **options: Any,
) -> dict[str, Dissection]:
    """Dissects layers of an encoder and writes its files: for each layer ``<layer>.safetensors`` (see :meth:`Dissection.load`),
    ``<layer>.csv`` (IoU, with the columns of the original) and ``<layer>-ap.csv``, and
    ``<layer>-concepts.csv`` with the units of each concept; for all layers one ``summary.json``.

    During the run, checkpoints are in ``out/checkpoint``; they are deleted at the end. Under ``torchrun`` all ranks call this with a folder
    that all of them see; the first rank writes.

    Args:
        encoder: see :func:`torchprobe.dissection.dissect`.
        broden: the data set, or its folder.
        layers: names or globs.
        out: a folder; created if missing.
        resume: resume an interrupted run in ``out``; without one, a new run starts.
        overwrite: replace the results of another run in ``out``; its files are removed, and no others.
        pages: called on the first rank with the results, to write what belongs to them, as :func:`write_pages` does. The run ends with it:
            one that is interrupted here is resumed here.
        options: for :func:`torchprobe.dissection.dissect`, such as ``batch_size``, ``progress`` and ``stop``.

    Raises:
        OtherRunError: ``out`` holds a run, and neither ``resume`` nor ``overwrite`` is given.
        ValueError: ``out`` holds a finished run and ``resume`` is True; and the errors of :func:`torchprobe.dissection.dissect`.

    >>> import tempfile, numpy as np, torch
    >>> from torchprobe.datasets import BrodenWriter
    >>> folder, out, rng = tempfile.mkdtemp(), Path(tempfile.mkdtemp()), np.random.default_rng(0)
    >>> with BrodenWriter(folder, {"object": ["sky", "sea"]}, size=32) as writer:
    ...     for i in range(4):
    ...         writer.add(f"mine/{i}", rng.integers(0, 256, (32, 32, 3), np.uint8), {"object": np.eye(16, dtype=int) + i % 2})
    >>> def to_tensor(image):
    ...     return torch.from_numpy(np.array(image)).movedim(2, 0) / 255
    >>> _ = dissect_folder(nn.Sequential(nn.Conv2d(3, 8, 5, stride=4)), folder, "0", out, preprocess=to_tensor, quantile=0.05)
    >>> sorted(path.name for path in out.iterdir() if path.is_file())
    ['0-ap.csv', '0-concepts.csv', '0.csv', '0.safetensors', 'summary.json']
    """
    broden = broden if isinstance(broden, Broden) else Broden(broden)
    selected = layers if isinstance(layers, str) else list(layers)
    folder, of = Path(out), str(getattr(encoder, "name", type(encoder).__name__))
    if resume:
        require_unfinished(folder, folder / _CHECKPOINT)
    with Ranks() as ranks, output_folder(folder, DISSECT, of=of, resume=resume, overwrite=overwrite, inputs=[broden.root], ranks=ranks):
        results = dissect(encoder, selected, broden, checkpoint=folder / _CHECKPOINT, resume=resume, **options)
        if ranks.first:
            write(folder, results)
            if pages is not None:
                pages(results)
            clear_checkpoint(folder / _CHECKPOINT)
        ranks.barrier()
    return results


def require_unfinished(folder: Path, checkpoint: Path) -> None:
    """Raises:
    ValueError: the run in a folder has ended, pages included, so that there is nothing to resume.
    """
    known = record(folder)
    # Earlier versions kept no record, and removed the checkpoint before the pages.
    finished = (folder / "summary.json").exists() and not checkpoint.exists() if known is None else known["finished"]
    if finished:
        raise ValueError(f"the dissection in {folder} is finished: there is nothing to resume")


def write(folder: Path, results: Mapping[str, Dissection]) -> dict[str, Path]:
    """Writes the files of :func:`dissect_folder`; each replaces an older one. Returns {layer: path of its safetensors file}."""
    names = file_names(results)
    for layer, dissection in results.items():
        if dissection.counts is not None:
            dissection.to_csv(folder / f"{names[layer]}.csv")
        if dissection.average_precision is not None:
            dissection.to_csv(folder / f"{names[layer]}-ap.csv", score="ap")
        concepts = [asdict(row) for row in dissection.concepts()]
        write_csv(
            [{**row, **{by: " ".join(map(str, row[by])) for by in _UNITS}} for row in concepts], folder / f"{names[layer]}-concepts.csv"
        )
        dissection.save(folder / f"{names[layer]}.safetensors")
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(to_json({"layers": [{"file": names[name], **d.summary()} for name, d in results.items()]}), encoding="utf-8")
    return {layer: folder / f"{names[layer]}.safetensors" for layer in results}


def file_names(layers: Iterable[str]) -> dict[str, str]:
    """Layer → a file name without suffix that is valid on every system; different layers get different names.

    >>> file_names(["", "visual.layer4", "a/b", "a:b"])
    {'': 'output', 'visual.layer4': 'visual.layer4', 'a/b': 'a_b', 'a:b': 'a_b-2'}
    """
    names: dict[str, str] = {}
    for layer in layers:
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", layer).strip(".")[:100] or "output"
        count, name = 1, plain
        while name.lower() in {other.lower() for other in names.values()} | {"summary"}:
            count += 1
            name = f"{plain}-{count}"
        names[layer] = name
    return names


# -- pages and the terminal -----------------------------------------------------------------------------------------------


def write_pages(
    folder: str | os.PathLike[str],
    results: Mapping[str, Dissection],
    broden: Broden,
    encoder: nn.Module,
    nulls: Nulls | None = None,
    top_images: int = 5,
    evidence: int = 0,
    rotated: bool = False,
    progress: CountCallback | None = None,
    gain_threshold: float | None = None,
    basis: Tensor | SparseBasis | None = None,
) -> dict[str, Path]:
    """Writes ``<layer>.html`` for each layer; returns {layer: path}.

    Args:
        folder: where to write.
        results: see :func:`torchprobe.studies.dissect.dissect_folder`.
        broden, encoder: the data set and the network of the results.
        nulls: dissections to compare with; each is shown for the layers that it has.
        top_images: top images of each unit.
        evidence: number of units whose evidence is shown.
        rotated: whether the units are those of a random rotation with the seed of the metadata.
        progress: called with (steps done, steps in all): a page is one step, and the evidence of each unit is one step.
        gain_threshold: the smallest gain over prevalence with which a unit encodes a concept; default: 0.8.
        basis: the directions or the encoder, if the units are directions or latents.
    """
    with output_folder(folder, DISSECT, resume=True):
        return _write_pages(
            Path(folder), results, broden, encoder, nulls or {}, top_images, evidence, rotated, progress, gain_threshold, basis
        )


def _write_pages(
    folder: Path,
    results: Mapping[str, Dissection],
    broden: Broden,
    encoder: nn.Module,
    nulls: Nulls,
    top_images: int,
    evidence: int,
    rotated: bool,
    progress: CountCallback | None,
    gain_threshold: float | None,
    basis: Tensor | SparseBasis | None,
) -> dict[str, Path]:
    names = file_names(results)
    files = {}
    for before, (layer, dissection) in enumerate(results.items()):
        own = random_rotation(dissection.units, int(dissection.metadata.get("seed", 0))) if rotated else basis
        path = folder / f"{names[layer]}.html"

        def tell(done: int, steps: int, before: int = before) -> None:
            if progress is not None:
                progress(before * steps + done, len(results) * steps)

        files[layer or "(output)"] = write_report(
            dissection, path, broden, encoder,
            nulls=_of_layer(nulls, layer), top_images=top_images, evidence=evidence, basis=own, progress=tell,
            gain_threshold=gain_threshold,
        )  # fmt: skip
    return files


def print_dissections(
    results: Mapping[str, Dissection], nulls: Nulls, out: Console, gain_threshold: float | None = None, is_null: bool = False
) -> None:
    """Prints each layer and its nulls; for a single layer also the units with the highest scores.

    Args:
        results: layer → dissection.
        nulls: dissections to compare with.
        out: where to print.
        gain_threshold: see :func:`write_pages`.
        is_null: whether this is a null itself; then none is asked for.
    """
    reports = [Report(dissection, _of_layer(nulls, layer), gain_threshold=gain_threshold) for layer, dissection in results.items()]
    rows = []
    for report in reports:
        name = report.dissection.layer or "(output)"
        for row in report.comparison():
            own = row["layer"] == OWN
            rows.append({**row, "layer": f"{name}, {number(report.dissection.units)} units" if own else f"  {row['layer']}"})
    _print([column for column in COMPARISON if any(column.key in row for row in rows)], rows, out)
    if len(reports) == 1:
        columns = [column for column in reports[0].columns() if column.key not in ("threshold", "active", "others")]
        _print(columns, [unit.values for unit in reports[0].units()[:SHOWN_UNITS]], out)
    for line in dict.fromkeys(caption(dissection) for dissection in results.values()):
        out.print(text(line))  # layers of one run have the same images
    for report in reports:
        if message := explanation(report.dissection.layer, report.dissection.silence(), report.dissection.quantile):
            out.print(text(f"{message[0].upper()}{message[1:]}."))
        if report.encoded is not None:
            named = [row.values["label"] for row in report.concept_rows() if row.encoded_by]
            out.print(text(f"{report.dissection.layer or '(output)'} encodes {listing(named, 20) or 'no concept'} ({report.limits.rule})."))
    if not nulls and not is_null:
        advice = "Dissect with random weights and with shuffled labels as well, and name those folders with --null."
        out.print(text(f"No null was given. {advice}"))


def _print(columns: Sequence[Column], rows: Sequence[Row], out: Console) -> None:
    columns = shown_columns(rows, columns)
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(row[column.key] if column.key == "layer" else shown(row, column)) for column in columns))
    out.print(table)


def earlier(folders: Iterable[str | os.PathLike[str]]) -> dict[str, dict[str, Dissection]]:
    """Earlier dissections, by the name of their folder and by layer; see :func:`torchprobe.studies.dissect.dissect_folder`.

    Raises:
        ValueError: a folder does not hold a finished dissection, or holds a damaged one.
    """
    return earlier_results(folders, Dissection.load)


def earlier_results(folders: Iterable[str | os.PathLike[str]], load: Callable[[Path], Result]) -> dict[str, dict[str, Result]]:
    """The results that the summaries of some folders name, by the name of the folder and by layer; ``load`` reads one.

    Raises:
        ValueError: as for :func:`earlier`.
    """
    found: dict[str, dict[str, Result]] = {}
    for folder in map(Path, folders):
        try:
            summary = read_json(folder / "summary.json")
            names = [str(layer["file"]) for layer in summary["layers"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} does not hold a finished dissection: summary.json is missing or damaged ({error})") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder}: summary.json names {outside[0]!r}, which is not a file of the folder")
        try:
            results = [load(folder / f"{name}.safetensors") for name in names]
        except OSError as error:
            raise ValueError(f"{folder} does not hold a finished dissection: {error}, which summary.json names") from error
        found[_free(folder.resolve().name, found)] = {result.layer: result for result in results}
    return found


def recalibrate(
    encoder: nn.Module, broden: Broden, batch_size: int = 32, limit: int = CALIBRATION, preprocess: Preprocess | str | None = None
) -> None:
    """Measures the statistics of all batch norms anew, in place, on the first images of ``broden``, whose order is random.

    Otherwise the layers of an untrained network would have very different scales. ``preprocess``: as for the dissection.
    """
    preprocess = find_preprocess(broden, encoder, preprocess)
    parts = (range(start, min(start + batch_size, limit, len(broden))) for start in range(0, min(limit, len(broden)), batch_size))
    recalibrate_batch_norms(encoder, (stack([to_tensor(preprocess, broden.image(row)) for row in part], broden, part) for part in parts))


def _of_layer(nulls: Nulls, layer: str) -> dict[str, Dissection]:
    return {name: layers[layer] for name, layers in nulls.items() if layer in layers}


def _free(name: str, taken: Mapping[str, object]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name} ({count})"
    return free


# -- old names -----------------------------------------------------------------------------------------------------------


def summary(dissection: Dissection, thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)) -> dict[str, Any]:
    """Deprecated: :meth:`Dissection.summary`."""
    warnings.warn("torchprobe.studies.dissect.summary is deprecated, use Dissection.summary()", DeprecationWarning, stacklevel=2)
    return dissection.summary(thresholds)


__getattr__ = renamed(__name__, {"Progress": "torchprobe.common.runs:Progress"})
