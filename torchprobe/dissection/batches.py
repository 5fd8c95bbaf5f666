"""The images and labels of a data set in batches. Every process that asks for a batch gets the same one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.datasets.broden import Broden
from torchprobe.datasets.broden.presence import image_areas
from torchprobe.datasets.geometry import UNKNOWN, Box, Geometry, WholePicture, fingerprint, whole_picture
from torchprobe.dissection.framing import Framed, frame

Preprocess = Callable[[Any], Tensor]
"""PIL image → tensor (3, H, W)."""


class LabelBatch(NamedTuple):
    """Label planes and whole-image labels of several images, as the kernels read them: flat tensors, whatever the sizes of the images.
    See :func:`torchprobe.ops.overlap_tally_`.

    ``planes``: int32, all planes of all images, one after the other, flat. ``sizes``: int64 (images, 4): planes, rows, columns, whole-image
    labels. ``whole``: int64, the whole-image labels of all images, and −(c + 1) where an image is annotated for category c.
    ``boxes``: float64 (images, 4), where the map of each image lies on its grid, in pixels; None: on the whole grid.
    """

    planes: Tensor
    sizes: Tensor
    whole: Tensor
    boxes: Tensor | None = None

    @classmethod
    def pack(
        cls,
        images: Sequence[Iterable[tuple[str, Any]]],
        grids: Sequence[tuple[int, int]],
        categories: Sequence[str] = (),
        only_empty: bool = False,
        boxes: Sequence[tuple[float, float, float, float]] | None = None,
    ) -> LabelBatch:
        """The labels of each image, one image after the other.

        Args:
            images: pairs (category, labels) of each image, see :meth:`torchprobe.datasets.Broden.image_labels`. Labels are planes
                (k, rows, columns) or (rows, columns), or whole-image labels (n,); 0 means unlabeled.
            grids: rows and columns of the label grid of each image.
            categories: their names, by number. An image is annotated for those of which it has planes, even if they hold only 0, or
                whole-image labels. Without them it is annotated only for the primary categories of the labels that it shows.
            only_empty: note a category only if its planes hold nothing but 0, as ``mode="netdissect"`` counts.
            boxes: top, left, bottom and right of the map of each image on its grid, in pixels; None: maps cover the whole grid.

        Raises:
            ValueError: planes of another size than the grid; the message names the image, counted from 0.

        >>> plane = torch.tensor([[1, 1, 0], [2, 2, 2]])
        >>> LabelBatch.pack([[("object", plane), ("scene", [7])], [("scene", [8, 9])]], [(2, 3), (4, 4)]).sizes
        tensor([[1, 2, 3, 1],
                [0, 4, 4, 2]])
        >>> LabelBatch.pack([[("object", torch.zeros(2, 3))]], [(2, 3)], ["scene", "object"]).whole  # no object, but annotated
        tensor([-2])
        """
        if len(images) != len(grids):
            raise ValueError(f"{len(images)} images, but {len(grids)} grids")
        flat: list[Tensor] = []
        wholes: list[Tensor] = []
        sizes = []
        for n, (labels, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
            planes, whole = 0, 0
            shown: dict[str, bool] = {}  # the categories that the image is annotated for; whether it shows a label there
            for category, given in labels:
                numbers = torch.as_tensor(given)
                if (shows := bool(numbers.any())) or numbers.dim() > 1:
                    shown[category] = shows or shown.get(category, False)
                if numbers.dim() > 1:
                    if numbers.dim() > 3 or tuple(numbers.shape[-2:]) != (rows, columns):
                        raise ValueError(
                            f"image {n}: {category} has planes of shape {tuple(numbers.shape)} on a grid of {rows} × {columns}"
                        )
                    flat.append(numbers.to(torch.int32).flatten())
                    planes += numbers.numel() // (rows * columns)
                else:
                    wholes.append(numbers.to(torch.int64).flatten())
                    whole += numbers.numel()
            noted = [-1 - c for c, name in enumerate(categories) if name in shown and not (only_empty and shown[name])]
            wholes.append(torch.tensor(noted, dtype=torch.int64))
            sizes.append((planes, rows, columns, whole + len(noted)))
        return cls(
            torch.cat([torch.empty(0, dtype=torch.int32), *flat]),
            torch.tensor(sizes, dtype=torch.int64).reshape(-1, 4),
            torch.cat([torch.empty(0, dtype=torch.int64), *wholes]),
            None if boxes is None else torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        )


class Batch(NamedTuple):
    """Images that pass the network together.

    ``number``: of the batch. ``rows``: rows of the data set. ``images``: (n, 3, H, W), empty if they were not asked for. ``boxes``: the
    part of each picture that they show. ``labels`` of these images where they look, ``areas`` and ``outside``, see
    :class:`torchprobe.dissection.shown.ShownLabels`; None if they were not asked for.
    """

    number: int
    rows: list[int]
    images: Tensor
    boxes: list[Box]
    labels: LabelBatch | None = None
    areas: list[tuple[Tensor, Tensor]] | None = None
    outside: Tensor | None = None


class _Read(NamedTuple):
    """What was read of one image."""

    image: Tensor
    box: Box
    framed: Framed | None = None
    areas: tuple[Tensor, Tensor] | None = None


class Batches:
    """Batch i holds the images ``rows[i · size : (i + 1) · size]``, whichever process reads it. So every image always has the same
    neighbors in its batch, and a network gives the same numbers for it, to the last bit.

    Args:
        broden: the data set.
        rows: rows of it.
        preprocess: makes a tensor (3, H, W) of a PIL image; the same shape for all images.
        size: images in a batch.
        workers: threads that decode, two batches ahead.
        labels_of: row → the row whose labels it gets; default: its own.
        only_empty: see :meth:`LabelBatch.pack`.
        geometry: which part of a picture its tensor shows; default: found for ``preprocess``.

    Raises:
        ValueError: ``size`` or ``workers`` below 1.
    """

    def __init__(
        self,
        broden: Broden,
        rows: Sequence[int],
        preprocess: Preprocess,
        size: int = 32,
        workers: int = 2,
        labels_of: Callable[[int], int] | None = None,
        only_empty: bool = False,
        geometry: Geometry | None = None,
    ) -> None:
        if size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers must be at least 1, got {size} and {workers}")
        self.broden, self.rows, self.preprocess, self.size, self.workers = broden, list(rows), preprocess, size, workers
        self.labels_of, self.only_empty = labels_of or (lambda row: row), only_empty
        self.geometry = geometry or Geometry(preprocess)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def rows_of(self, batch: int) -> list[int]:
        """The rows of the data set that a batch holds."""
        return self.rows[batch * self.size : (batch + 1) * self.size]

    def image(self, row: int) -> Tensor:
        """One image, as the network takes it.

        Raises:
            DatasetError: it cannot be read.
            TypeError: ``preprocess`` returns something else than a tensor.
        """
        return to_tensor(self.preprocess, self.broden.image(row))

    def read(self, numbers: Sequence[int], labels: bool = False, boxes: Tensor | None = None) -> Iterator[Batch]:
        """Some batches, in the order given.

        Args:
            numbers: which batches.
            labels: whether the batches hold labels.
            boxes: float64 (rows, 4), if they are known: then no image is read.
        """

        def one(place: int) -> _Read:
            return self._read(place, labels, None if boxes is None else Box(*boxes[place].tolist()))

        with ThreadPoolExecutor(self.workers, thread_name_prefix="torchprobe-images") as threads:
            ahead: deque[list[Future[_Read]]] = deque()
            try:
                for at, number in enumerate(numbers):
                    for later in numbers[at + len(ahead) : at + 3]:
                        first = later * self.size
                        ahead.append([threads.submit(one, first + i) for i in range(len(self.rows_of(later)))])
                    yield self._collect(number, [future.result() for future in ahead.popleft()])
            finally:
                threads.shutdown(wait=False, cancel_futures=True)  # a caller that stops early does not wait

    def _read(self, place: int, labels: bool, box: Box | None) -> _Read:
        row, image = self.rows[place], torch.empty(0)
        if box is None:
            picture = self.broden.image(row)
            image, box = to_tensor(self.preprocess, picture), self.geometry.box(*picture.size)
        if not labels:
            return _Read(image, box)
        described, found = self.broden.rows[self.labels_of(row)], self.broden.image_labels(self.labels_of(row))
        framed = frame(found, described.label_height, described.label_width, box)
        return _Read(image, box, framed, image_areas(framed.labels, self.broden.label_size))

    def _collect(self, number: int, parts: list[_Read]) -> Batch:
        rows = self.rows_of(number)
        images = stack([part.image for part in parts], self.broden, rows)
        batch = Batch(number, rows, images, [part.box for part in parts])
        framed = [part.framed for part in parts if part.framed is not None]
        if not framed:
            return batch
        packed = LabelBatch.pack(
            [part.labels for part in framed], [(part.rows, part.columns) for part in framed], self.broden.categories, self.only_empty,
            None if all(part.box.whole for part in parts) else [part.box for part in framed],
        )  # fmt: skip
        areas = [part.areas for part in parts if part.areas is not None]
        return batch._replace(labels=packed, areas=areas, outside=torch.cat([part.outside for part in framed]))


PREPROCESSING = ("whole", "encoder")
"""The whole picture, resized, with the colors of the encoder's transform; or the transform of the encoder itself."""


