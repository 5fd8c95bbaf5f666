"""Does this encoder have outlier features? One look at a folder of images."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.analysis.intervals import LEVEL, RESAMPLES, bootstrap_interval
from torchprobe.analysis.kurtosis import peaks, vector_kurtosis
from torchprobe.analysis.outliers import feature_rows
from torchprobe.common.files import replacing, to_json
from torchprobe.common.progress import CountCallback
from torchprobe.datasets import DatasetError, Images
from torchprobe.encoders import Encoder
from torchprobe.recording import Recording, record
from torchprobe.rendering.page import Page
from torchprobe.rendering.page import write as write_page
from torchprobe.rendering.plots import depth_profile
from torchprobe.rendering.plots import write as write_figure
from torchprobe.rendering.tables import LAYER_COLUMNS, cell, write_csv
from torchprobe.statistics import Moments
from torchprobe.statistics.moments import gaussian_kurtosis, gaussian_kurtosis_std, kurtosis_ceiling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFINITIONS = {
    "vector kurtosis": "κ(h) = mean((h − mean h)⁴) / mean((h − mean h)²)² over the features of one vector h (Pearson's, "
    "population moments); the headline is its mean over images.",
    "interval": f"{LEVEL:.0%} percentile bootstrap of that mean over images ({RESAMPLES:,} resamples): the image is the unit, "
    "because what comes from one image is dependent.",
    "Gaussian features": "what d independent Gaussian values give: 3(d − 1)/(d + 1), with its standard deviation from vector to vector.",
    "ceiling": "the largest value d features can have, when all but one are equal: (d² − 3d + 3)/(d − 1).",
    "outlier": "feature i is an outlier in a vector when |h_i − mean h| > 6 std of that vector.",
    "max|h| / mean|h|": "the largest absolute value of a vector over the mean absolute value of that vector; mean over images.",
    "relative size": "mean |h_i| over images, divided by its average over features.",
    "energy share": "Σ h_i² over images, as a share of the sum over all features.",
    "extreme share": "share of the images in which |h_i| is the largest of all features.",
}


@dataclass
class Scan:
    """What one look at some images saw.

    Attributes:
        model: the name of the encoder.
        recording: the moments of every recorded layer; ``""`` is the representation.
        kurtosis: vector kurtosis of the representation per image, float64, shape (images,); nan where it has none.
        peak: max|h| / mean|h| per image, float64, shape (images,).
        extreme: per feature, the images in which its absolute value is the largest, int64, shape (features,).
        total: files that were to be read.
        unreadable: those that could not be, with the reason.
        partial: it was stopped before the end.
        settings: what it was run with.
    """

    model: str
    recording: Recording
    kurtosis: NDArray[np.float64]
    peak: NDArray[np.float64]
    extreme: NDArray[np.int64]
    total: int
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    partial: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Images that were seen."""
        return len(self.kurtosis)

    @property
    def representation(self) -> Moments:
        """The moments of the encoder's output."""
        moments: Moments = self.recording[""]
        return moments

    def interval(self) -> tuple[float, float]:
        """Bootstrap interval of the mean vector kurtosis, over images; see :data:`DEFINITIONS`."""
        return bootstrap_interval(self.kurtosis, seed=int(self.settings.get("seed", 0)))

    def features(self) -> list[dict[str, Any]]:
        """One row per feature of the representation, most frequent outlier first; see :func:`torchprobe.analysis.outliers.feature_rows`."""
        return feature_rows(self.representation, torch.from_numpy(self.extreme), self.images)

    def outliers(self) -> list[dict[str, Any]]:
        """The rows of :meth:`features` that are an outlier in at least one vector."""
        return [row for row in self.features() if row["outlier_share"] > 0]

    def layers(self) -> list[dict[str, Any]]:
        """The rows of the recording, with the vectors each image gave."""
        counts = [column for column in LAYER_COLUMNS if column.kind == "count"]
        rows = []
        for row in self.recording.rows():
            whole = {column.key: cell(row, column) for column in counts}
            per_image = (whole["vectors"] + whole["constant_vectors"] + whole["invalid_vectors"]) / self.images
            rows.append({**row, **whole, "vectors_per_image": int(per_image) if per_image.is_integer() else per_image})
        return rows

    def summary(self) -> dict[str, Any]:
        """Everything that is printed, as plain numbers: what ``--json`` gives."""
        m = self.representation
        d = m.features
        low, high = self.interval()
        finite = self.kurtosis[np.isfinite(self.kurtosis)]
        return {
            "model": self.model,
            "partial": self.partial,
            "images": {
                "seen": self.images,
                "found": self.total,
                "unreadable": [{"file": file, "reason": reason} for file, reason in self.unreadable],
            },
            "representation": {
                "features": d,
                "vector_kurtosis": float(finite.mean()) if finite.size else math.nan,
                "interval": [low, high],
                "interval_level": LEVEL,
                "vector_kurtosis_median": float(np.median(finite)) if finite.size else math.nan,
                "vector_kurtosis_std": float(finite.std()) if finite.size else math.nan,
                "gaussian": gaussian_kurtosis(d),
                "gaussian_std": gaussian_kurtosis_std(d),
                "ceiling": kurtosis_ceiling(d),
                "peak": float(np.nanmean(self.peak)) if np.isfinite(self.peak).any() else math.nan,
                "nonnegative": bool((m.min >= 0).all()),
                "vectors": m.vectors,
                "constant_vectors": m.constant_vectors,
                "invalid_vectors": m.invalid_vectors,
            },
            "outlier_features": self.outliers(),
            "layers": self.layers(),
            "definitions": DEFINITIONS,
            "settings": self.settings,
        }

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Writes the recording, the tables as CSV, the summary as JSON, the plot over depth and the page; see :func:`write_results`."""
        from torchprobe.studies.scan_page import scan_page

        return write_results(folder, self, self.summary(), depth_profile(self.layers()), scan_page(self))


def write_results(folder: str | os.PathLike[str], scan: Scan, summary: Mapping[str, Any], plot: Figure, page: Page) -> dict[str, Path]:
    """Writes what a study found into ``folder`` and returns the paths by kind; ``summary["layers"]`` is the layer table.

    Each file replaces an older one at once, so that an interruption leaves no half file.

    Raises:
        OSError: the folder cannot be made or written to.
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
        "plot": write_figure(plot, folder / "depth.png"),
        "page": write_page(page, folder / "index.html"),
    }


