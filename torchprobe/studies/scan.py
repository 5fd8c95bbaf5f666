"""Does this encoder have outlier features? One pass over a folder of images."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.analysis.hidden_states import HiddenOutliers
from torchprobe.analysis.kurtosis import peaks, vector_kurtosis
from torchprobe.analysis.outliers import feature_rows
from torchprobe.analysis.positions import FeatureDim, LayerEncoder, Position, at_layer
from torchprobe.analysis.resampling import FEWEST, LEVEL, RESAMPLES, bootstrap_interval
from torchprobe.common.runs import Clock, CountCallback, RunOptions, counting
from torchprobe.datasets import DatasetError, ImageSet, open_images
from torchprobe.encoders import Encoder
from torchprobe.recording import Recording
from torchprobe.rendering.wording import worded
from torchprobe.statistics import Moments
from torchprobe.statistics.moments import gaussian_kurtosis, gaussian_kurtosis_std, kurtosis_ceiling
from torchprobe.studies.layer_pass import LayerPass, layer_rows

DEFINITIONS = {
    "vector kurtosis": "κ(h) = mean((h − mean h)⁴) / mean((h − mean h)²)² over the features of one vector h (Pearson's definition, "
    "population moments). The headline number is its mean over images.",
    "interval": f"{LEVEL:.0%} studentized bootstrap of that mean over images ({RESAMPLES:,} resamples), none below {FEWEST} images. "
    "The image is the unit, because values from the same image are dependent.",
    "Gaussian features": "the value of d independent Gaussian features, 3(d − 1)/(d + 1), and its std from vector to vector.",
    "ceiling": "the largest value that d features can have, when all but one are equal: (d² − 3d + 3)/(d − 1).",
    "outlier": "feature i is an outlier in a vector if |h_i − mean h| > 6 std of that vector.",
    "max|h| / mean|h|": "the largest absolute value of a vector, divided by the mean absolute value of that vector; mean over images.",
    "relative size": "mean |h_i| over images, divided by its average over features.",
    "energy share": "Σ h_i² over images, as a share of the sum over all features.",
    "extreme share": "share of the images in which |h_i| is the largest of all features.",
}
"""The terms of a scan, for the terminal, the page and the JSON file."""


@dataclass(frozen=True)
class Headline:
    """The vector kurtosis of the representation, with the values to compare it with.

    Attributes:
        features: the length d of a vector.
        vector_kurtosis: mean over the images whose vector has a kurtosis.
        interval: bootstrap interval of that mean; see :data:`DEFINITIONS`.
        interval_level: share of the resampled means inside the interval.
        vector_kurtosis_median, vector_kurtosis_std: over the same images; the population standard deviation.
        gaussian, gaussian_std: of Gaussian features, and its standard deviation from vector to vector.
        ceiling: the largest value that d features can have.
        peak: max|h| / mean|h|, mean over images.
        nonnegative: no value of the representation is negative, as after a ReLU.
        vectors, constant_vectors, invalid_vectors: as in :class:`torchprobe.Moments`.
    """

    features: int
    vector_kurtosis: float
    interval: tuple[float, float]
    interval_level: float
    vector_kurtosis_median: float
    vector_kurtosis_std: float
    gaussian: float
    gaussian_std: float
    ceiling: float
    peak: float
    nonnegative: bool
    vectors: int
    constant_vectors: int
    invalid_vectors: int


@dataclass
class Scan:
    """The result of one pass over images.

    Attributes:
        model: the name of the encoder.
        recording: the moments of every recorded layer; ``""`` is the representation.
        kurtosis: vector kurtosis of the representation of each image, float64, shape (images,); nan if it is undefined.
        peak: max|h| / mean|h| of each image, float64, shape (images,).
        extreme: per feature, the number of images in which its absolute value is the largest, int64, shape (features,).
        total: number of files to read.
        unreadable: the files that could not be read, each with the reason.
        partial: whether the scan was stopped before the end.
        settings: the settings of the run.
        vectors: the number of vectors of the representation, if an image has several.
        hidden: the outlier features of the layers and their positions, on the first inputs; or why they could not be read.
        inputs: what one input is, "image" or "text".
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
    vectors: int | None = None
    hidden: HiddenOutliers | str | None = None
    inputs: str = "image"

    @property
    def images(self) -> int:
        """The number of images that were seen."""
        return len(self.kurtosis)

    @property
    def representation(self) -> Moments:
        """The moments of the output of the encoder."""
        moments: Moments = self.recording[""]
        return moments

    @functools.cached_property
    def headline(self) -> Headline:
        """The numbers of the representation. The bootstrap runs once."""
        moments = self.representation
        d = moments.features
        finite = self.kurtosis[np.isfinite(self.kurtosis)]
        return Headline(
            features=d,
            vector_kurtosis=float(finite.mean()) if finite.size else math.nan,
            interval=bootstrap_interval(self.kurtosis, seed=int(self.settings.get("seed", 0))),
            interval_level=LEVEL,
            vector_kurtosis_median=float(np.median(finite)) if finite.size else math.nan,
            vector_kurtosis_std=float(finite.std()) if finite.size else math.nan,
            gaussian=gaussian_kurtosis(d),
            gaussian_std=gaussian_kurtosis_std(d),
            ceiling=kurtosis_ceiling(d),
            peak=float(np.nanmean(self.peak)) if np.isfinite(self.peak).any() else math.nan,
            nonnegative=bool((moments.min >= 0).all()),
            vectors=moments.vectors,
            constant_vectors=moments.constant_vectors,
            invalid_vectors=moments.invalid_vectors,
        )

    def features(self) -> list[dict[str, Any]]:
        """One row per feature of the representation, the most frequent outlier first.

        See :func:`torchprobe.analysis.outliers.feature_rows`.
        """
        return feature_rows(self.representation, torch.from_numpy(self.extreme), self.vectors or self.images)

    def outliers(self) -> list[dict[str, Any]]:
        """The rows of :meth:`features` that are an outlier in at least one vector."""
        return [row for row in self.features() if row["outlier_share"] > 0]

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer: the rows of the recording, with ``vectors_per_image``."""
        return layer_rows(self.recording, self.hidden, self.images)

    def summary(self) -> dict[str, Any]:
        """All printed numbers as plain values: the content of ``summary.json`` and of ``--json``."""
        return {
            "model": self.model,
            "partial": self.partial,
            "images": {
                "seen": self.images,
                "found": self.total,
                "unreadable": [{"file": file, "reason": reason} for file, reason in self.unreadable],
            },
            "representation": asdict(self.headline) | {"interval": list(self.headline.interval)},
            "outlier_features": self.outliers(),
            "layers": self.rows(),
            "hidden_states": asdict(self.hidden) if isinstance(self.hidden, HiddenOutliers) else {"left_out": self.hidden},
            "definitions": {term: worded(meaning, self.inputs) for term, meaning in DEFINITIONS.items()},
            "settings": self.settings,
        }


def scan(
    encoder: Encoder,
    images: ImageSet | Any,
    layers: str | Iterable[str] | None = None,
    *,
    layer: str | None = None,
    position: Position | None = None,
    feature_dim: FeatureDim = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    workers: int = 2,
    seed: int = 0,
    progress: CountCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> Scan:
    """Runs ``images`` through ``encoder`` once and records the moments of its layers and of its representation.

    Args:
        encoder: from :func:`torchprobe.encoders.load_encoder`; moved to ``device`` and put in eval mode.
        images: what :func:`torchprobe.datasets.open_images` takes: images, a folder, shards, a data set …; or for an encoder of texts what
            :func:`torchprobe.datasets.text_file` gives: then a text takes the place of an image, and padding is masked in every layer.
        layers: names or globs as for :func:`torchprobe.record`; None: its default. The representation is always recorded.
        layer, position: a layer, and which of its positions, as the representation instead of the output of the encoder; see
            :class:`torchprobe.analysis.positions.LayerEncoder`. With "patch" and "all" an image gives several vectors; its kurtosis is then
            their mean, so the interval is over images.
        feature_dim: the dimension of the features of layers for which it is unsure, as for :func:`torchprobe.record`: of all layers, or
            ``{name or glob: dim}``; also of ``layer``.
        batch_size: files in a batch.
        device: where the encoder runs.
        workers: threads that decode images.
        seed: of the bootstrap.
        progress: called with (files done, files in all) after every batch.
        stop: called before every batch. If it returns True, the scan ends with the images seen so far and is marked as partial.
            KeyboardInterrupt has the same effect, but the layers may then include one batch more than the counted images.

    Raises:
        DatasetError: no file could be read.
        ValueError: a layer that the encoder does not have, or a position that the layer does not have.

    >>> import tempfile, pathlib, PIL.Image
    >>> from torchprobe.datasets import Images
    >>> from torch import nn
    >>> from torchvision.transforms.functional import to_tensor
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> PIL.Image.linear_gradient("L").resize((4, 4)).save(folder / "a.png")
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), features=8, preprocess=to_tensor)
    >>> scan(encoder, Images([folder / "a.png"])).representation.vectors
    1
    """
    options = RunOptions(batch_size, device, workers, seed, progress=counting(progress), stop=stop)
    images = open_images(images)
    encoder = encoder.to(device).eval()
    if layer is not None or position is not None:
        encoder = at_layer(encoder, layer, position, feature_dim=feature_dim)
    read = encoder if isinstance(encoder, LayerEncoder) else None
    seen = _Seen(torch.zeros(encoder.features, dtype=torch.int64))
    with LayerPass(encoder, layers, feature_dim) as watched, torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # remarks on metadata
        try:
            _look(encoder, watched, images, options, seen)
        except KeyboardInterrupt:
            seen.partial = True
        if not seen.kurtosis:
            if seen.partial:
                raise KeyboardInterrupt
            file, reason = seen.unreadable[0]
            raise DatasetError(f"none of the {len(seen.unreadable)} files could be read; the first, {file}: {reason}")
    return Scan(
        model=encoder.name,
        recording=watched.recording,
        kurtosis=torch.cat(seen.kurtosis).numpy(),
        peak=torch.cat(seen.peak).numpy(),
        extreme=seen.extreme.numpy(),
        total=len(images),
        unreadable=seen.unreadable,
        partial=seen.partial,
        settings={
            "batch_size": batch_size,
            "device": str(device),
            "seed": seed,
            "layers": watched.selected,
            "representation": encoder.representation,
            **({} if feature_dim is None else {"feature_dim": feature_dim}),
            **({} if read is None else read.facts),
        },
        vectors=None if read is None or not read.several else seen.vectors,
        hidden=watched.hidden,
        inputs=encoder.inputs,
    )


@dataclass
class _Seen:
    """What the representation of the images seen so far shows; see :class:`Scan`."""

    extreme: Tensor
    kurtosis: list[Tensor] = field(default_factory=list)
    peak: list[Tensor] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    partial: bool = False
    vectors: int = 0

    def add(self, h: Tensor, mask: Tensor | None) -> None:
        """A batch of representations: (images, features), or (images, positions, features) with a mask of the positions that count."""
        rows = h.flatten(0, -2)
        kurtosis, peak = vector_kurtosis(rows), peaks(rows)
        counted = torch.ones(h.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu()
        rows = rows[counted.flatten()]
        self.vectors += len(rows)
        if h.dim() == 3:
            kurtosis, peak = (each.view(h.shape[:-1]).where(counted, math.nan).nanmean(1) for each in (kurtosis, peak))
        self.kurtosis.append(kurtosis)
        self.peak.append(peak)
        finite = rows[rows.isfinite().all(-1)]
        self.extreme += torch.bincount(finite.abs().argmax(-1), minlength=h.shape[-1])


def _look(encoder: Encoder, watched: LayerPass, images: ImageSet, options: RunOptions, seen: _Seen) -> None:
    """Runs the images through the encoder, and adds them to ``seen`` batch by batch."""
    clock, done = Clock(options.progress, stages=1), 0
    clock.start("scan", done, len(images), f"{encoder.inputs}s")
    for batch in images.batches(encoder.preprocess, options.batch_size, options.workers):
        if options.stop is not None and options.stop():
            seen.partial = True
            return
        seen.unreadable += batch.unreadable
        if batch.names:
            inputs = batch.pixels.to(options.device)
            with watched.around(batch, inputs):
                h = encoder(inputs).cpu().double()
            seen.add(h, encoder.mask(inputs) if h.dim() == 3 else None)
        done += batch.files
        clock.tell(done)