def find_preprocess(broden: Broden | None, model: nn.Module, preprocess: Preprocess | str | None = None) -> Preprocess:
    """What makes tensors of the images.

    Args:
        broden: the data set, or None for other pictures.
        model: the network; its transform is ``model.preprocess``.
        preprocess: a function, or one of :data:`PREPROCESSING`. Default: the transform of the data set if it has one, else "whole".

    Raises:
        ValueError: neither the data set nor the model has a transform, or the colors of the model's cannot be told.
    """
    if preprocess is not None and not isinstance(preprocess, str):
        return preprocess
    if preprocess is None and broden is not None and broden.transform is not None:
        transform: Preprocess = broden.transform
        return transform
    own: Preprocess | None = getattr(model, "preprocess", None)
    if own is None:
        raise ValueError("it is unknown how an image becomes a tensor: give preprocess=, or give Broden a transform")
    if (preprocess or "whole") not in PREPROCESSING:
        raise ValueError(f"preprocess must be a function or one of {', '.join(PREPROCESSING)}, got {preprocess!r}")
    return own if preprocess == "encoder" else whole_picture(own)


def same_preprocess(
    metadata: Mapping[str, Any], broden: Broden | None, model: nn.Module, preprocess: Preprocess | str | None = None
) -> Preprocess:
    """The preprocessing that a dissection was made with: the given one, else that of the data set, or one of :data:`PREPROCESSING`.

    Args:
        metadata: of the dissection.
        broden, model, preprocess: see :func:`find_preprocess`.

    Raises:
        ValueError: none of them does the same.
    """
    made = metadata.get("preprocessing")
    given = None if broden is None else broden.transform
    if made is None:  # of a version that knew only the transform of the encoder
        return find_preprocess(broden, model, preprocess or (None if given is not None else "encoder"))
    choices: list[Preprocess | str] = [] if preprocess is None else [preprocess]
    if preprocess is None:
        choices = [] if given is None else [given]
        choices += PREPROCESSING if hasattr(model, "preprocess") else ()
    for choice in choices:
        try:
            found = find_preprocess(broden, model, choice)
        except ValueError:  # the colors of this network cannot be told, so this is not what was done
            if preprocess is not None:
                raise
            continue
        # Another version of Pillow may resize a little differently. This transform is known by what it says of itself.
        if isinstance(found, WholePicture) and repr(found) == made.get("transform"):
            return found
        does = fingerprint(found)
        if does == UNKNOWN and broden is not None:  # it may take pictures of one size only
            does = fingerprint(found, broden.image(0).size)
        if does == made.get("fingerprint"):
            return found
    brief = " ".join(str(made.get("transform")).split())[:200]
    raise ValueError(f"the dissection was made with another preprocessing ({brief}): give it as preprocess=")


def to_tensor(preprocess: Preprocess, image: Any) -> Tensor:
    """``preprocess(image)``, checked.

    Raises:
        TypeError: it is not a tensor with three dimensions.
    """
    tensor = preprocess(image)
    if not isinstance(tensor, Tensor) or tensor.dim() != 3:
        got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"preprocess must return a tensor (3, H, W), got {got}")
    return tensor


def stack(images: Sequence[Tensor], broden: Broden, rows: Sequence[int]) -> Tensor:
    """The images of some rows as one tensor (n, 3, H, W).

    Raises:
        ValueError: their shapes differ.
    """
    for row, image in zip(rows, images, strict=True):
        if image.shape != images[0].shape:
            name = broden.rows[row].image
            raise ValueError(f"{name} has shape {tuple(image.shape)}, another image {tuple(images[0].shape)}: preprocess must resize")
    return torch.stack(list(images))
