"""Network Dissection and average precision by their definitions, in NumPy: slow, plain, and independent of the library."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction

import numpy as np

F = np.float32


def axis(n: int, size: int, mode: str, given: int = 0, given_width: int = 0, columns: int = 0) -> list[tuple[int, int, np.float32]]:
    """For each pixel: the points below and above it, and how far it is from the one below."""
    points = []
    for i in range(size):
        if mode == "netdissect":
            field, reduction = given // n, int(np.floor(given_width / columns + 0.5))
            centers = [(field // 2) // reduction + j * (field // reduction) for j in range(n)]
            if i <= centers[0]:
                points.append((0, min(1, n - 1), F(0)))
            elif i >= centers[-1]:
                points.append((n - 1, n - 1, F(0)))
            else:
                j = max(j for j in range(n) if centers[j] <= i)
                points.append((j, j + 1, F((i - centers[j]) / (centers[j + 1] - centers[j]))))
        else:
            up = max((2 * i + 1) * n - size, 0)  # the position in units of 1 / (2 · size)
            low = min(up // (2 * size), n - 1)
            points.append((low, min(low + 1, n - 1), F((up - low * 2 * size) / (2 * size)) if low < n - 1 else F(0)))
    return points


def axis_in_box(n: int, size: int, first: float, last: float) -> list[tuple[int, int, np.float32]]:
    """As :func:`axis`, for a map between two places on the axis, in exact fractions, to the nearest 2⁻²⁰."""
    points = []
    for i in range(size):
        at = (Fraction(2 * i + 1, 2) - Fraction(first)) * n / (Fraction(last) - Fraction(first)) - Fraction(1, 2)
        steps = (min(max(at, Fraction(0)), Fraction(n - 1)) * 2**20 + Fraction(1, 2)) // 1
        low = int(steps) >> 20
        points.append((low, min(low + 1, n - 1), F((int(steps) - (low << 20)) / 2**20)))
    return points


def upsample(
    map_: np.ndarray, rows: int, columns: int, mode: str, given: tuple[int, int] = (0, 0), box: Sequence[float] | None = None
) -> np.ndarray:
    """One float32 map on a label grid: horizontally, then vertically, a + w·(b − a), every step rounded to float32."""
    h, w = map_.shape
    whole = box is None or tuple(box) == (0, 0, rows, columns)
    x = axis(w, columns, mode, given[1], given[1], columns) if whole else axis_in_box(w, columns, box[1], box[3])
    y = axis(h, rows, mode, given[0], given[1], columns) if whole else axis_in_box(h, rows, box[0], box[2])
    across = np.zeros((h, columns), F)
    with np.errstate(all="ignore"):
        for i, (a, b, weight) in enumerate(x):
            step = (weight * (map_[:, b] - map_[:, a]).astype(F)).astype(F)
            across[:, i] = map_[:, a] + step
        out = np.zeros((rows, columns), F)
        for i, (a, b, weight) in enumerate(y):
            step = (weight * (across[b] - across[a]).astype(F)).astype(F)
            out[i] = across[a] + step
    return out


def overlap(
    maps: np.ndarray,
    thresholds: np.ndarray,
    images: Sequence[tuple[Sequence[np.ndarray], Sequence[int], tuple[int, int]]],
    category: Sequence[int],
    categories: int,
    mode: str = "default",
    given: tuple[int, int] = (0, 0),
    annotated: Sequence[Collection[int]] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """intersection (U, L), activation (U, L), truth (L,) of maps (N, U, h, w) and images (planes, whole-image labels, (rows, columns)).
    annotated: for each image the categories that it is annotated for beside those of the labels that it shows. boxes: where the map of each
    image lies on its grid: top, left, bottom, right; without them on the whole grid."""
    units, labels = maps.shape[1], len(category)
    intersection, truth = np.zeros((units, labels), np.int64), np.zeros(labels, np.int64)
    activation = np.zeros((units, labels), np.int64)
    for n, (planes, whole, (rows, columns)) in enumerate(images):
        shown = {int(label) for plane in planes for label in np.unique(plane)} | set(whole)
        often = {}  # label → how often each pixel has it
        for label in shown - {0}:
            often[label] = np.full((rows, columns), list(whole).count(label))
            for plane in planes:
                often[label] += plane == label
            if mode != "netdissect":
                often[label] = np.minimum(often[label], 1)
            truth[label] += often[label].sum()
        present = {category[label] for label in often} | set(annotated[n] if annotated else ())
        for unit in range(units):
            box = boxes[n] if len(boxes) else None
            mask = upsample(maps[n, unit].astype(F), rows, columns, mode, given, box) > F(thresholds[unit])
            for label in often:
                intersection[unit, label] += often[label][mask].sum()
            for label in range(labels):
                if mode == "global" or (category[label] >= 0 and category[label] in present):
                    activation[unit, label] += mask.sum()
    return intersection, activation, truth


def iou(intersection: np.ndarray, activation: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return intersection / np.maximum(activation + truth - intersection, 1)


def average_precision(scores: np.ndarray, shown: np.ndarray) -> float:
    """One unit and one concept: precision at each distinct score, weighted by what it adds to recall."""
    positives = shown.sum()
    if positives == 0:
        return float("nan")
    total, recall = 0.0, 0.0
    for score in np.unique(scores)[::-1]:
        taken = scores >= score
        hits = (taken & shown).sum()
        total += (hits / positives - recall) * (hits / taken.sum())
        recall = hits / positives
    return total


def bilinear(values: np.ndarray, y: float, x: float) -> float:
    """The value of a map between its points, in float64; outside of them that of the nearest."""
    h, w = values.shape
    y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
    i, j = min(int(y), h - 2) if h > 1 else 0, min(int(x), w - 2) if w > 1 else 0
    down, right = (1 if h > 1 else 0), (1 if w > 1 else 0)
    upper = values[i, j] + (x - j) * (values[i, j + right] - values[i, j])
    lower = values[i + down, j] + (x - j) * (values[i + down, j + right] - values[i + down, j])
    return float(upper + (y - i) * (lower - upper))