def scan(
    encoder: Encoder,
    images: Images,
    layers: str | Iterable[str] | None = None,
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    workers: int = 2,
    seed: int = 0,
    progress: CountCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> Scan:
    """Runs ``images`` through ``encoder`` once and records the moments of its layers and its representation.

    Args:
        encoder: from :func:`torchprobe.encoders.load_encoder`; moved to ``device`` and put in eval mode.
        images: from :func:`torchprobe.datasets.image_folder`.
        layers: names or globs as for :func:`torchprobe.record`; its default when None. The representation is always
            recorded.
        batch_size: files in a batch.
        device: where the encoder runs.
        workers: threads that decode.
        seed: of the bootstrap.
        progress: told after every batch.
        stop: asked before every batch; True ends the scan with what was seen, marked as partial. So does
            KeyboardInterrupt, after which the layers may have seen one batch more than the images that are counted.

    Raises:
        DatasetError: not one file could be read.
        ValueError: a layer the encoder does not have.

    >>> import tempfile, pathlib, PIL.Image
    >>> from torch import nn
    >>> from torchvision.transforms.functional import to_tensor
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> PIL.Image.linear_gradient("L").resize((4, 4)).save(folder / "a.png")
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), features=8, preprocess=to_tensor)
    >>> scan(encoder, Images([folder / "a.png"])).representation.vectors
    1
    """
    encoder = encoder.to(device).eval()
    selected = None if layers is None else ["", *([layers] if isinstance(layers, str) else layers)]
    kurtosis: list[Tensor] = []
    peak: list[Tensor] = []
    extreme = torch.zeros(encoder.features, dtype=torch.int64)
    unreadable: list[tuple[str, str]] = []
    done, partial = 0, False
    with record(encoder, selected) as rec, torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # remarks on metadata
        try:
            for batch in images.batches(encoder.preprocess, batch_size, workers):
                if stop is not None and stop():
                    partial = True
                    break
                unreadable += batch.unreadable
                if batch.names:
                    h = encoder(batch.pixels.to(device)).cpu().double()
                    kurtosis.append(vector_kurtosis(h))
                    peak.append(peaks(h))
                    finite = h[h.isfinite().all(-1)]
                    extreme += torch.bincount(finite.abs().argmax(-1), minlength=encoder.features)
                done += batch.files
                if progress is not None:
                    progress(done, len(images))
        except KeyboardInterrupt:
            partial = True
        if not kurtosis:
            if partial:
                raise KeyboardInterrupt
            file, reason = unreadable[0]
            raise DatasetError(f"none of the {len(unreadable)} files could be read as an image; the first, {file}: {reason}")
    return Scan(
        model=encoder.name,
        recording=rec.total,
        kurtosis=torch.cat(kurtosis).numpy(),
        peak=torch.cat(peak).numpy(),
        extreme=extreme.numpy(),
        total=len(images),
        unreadable=unreadable,
        partial=partial,
        settings={"batch_size": batch_size, "device": str(device), "seed": seed, "layers": selected},
    )
