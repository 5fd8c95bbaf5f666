"""``python -m benchmarks.cka``: CKA of all pairs of layers beside PyTorch-Model-Compare (``torch_cka``), on the same stored features.

That package is no dependency. To measure it: ``pip install --target DIR torch_cka``, then put DIR into PYTHONPATH.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import allocator, report
from benchmarks.report import Row, Section, Target, versus
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
"""Name → images in a batch, vectors of 768 features in each, models. Two models of 24 layers have 48 Gram matrices, and pair by pair
600 are computed: where nothing but these products counts there is no more than 12.5 × to be had, with half of each matrix at most 25 ×."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--layers", default=LAYERS, show_default=True, help="Of each model.")
@click.option("--seconds", default=60.0, show_default=True, help="For all cases together.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure to FILE, in seconds.")
def main(layers: int, seconds: float, device: str, path: Path | None) -> None:
    """What CKA of all pairs of layers costs: medians and ratios, contestants in turn within one process."""
    allocator.restart_tuned()
    console = Console()
    if not console.is_terminal:
        console.width = 200
    about = report.machine()
    console.print(f"{about['processor']}, {about['threads']} threads; torch {about['torch']}; load average {about['load_average']:.1f}")
    section = run(torch.device(device), seconds, layers)
    console.print(report.table(section, console.width))
    if path is not None:
        path.write_text(json.dumps({**report.as_json([section]), "machine": about}, indent=1) + "\n")


class Stored(nn.Module):
    """A model whose layers give stored features: what remains is the comparison."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(x) for x in features)

    @classmethod
    def random(cls, layers: int, images: int, tokens: int, seed: int, device: torch.device) -> Stored:
        generator = torch.Generator().manual_seed(seed)
        shape = (images, 768) if tokens == 1 else (images, tokens, 768)
        return cls([torch.randn(shape, generator=generator).to(device) for _ in range(layers)])

    def again(self) -> Stored:
        """Another model of the same features, for what leaves its hooks behind."""
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
    """What the package takes for a loader."""

    dataset = "stored features"


def run(device: torch.device, seconds: float, layers: int = LAYERS, cases: dict[str, tuple[int, int, int]] | None = None) -> Section:
    """Each case with models of ``layers`` layers; figures are per batch."""
    rows = []
    for name, (images, tokens, count) in (cases or CASES).items():
        models = [Stored.random(layers, images, tokens, seed, device) for seed in range(count)]
        calls = contestants(models[0], models[-1], torch.zeros(images, 1, device=device))
        times = {contestant: t.per(BATCHES) for contestant, t in race(calls, seconds / len(cases or CASES), device).items()}
        ours = times["torchprobe cka"]
        case = f"{layers} × {layers} layers, {images} images, {name}"
        for contestant, timing in times.items():
            target = None
            if contestant == PEER and layers == LAYERS:
                target = Target(f"× torchprobe's, {name}", timing.median / ours.median, 20, at_least=True)
            rows.append(Row(case, contestant, timing, target=target, **versus(timing, ours)))
    note = f"per batch, of {BATCHES}; the features are stored, so that the forward passes cost nothing"
    missing = "" if _package() else f". {PEER} is not installed: pip install --target DIR torch_cka, and put DIR into PYTHONPATH"
    return Section("cka", "CKA, all pairs of layers", rows, note + missing)


def contestants(a: Stored, b: Stored, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Ours, and the package if it is there; each gives the matrix."""
    batches = Batches([(images,)] * BATCHES)
    calls: dict[str, Callable[[], Any]] = {"torchprobe cka": partial(cka, a, b, [images] * BATCHES, "layers.*", "layers.*")}
    package = _package()
    if package is not None:
        names = [[name for name, _ in model.named_modules() if name.startswith("layers.")] for model in (a, b)]
        package.tqdm = lambda batches, **_: batches
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = package.CKA(a.again(), b.again(), "a", "b", *names, device=str(images.device))
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
