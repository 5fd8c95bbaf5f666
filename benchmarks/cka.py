"""``python -m benchmarks.cka``: CKA of all pairs of layers, compared with PyTorch-Model-Compare (``torch_cka``) on the same features.

That package is not a dependency. To measure it, run ``pip install --target DIR torch_cka`` and put DIR into PYTHONPATH.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.report import HELP, Report, Row, Section, Target, json_option, versus
from benchmarks.timing import race
from torchprobe.analysis.similarity import cka

LAYERS, BATCHES = 24, 4
PEER = "PyTorch-Model-Compare"
CASES = {
    "one vector": (256, 1, 2),
    "one vector, small batches": (64, 1, 2),
    "one vector, small batches, one model with itself": (64, 1, 1),
    "50 tokens": (256, 50, 2),
    "50 tokens, small batches": (64, 50, 2),
}
"""Name → images in a batch, vectors of 768 features in each, models.

Two models of 24 layers have 48 Gram matrices. A pair-by-pair computation makes 600 of them, so if only these products counted, the ratio
would be at most 12.5, or 25 when half of each symmetric matrix is saved.
"""


@click.command(context_settings=HELP)
@click.option("--layers", default=LAYERS, show_default=True, help="Of each model.")
@click.option("--seconds", default=60.0, show_default=True, help="For all cases together.")
@click.option("--device", default="cpu", show_default=True)
@json_option
def main(layers: int, seconds: float, device: str, path: Path | None) -> None:
    """What CKA of all pairs of layers costs: medians and ratios, contestants in turn within one process."""
    report = Report()
    report.add(run(torch.device(device), seconds, layers))
    report.save(path)


class Stored(nn.Module):
    """A model whose layers return stored features, so that only the comparison takes time."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(x) for x in features)

    @classmethod
    def random(cls, layers: int, images: int, tokens: int, seed: int, device: torch.device) -> Stored:
        generator = torch.Generator().manual_seed(seed)
        shape = (images, 768) if tokens == 1 else (images, tokens, 768)
        return cls([torch.randn(shape, generator=generator).to(device) for _ in range(layers)])

    def copy(self) -> Stored:
        """Another model of the same features, for a package that leaves its hooks behind."""
        return Stored([layer(None) for layer in self.layers])

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            layer(images)
        return images


class _Layer(nn.Module):
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, images: Tensor | None) -> Tensor:
        features: Tensor = self.get_buffer("features")
        return features


class Batches(list[tuple[Tensor]]):
    """What the package accepts as a data loader."""

    dataset = "stored features"


def run(device: torch.device, seconds: float, layers: int = LAYERS, cases: dict[str, tuple[int, int, int]] | None = None) -> Section:
    """Each case with models of ``layers`` layers; figures are per batch."""
    cases = cases or CASES
    rows = []
    for name, (images, tokens, count) in cases.items():
        models = [Stored.random(layers, images, tokens, seed, device) for seed in range(count)]
        calls = contestants(models[0], models[-1], torch.zeros(images, 1, device=device))
        times = {contestant: t.per(BATCHES) for contestant, t in race(calls, seconds / len(cases), device).items()}
        ours = times["torchprobe cka"]
        case = f"{layers} × {layers} layers, {images} images, {name}"
        for contestant, timing in times.items():
            target = None
            if contestant == PEER and layers == LAYERS:
                target = Target(f"× torchprobe's, {name}", timing.median / ours.median, 20, at_least=True)
            rows.append(Row(case, contestant, timing, target=target, **versus(timing, ours)))
    note = f"per batch, of {BATCHES}; the features are stored, so the forward passes take no time"
    missing = "" if _package() else f". {PEER} is not installed: pip install --target DIR torch_cka, and put DIR into PYTHONPATH"
    return Section("cka", "CKA, all pairs of layers", rows, note + missing)


def contestants(a: Stored, b: Stored, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Ours, and the package if it is installed; each call returns the matrix."""
    batches = Batches([(images,)] * BATCHES)
    calls: dict[str, Callable[[], Any]] = {"torchprobe cka": partial(cka, a, b, [images] * BATCHES, "layers.*", "layers.*")}
    package = _package()
    if package is not None:
        names = [[name for name, _ in model.named_modules() if name.startswith("layers.")] for model in (a, b)]
        package.tqdm = lambda batches, **_: batches
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = package.CKA(a.copy(), b.copy(), "a", "b", *names, device=str(images.device))
        calls[PEER] = partial(_compare, peer, batches)
    return calls


def _compare(peer: Any, batches: Batches) -> Tensor:
    peer.compare(batches, batches)
    result: Tensor = peer.hsic_matrix
    return result


def _package() -> Any:
    os.environ.setdefault("MPLBACKEND", "agg")  # it imports pyplot
    try:
        return importlib.import_module("torch_cka.cka")
    except ImportError:
        return None


if __name__ == "__main__":
    main()
