"""Where the outlier features come from: as a stage of an interpretation, as a section of its page, and as a page of its own."""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import torchprobe
from torchprobe.analysis.positions import LayerEncoder
from torchprobe.analysis.provenance import Provenance, provenance
from torchprobe.analysis.provenance.results import CHANGE_COLUMNS, PARAMETER_COLUMNS, PART_COLUMNS, STEM_COLUMNS, first
from torchprobe.analysis.provenance.stream import UnknownStructure
from torchprobe.common.messages import counted, reason
from torchprobe.common.records import Record
from torchprobe.common.runs import CountCallback, RunOptions
from torchprobe.datasets import ImageSet
from torchprobe.encoders import Encoder, Head
from torchprobe.rendering.page import Page, Section, Table, write
from torchprobe.rendering.tables import number

PROVENANCE_IMAGES = 64
"""Images on which the origin of outlier features is looked for. Parts and parameters are means, which need few (we chose the number)."""

FEATURES = 6
"""Features whose origin is looked for, those that stand out most. Each costs two passes for its changes (we chose the number)."""

SHOWN = 6
"""Rows of each feature."""


@dataclass(frozen=True, eq=False)
class Origin(Record):
    """Where features come from; or why that is not known, in words.

    ``features`` is the number of features in question. ``failed``: by an error that no structure of a network explains.
    """

    found: Provenance | None
    why: str
    features: int
    failed: bool = False


def measure_origin(
    encoder: Encoder, images: ImageSet, features: Sequence[int], head: Head | None, options: RunOptions, progress: CountCallback
) -> Origin:
    """:func:`torchprobe.analysis.provenance` of the first :data:`FEATURES` features. A network in which they cannot be followed is not an
    error: the result says why. Any other error is a warning with its traceback.

    Raises:
        KeyboardInterrupt: ``options.stop`` returned True.
    """
    if isinstance(encoder, LayerEncoder):
        return Origin(None, "it is followed to the output of an encoder, and the representation is one of its layers", len(features))
    given = copy.copy(encoder)  # with the same weights; a head of the encoder that was not asked for decides nothing
    given.head = head
    try:
        found = provenance(
            given,
            images,
            list(features[:FEATURES]),
            device=options.device,
            batch_size=min(options.batch_size, 16),
            workers=options.workers,
            progress=progress,
            stop=options.stop,
        )
    except UnknownStructure as error:
        return Origin(None, str(error).rstrip("."), len(features))
    except Exception as error:  # a mistake of ours must be seen, and must not cost the rest of the interpretation
        what = "the search for the origin of the outlier features failed"
        with contextlib.suppress(UserWarning):  # where warnings are errors, the result says it alone
            warnings.warn(f"{what}; the other sections are not affected. Please report it:\n{traceback.format_exc()}", stacklevel=2)
        return Origin(None, f"{what} ({reason(error)}); the log has the traceback", len(features), failed=True)
    return Origin(found, "", len(features))


def provenance_section(found: Provenance, features: int | None = None) -> Section:
    """What writes the features, and what happens when one parameter is changed.

    Args:
        found: of the features that stand out most.
        features: how many there are in all; None: no more.
    """
    if not found.features:
        return Section("Where the outlier features come from", [found.summary()])
    tables = [
        Table(first(found.parts, SHOWN), PART_COLUMNS, "What the parts of the network add, the largest of each feature"),
        Table(first(found.parameters, SHOWN), PARAMETER_COLUMNS, "The parameters on which each feature hangs, compared with their peers"),
        Table(first(found.stem, SHOWN), STEM_COLUMNS, "What comes before the blocks, by parameter"),
        Table(found.changes, CHANGE_COLUMNS, "One parameter changed, and the whole network run again"),
    ]
    paragraphs = [
        "The representation is a sum along the residual stream, seen through what follows the last block. " + found.note(),
        "All of this describes these weights on these images. It does not say why training led there, or what the features are for.",
        *found.summary().splitlines(),
    ]
    if features is not None and features > len(found.features):
        paragraphs.insert(1, f"Of {counted(features, 'feature')}, the {len(found.features)} that stand out most were followed.")
    return Section("Where the outlier features come from", paragraphs, tables=[table for table in tables if table.rows])


def write_provenance(found: Provenance, path: str | os.PathLike[str]) -> Path:
    """A self-contained HTML page; needs the ``report`` extra. Returns its path."""
    page = Page(
        kind="provenance",
        title=found.name,
        summary=f"Where {counted(len(found.features), 'feature')} of the representation come from, on {counted(found.images, 'image')}.",
        sections=[provenance_section(found)],
        footer=[f"torchprobe {torchprobe.__version__}, torch {torch.__version__}; largest error of a sum {number(found.error, 2)}"],
    )
    write(page, path)
    return Path(path)
