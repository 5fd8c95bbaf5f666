"""``python -m benchmarks.outliers``: how often each rule of outlier features is wrong, as the tables of docs/outliers.md.

Three rules with 6 standard deviations: the classical one (of the whole vector, in half of the vectors), the median and the median absolute
deviation (in a quarter), and the robust one of torchprobe (of the bulk, in a quarter, beyond chance). The same seeds give the same tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import HELP
from torchprobe.analysis.outliers import FREQUENCY, SIGMA, outlier_features

Array = NDArray[np.float64]
Maker = Callable[[np.random.Generator, int, int], Array]

WIDTHS = (64, 256, 1024, 4096)
NORMAL_MAD = 1.482602218505602  # standard deviation of a Gaussian, in median absolute deviations

INDEPENDENT: dict[str, Maker] = {
    "Gaussian": lambda rng, n, d: rng.normal(size=(n, d)),
    "Laplace": lambda rng, n, d: rng.laplace(size=(n, d)),
    "Student t, 3 degrees": lambda rng, n, d: rng.standard_t(3, size=(n, d)),
    "exponential": lambda rng, n, d: rng.exponential(size=(n, d)),
    "ReLU of Gaussian": lambda rng, n, d: np.maximum(rng.normal(size=(n, d)), 0),
    "ReLU, 16 % active": lambda rng, n, d: np.maximum(rng.normal(size=(n, d)) - 1, 0),
    "correlated, 5 factors": lambda rng, n, d: rng.normal(size=(n, 5)) @ rng.normal(size=(5, d)) + 0.5 * rng.normal(size=(n, d)),
    "scales log-normal, 0.25": lambda rng, n, d: rng.normal(size=(n, d)) * rng.lognormal(0, 0.25, d),
    "scales log-normal, 0.5": lambda rng, n, d: rng.normal(size=(n, d)) * rng.lognormal(0, 0.5, d),
    "means Gaussian": lambda rng, n, d: rng.normal(size=d) + 0.3 * rng.normal(size=(n, d)),
    "means Laplace": lambda rng, n, d: rng.laplace(size=d) + 0.3 * rng.normal(size=(n, d)),
    "means t, 3 degrees": lambda rng, n, d: rng.standard_t(3, size=d) + 0.3 * rng.normal(size=(n, d)),
}
"""Features without planted outliers. The last five differ from feature to feature, so the largest of them really stands out."""

PLANTED: dict[str, tuple[Callable[[int], int], float, float]] = {
    "1 feature, 10 σ, every vector": (lambda d: 1, 10.0, 1.0),
    "1 feature, 60 σ, 40 % of the vectors": (lambda d: 1, 60.0, 0.4),
    "1 feature, 60 σ, 30 % of the vectors": (lambda d: 1, 60.0, 0.3),
    "1 feature, 60 σ, 20 % of the vectors": (lambda d: 1, 60.0, 0.2),
    "2 features, 60 σ, every vector": (lambda d: 2, 60.0, 1.0),
    "3 % of the features, 60 σ, every vector": (lambda d: max(1, d * 3 // 100), 60.0, 1.0),
    "8 % of the features, 12 σ, every vector": (lambda d: d * 8 // 100, 12.0, 1.0),
}
"""Name → number of features, their size in standard deviations of the others, and the share of the vectors."""

BACKGROUNDS = ("Gaussian", "Student t, 3 degrees", "ReLU of Gaussian")


def by_median(h: Array) -> set[int]:
    """The features more than 6 · 1.4826 median absolute deviations from the median of their vector, in a quarter of the vectors."""
    deviation = abs(h - np.median(h, 1, keepdims=True))
    outside = deviation > SIGMA * NORMAL_MAD * np.median(deviation, 1, keepdims=True)
    return set(np.flatnonzero(outside.mean(0) >= FREQUENCY["robust"]).tolist())


def by_rule(h: Array) -> dict[str, set[int]]:
    """Rule → the features that it finds."""
    found = outlier_features(torch.from_numpy(h))
    return {"classical": set(found.classical.tolist()), "median": by_median(h), "robust": set(found.indices.tolist())}


def false_positives(models: int, vectors: int) -> Iterator[tuple[str, dict[int, dict[str, int]]]]:
    """Distribution, and width → rule → number of models in which a feature is found."""
    for name, make in INDEPENDENT.items():
        counts = {}
        for d in WIDTHS:
            found = [by_rule(make(np.random.default_rng([seed, d]), vectors, d)) for seed in range(models)]
            counts[d] = {rule: sum(bool(one[rule]) for one in found) for rule in found[0]}
        yield name, counts


def power(models: int, vectors: int) -> Iterator[tuple[str, str, dict[int, dict[str, float]]]]:
    """Outliers, background, and width → rule → share of the planted features that are found."""
    for name, (number, size, share) in PLANTED.items():
        for background in BACKGROUNDS:
            shares = {}
            for d in WIDTHS:
                found = []
                for seed in range(models):
                    h = INDEPENDENT[background](np.random.default_rng([seed, d]), vectors, d)
                    k = number(d)
                    h[: round(share * vectors), :k] += size * h.std()
                    found.append({rule: len(one & set(range(k))) / k for rule, one in by_rule(h).items()})
                shares[d] = {rule: float(np.mean([one[rule] for one in found])) for rule in found[0]}
            yield name, background, shares


def row(cells: list[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


@click.command(context_settings=HELP)
@click.option("--models", default=20, show_default=True, help="Models of each distribution and width; a fifth of them for the power.")
@click.option("--vectors", default=100, show_default=True, help="Vectors of each model.")
def main(models: int, vectors: int) -> None:
    """False positives and power of three rules of outlier features. In each cell: classical / median / robust."""
    click.echo(row(["features without planted outliers", *(f"d = {d:,}" for d in WIDTHS)]))
    click.echo(row(["---"] * (1 + len(WIDTHS))))
    for name, counts in false_positives(models, vectors):
        click.echo(row([name, *(" / ".join(str(count) for count in counts[d].values()) for d in WIDTHS)]))
    click.echo()
    click.echo(row(["planted", "among", *(f"d = {d:,}" for d in WIDTHS)]))
    click.echo(row(["---"] * (2 + len(WIDTHS))))
    for name, background, shares in power(max(1, models // 5), vectors):
        click.echo(row([name, background, *(" / ".join(f"{100 * share:.0f}" for share in shares[d].values()) for d in WIDTHS)]))


if __name__ == "__main__":
    main()
