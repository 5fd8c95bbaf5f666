"""Label sets for the tests of dissection, with every trap of the format in them."""

from __future__ import annotations

import numpy as np
import torch

from torchprobe.dissection import LabelBatch

LABELS, CATEGORIES = 301, 3  # more than 255 labels: two bytes


def image(rng, rows, columns, planes, whole, used=12):
    """Planes of patches, among them labels beyond 255, unlabeled pixels, and labels that several planes share."""
    numbers = rng.choice(np.r_[0, 0, 1:6, 256, 257, 300], used)
    maps = [np.kron(rng.choice(numbers, (rows, columns // 4 + 1)), np.ones((1, 4), int))[:, :columns] for _ in range(planes)]
    return [m.astype(np.int32) for m in maps], [int(n) for n in rng.choice([0, 1, 2, 299, 300], whole)], (rows, columns)


def category():
    primary = np.arange(LABELS) % (CATEGORIES + 1) - 1  # some belong to none
    primary[0] = 2  # a reader may say so of the unlabeled, as the original does
    return primary


def pack(images, annotated=(), boxes=None):
    """annotated: for each image, the categories that it is annotated for whatever it shows. boxes: where the maps lie on the grids."""
    notes = [[-1 - c for c in categories] for categories in annotated] or [[]] * len(images)
    labels = [
        [*(("c", torch.from_numpy(plane)) for plane in planes), ("s", [*whole, *note])]
        for (planes, whole, _), note in zip(images, notes, strict=True)
    ]
    return LabelBatch.pack(labels, [grid for _, _, grid in images], boxes=boxes)
