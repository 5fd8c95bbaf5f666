"""Two small interpretations and their comparison, in ``tests/data``, written by torchprobe 0.1.0 before its second edition.

``python tests/interpretation_of_before.py FILE.zip`` writes them anew with the torchprobe that is installed: run it at commit ec21db8.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from torchprobe.analysis.baseline import Baseline
from torchprobe.datasets import Broden, BrodenWriter, labeled_folder
from torchprobe.encoders import Encoder, Head
from torchprobe.studies.compare import compare, write
from torchprobe.studies.interpret import interpret

DATA = Path(__file__).parent / "data" / "interpretation.zip"
KEPT = ("first/**/*.json", "first/**/*.csv", "first/*/*.safetensors", "second/results.json", "second/kurtosis.csv",
        "second/embeddings/imagenet.safetensors", "both/comparison.json", "both/*.csv")  # fmt: skip

FEATURES, OUTLIER = 40, 7
NAMES = ("dark", "light")


class Brightness(nn.Module):
    """Weights that are the same on every machine; one feature is large in every image. ``fail`` makes it refuse to run."""

    def __init__(self, outlier: float) -> None:
        super().__init__()
        self.mix = nn.Linear(3, FEATURES)
        with torch.no_grad():
            self.mix.weight.copy_((torch.arange(3 * FEATURES) * 37 % 101).reshape(FEATURES, 3) / 64 - 0.75)
            self.mix.bias.zero_()[OUTLIER] = outlier
        self.fail = False

    def forward(self, images: Tensor) -> Tensor:
        if self.fail:
            raise AssertionError("the encoder was run")
        return self.mix(images.mean((2, 3)))


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255


@dataclass
class Case:
    """One of the two: its encoder and all other arguments of ``interpret``."""

    encoder: Encoder
    arguments: dict[str, Any]


def cases(folder: Path) -> dict[str, Case]:
    """The encoders and their sets; the bytes of images do not matter, only their names and sizes."""
    random = np.random.default_rng(0)

    def picture(label: int) -> np.ndarray:
        return random.normal(90 + 60 * label, 50, (6, 6, 3)).clip(0, 255).astype(np.uint8)

    for kind, count in (("images", 9), ("noisy", 4)):
        for label, name in enumerate(NAMES):
            (folder / kind / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(label)).save(folder / kind / name / f"{i}.bmp")
    (folder / "images" / "dark" / "torn.bmp").write_bytes(b"no picture")
    with BrodenWriter(folder / "concepts", {"color": list(NAMES), "scene": ["day", "night"]}, size=6, image_format="png") as writer:
        for i in range(16):
            writer.add(f"mine/{i:02}", picture(i % 2), {"color": NAMES[i % 2], "scene": ("day", "night")[i % 3 % 2]})
    weight = torch.zeros(2, FEATURES)
    weight[0, 1], weight[1, 10] = -2.0, 3.0  # its singular vectors are exact
    shared = {
        "images": labeled_folder(folder / "images", names=NAMES),
        "head": Head(weight, torch.tensor([0.0, -1.125]), names=NAMES),
        "shifts": {"noisy": labeled_folder(folder / "noisy", names=NAMES)},
        "broden": Broden(folder / "concepts"),
        "baseline": Baseline({"imagenet": [40.0, 50, 60, 70, 80, 90], "noisy": [32.0, 43, 48, 59, 64, 75]}),
        "batch_size": 8,
    }
    found = {}
    for name, role, outlier in (("first", "zero-shot", 40.0), ("second", "fine-tuned", 10.0)):
        encoder = Encoder(Brightness(outlier), features=FEATURES, preprocess=pixels, name=name).eval()
        about = {"name": name, "role": role, "backbone": "brightness", "pretraining": "none"}
        found[name] = Case(encoder, shared | {"about": about})
    return found


def run(case: Case, out: Path, **options: object) -> Any:
    arguments = case.arguments | options
    return interpret(case.encoder, arguments.pop("images"), out, **arguments)


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root, kept = Path(temporary) / "all", Path(temporary) / "kept"
        for name, case in cases(Path(temporary)).items():
            run(case, root / name)
        write(compare([root / "first", root / "second"]), root / "both")
        for file in sorted({file for pattern in KEPT for file in root.glob(pattern)}):
            (kept / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, kept / file.relative_to(root))
        shutil.make_archive(str(path.with_suffix("")), "zip", kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
