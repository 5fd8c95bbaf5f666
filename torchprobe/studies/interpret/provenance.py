"""The section of a page that says where outlier features come from, and a page of its own."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import torchprobe
from torchprobe.analysis.provenance import Provenance
from torchprobe.analysis.provenance.results import CHANGE_COLUMNS, PARAMETER_COLUMNS, PART_COLUMNS, STEM_COLUMNS, first
from torchprobe.common.messages import counted
from torchprobe.rendering.page import Page, Section, Table, write
from torchprobe.rendering.tables import number

SHOWN = 6
"""Rows of each feature."""


def provenance_section(found: Provenance) -> Section:
    """What writes the features, and what happens when one parameter is changed."""
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
