"""The labels of a batch of images in the form that the kernels read: a few flat tensors, whatever the sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ImageLabels = Iterable[tuple[str, Any]]
"""(category, labels) of one image: label planes (k, rows, columns) or (rows, columns), or whole-image labels (n,); 0 is unlabelled."""


class LabelBatch(NamedTuple):
    """Label planes and whole-image labels of several images; see :func:`torchprobe.ops.overlap_tally_`.

    ``planes``: int32, all planes of all images, one after the other, flat. ``sizes``: int64 (images, 4): planes, rows, columns, whole-image
    labels. ``whole``: int64, the whole-image labels of all images.
    """

    planes: Tensor
    sizes: Tensor
    whole: Tensor

    @classmethod
    def pack(cls, images: Sequence[ImageLabels], grids: Sequence[tuple[int, int]]) -> LabelBatch:
        """One image after the other.

        Args:
            images: as :meth:`torchprobe.datasets.Broden.image_labels` gives them.
            grids: rows and columns of each image's label grid; whole-image labels have no other way to know.

        Raises:
            ValueError: planes that are not of the size of their grid; names the image, counted from 0.

        >>> plane = torch.tensor([[1, 1, 0], [2, 2, 2]])
        >>> LabelBatch.pack([[("object", plane), ("scene", [7])], [("scene", [8, 9])]], [(2, 3), (4, 4)]).sizes
        tensor([[1, 2, 3, 1],
                [0, 4, 4, 2]])
        """
        if len(images) != len(grids):
            raise ValueError(f"{len(images)} images, but {len(grids)} grids")
        flat: list[Tensor] = []
        wholes: list[Tensor] = []
        sizes = []
        for n, (labels, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
            planes, whole = 0, 0
            for category, given in labels:
                values = torch.as_tensor(given)
                if values.dim() > 1:
                    if values.dim() > 3 or tuple(values.shape[-2:]) != (rows, columns):
                        raise ValueError(f"image {n}: {category} has planes of shape {tuple(values.shape)} on a grid of {rows} × {columns}")
                    flat.append(values.to(torch.int32).flatten())
                    planes += values.numel() // (rows * columns)
                else:
                    wholes.append(values.to(torch.int64).flatten())
                    whole += values.numel()
            sizes.append((planes, rows, columns, whole))
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int32), *flat]),
            torch.tensor(sizes, dtype=torch.int64).reshape(-1, 4),
            torch.cat([torch.empty(0, dtype=torch.int64), *wholes]),
        )
