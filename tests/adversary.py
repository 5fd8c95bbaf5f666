"""Activations that are hostile to one-pass moments: every choice of the kernel has an adversary here (samples, shifts, scales, passes).

``python tests/adversary.py --cases 10000 [--seed 0] [--isa avx512 avx2 baseline]`` holds the kernels against two passes in float64.
It prints the largest error of every number with its case, and fails if one exceeds 1e-5. Every case is one activation in which every
feature, or every vector, is hostile in a way of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchprobe import Moments
from torchprobe.ops import kernels

LIMIT = 1e-5
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    96,
    97,
    128,
    200,
    255,
    256,
    384,
    511,
    512,
    768,
    1000,
    1024,
    1536,
    1537,
    2049,
    4097,
)
COUNTS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 129, 192, 200, 255, 256, 257, 300, 512, 700, 1100)
MAPS = (1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 19, 22, 24, 28, 32, 33)


@dataclass(frozen=True)
class Case:
    """One activation and the layout it is read in."""

    name: str
    x: Tensor
    feature_dim: int


# -- sequences: n values for each of m features (or vectors), shape (m, n), float64 ------------------------------------------


def gaussian(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.standard_normal((m, n))


def at_samples(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Outliers where a kernel may sample: at quarters and eighths of the whole and of tiles, and next to them, at any offset."""
    x = rng.standard_normal((m, n))
    period = int(rng.choice([n, n, 32, 64, 128, 256, 416, 512]))
    parts = int(rng.choice([4, 4, 8, 16]))
    offset, neighbors = int(rng.integers(0, 3)) if rng.random() < 0.5 else int(rng.integers(0, n)), int(rng.integers(1, 4))
    where = {(p + period * i // parts + offset + k) % n for p in range(0, n, period) for i in range(parts) for k in range(neighbors)}
    where = np.array(sorted(where))
    if rng.random() < 0.4:  # a few are enough for a majority of the samples
        where = rng.permutation(where)[: rng.integers(1, 5)]
    amplitude = 10.0 ** rng.uniform(0, 4, (m, 1)) * rng.choice([-1, 1], (m, 1))
    chosen = rng.random((m, len(where))) < rng.choice([0.3, 0.5, 0.75, 1.0], (m, 1))
    x[:, where] += amplitude * chosen
    return x


def few_values(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Two or three values with any mantissa and share: every rounding goes the same way."""
    values = rng.standard_normal((m, 3)) * 10.0 ** rng.uniform(-1, 1, (m, 3))
    share = np.sort(rng.choice([0.5, 0.25, 1 / 16, 1 / 64, rng.random()], (m, 2)) * rng.random((m, 2)) ** 0.5, 1)
    u = rng.random((m, n))
    return np.take_along_axis(values, (u < share[:, :1]).astype(int) + (u < share[:, 1:]), 1)


def two_values(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """The smallest kurtosis there is, about a mean of up to four standard deviations: nothing hides the error of a cancellation."""
    sign = np.where(rng.random((m, n)) < rng.uniform(0.3, 0.7, (m, 1)), -1.0, 1.0)
    return (sign + rng.uniform(-4, 4, (m, 1))) * 2.0 ** rng.random((m, 1))


def samples_apart(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """One value where samples may be, another one everywhere else, and a little noise."""
    every = int(rng.choice([2, 3, 4, 8, 16, 32, 64]))
    apart = (np.arange(n) % every < max(every // 8, 1)).astype(float)
    return apart * rng.standard_normal((m, 1)) * 3 + 10.0 ** rng.uniform(-4, 0, (m, 1)) * rng.standard_normal((m, n))


def drifting(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Values that rise all the time, or in one step."""
    ramp = np.linspace(-1, 1, n)[None] if rng.random() < 0.5 else (np.arange(n)[None] > rng.integers(0, n, (m, 1))) * 1.0
    return ramp * 10.0 ** rng.uniform(-1, 2, (m, 1)) + rng.standard_normal((m, n))


def heavy(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return rng.standard_t(1.5, (m, n))


def rectified(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    return np.maximum(rng.standard_normal((m, n)) + rng.uniform(-2, 2, (m, 1)), 0)


SEQUENCES = (gaussian, at_samples, at_samples, at_samples, few_values, two_values, two_values, samples_apart, drifting, heavy, rectified)


def sequences(rng: np.random.Generator, m: int, n: int) -> tuple[str, np.ndarray]:
    make = SEQUENCES[rng.integers(len(SEQUENCES))]
    x = make(rng, m, n)
    mean = rng.choice([0, 0, 1]) * rng.uniform(-3, 3, (m, 1)) if rng.random() < 0.7 else 10.0 ** rng.uniform(-1, 4, (m, 1))
    spread = np.abs(x - x.mean(1, keepdims=True)).max(1, keepdims=True) if rng.random() < 0.5 else 1.0
    return make.__name__, x + mean * spread


def cases(seed: int, count: int) -> Iterator[Case]:
    """``count`` cases, the same for the same seed."""
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        of_vectors, channel_major = rng.random() < 0.4, rng.random() < 0.5
        features = int(rng.choice(WIDTHS))
        if channel_major:
            images, height, width = int(rng.integers(1, 4)), int(rng.choice(MAPS)), int(rng.choice(MAPS))
            count_of = images * height * width
            while features * count_of > 400_000:
                features = features // 2 + 1
        else:
            count_of = int(rng.choice(COUNTS))
            while features * count_of > 400_000:
                count_of = count_of // 2 + 1
        name, values = sequences(rng, count_of, features) if of_vectors else sequences(rng, features, count_of)
        rows = values if of_vectors else values.T
        dtype = DTYPES[rng.integers(len(DTYPES))]
        scale = 2.0 ** rng.integers(-20, 20) if dtype in (torch.float32, torch.float64) and rng.random() < 0.3 else 1.0
        x = torch.from_numpy(np.ascontiguousarray(rows * scale)).to(dtype)
        if dtype == torch.float16:
            x = x.clamp(-6e4, 6e4)
        if channel_major:
            x = x.view(images, height, width, features).permute(0, 3, 1, 2).contiguous()
        kind = "vectors" if of_vectors else "features"
        yield Case(f"{name} {kind} {tuple(x.shape)} {dtype}, number {i} of seed {seed}", x, 1 if channel_major else -1)


# -- errors ------------------------------------------------------------------------------------------------------------------


def central(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean powers 2, 3 and 4 of the deviations from the mean along the last axis, by two passes."""
    d = rows - rows[..., :1]
    d -= d.mean(-1, keepdims=True)
    q = d * d
    return q.mean(-1), (q * d).mean(-1), (q * q).mean(-1)


def errors(moments: Moments, x: Tensor, feature_dim: int) -> dict[str, float]:
    """The largest relative error of each number; skewness, which may be 0, against 1 if it is smaller."""
    rows = x.double().movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim]).numpy()
    found: dict[str, float] = {}
    columns = np.ascontiguousarray(rows.T)
    m2, m3, m4 = central(columns)
    varies = (columns != columns[:, :1]).any(1)
    if varies.any():
        m2, m3, m4 = m2[varies], m3[varies], m4[varies]
        skewness, kurtosis = m3 / m2**1.5, m4 / m2**2
        found["variance"] = np.abs(moments.variance.numpy()[varies] / m2 - 1).max()
        found["skewness"] = (np.abs(moments.skewness.numpy()[varies] - skewness) / np.maximum(np.abs(skewness), 1)).max()
        found["kurtosis"] = np.abs(moments.kurtosis.numpy()[varies] / kurtosis - 1).max()
    vectors = rows[(rows != rows[:, :1]).any(1)]
    if len(vectors):
        m2, _, m4 = central(vectors)
        found["vector kurtosis"] = abs(moments.vector_kurtosis / (m4 / m2**2).mean() - 1)
    return {name: float(error) if error == error else math.inf for name, error in found.items()}


def worst(seed: int, count: int) -> dict[str, tuple[float, str]]:
    """The largest error of every number over ``count`` cases, and the case."""
    largest: dict[str, tuple[float, str]] = {}
    for case in cases(seed, count):
        moments = Moments(case.x.shape[case.feature_dim])
        moments.update(case.x, case.feature_dim)
        for name, error in errors(moments, case.x, case.feature_dim).items():
            if error > largest.get(name, (-1.0, ""))[0]:
                largest[name] = error, case.name
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description="Hostile activations against two passes in float64.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", nargs="*", help="instruction sets, one after the other; by default the best one")
    arguments = parser.parse_args()
    if arguments.isa:  # the choice is made when the kernels are loaded, so each has a process
        command = [sys.executable, __file__, f"--cases={arguments.cases}", f"--seed={arguments.seed}"]
        return max(subprocess.run(command, env={**os.environ, "TORCHPROBE_ISA": isa}).returncode for isa in arguments.isa)
    print(f"{arguments.cases} cases, kernels: {kernels()['cpu'].partition(',')[0]}")
    largest = worst(arguments.seed, arguments.cases)
    for name, (error, case) in largest.items():
        print(f"{name:16} {error:.1e}  {case}")
    return int(any(error > LIMIT for error, _ in largest.values()))


if __name__ == "__main__":
    sys.exit(main())
