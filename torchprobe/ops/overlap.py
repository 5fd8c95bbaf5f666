"""``torchprobe::overlap_tally_``: how many pixels each unit's activated region shares with each label.

Schema::

    overlap_tally_(Tensor(a!) intersection, Tensor(b!) activation, Tensor(c!) truth, Tensor maps, Tensor thresholds, Tensor category,
                   Tensor planes, Tensor sizes, Tensor whole, str grid="half_pixel", int height=0, int width=0, bool per_plane=False,
                   Tensor? boxes=None) -> ()

The native kernel is in ``csrc/cpu/overlap.cpp``. This file has the schema, the fake kernel and the reference in PyTorch, which runs on
every device without a native kernel. All of them give exactly the same counts: the definition is in float32, and every step is rounded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchprobe.ops.float_mode import every_number
from torchprobe.ops.library import define, takes
from torchprobe.ops.memory import check_memory

SCHEMA = (
    "overlap_tally_(Tensor(a!) intersection, Tensor(b!) activation, Tensor(c!) truth, Tensor maps, Tensor thresholds, Tensor category, "
    'Tensor planes, Tensor sizes, Tensor whole, str grid="half_pixel", int height=0, int width=0, bool per_plane=False, '
    "Tensor? boxes=None) -> ()"
)
GRIDS = ("half_pixel", "anchored")
LONGEST, MOST_PIXELS = 1 << 20, 1 << 28
"""The most rows or columns, and the most pixels, of a label grid. On a longer one a rounded weight could give a value beyond both ends."""
FARTHEST = 1 << 24
"""The largest coordinate of a box, and the largest height or width of an input."""
MOST_CATEGORIES = 1 << 20
"""The most columns of ``activation``."""
MOST_MASK_BYTES = 1 << 29
"""The most memory that the label masks of a batch may take: a bit for each pixel of each label of each image. The environment variable
``TORCHPROBE_MOST_MASK_BYTES`` sets another limit."""
STEPS = 1 << 20
"""Places between two points of a map at which a pixel may lie, if a box is given: with these, no rounded weight is 1."""
_BLOCK = 1 << 23, 1 << 26  # pixels of all units that the reference interpolates at a time: on the CPU, on other devices


class Arguments(NamedTuple):
    """The arguments of :func:`overlap_tally_`, which explains them, in the order of the schema."""

    intersection: Tensor
    activation: Tensor
    truth: Tensor
    maps: Tensor
    thresholds: Tensor
    category: Tensor
    planes: Tensor
    sizes: Tensor
    whole: Tensor
    grid: str = "half_pixel"
    height: int = 0
    width: int = 0
    per_plane: bool = False
    boxes: Tensor | None = None


def overlap_tally_(
    intersection: Tensor,
    activation: Tensor,
    truth: Tensor,
    maps: Tensor,
    thresholds: Tensor,
    category: Tensor,
    planes: Tensor,
    sizes: Tensor,
    whole: Tensor,
    grid: str = "half_pixel",
    height: int = 0,
    width: int = 0,
    per_plane: bool = False,
    boxes: Tensor | None = None,
) -> None:
    """Adds the counts of a batch of images, in place.

    Each map is interpolated on the image's label grid. The unit is active where the result exceeds the unit's threshold. For every unit and
    label, the operator counts the active pixels that carry the label. Labels are numbered 0 … L − 1; 0 means unlabeled.

    Args:
        intersection: int64 (U, L): active pixels that carry the label.
        activation: int64 (U, C + 1): active pixels in images that are annotated for category c: those that show a label of it, or for
            which ``whole`` says so. The last column counts every image.
        truth: int64 (L,): pixels that carry the label.
        maps: (N, U, h, w), any floating-point type; converted to float32.
        thresholds: (U,), rounded to float32. A unit with the threshold nan is never active.
        category: int64 (L,): the category of each label, 0 … C − 1, or a negative number for a label without a category.
        planes: int32 (sum of planes · rows · columns,): the label planes of all images, one after the other, row by row.
        sizes: int64 (N, 4) on the CPU: for each image the number of planes, rows, columns, and whole-image labels.
        whole: int64 (sum of whole-image labels,): labels that cover the whole grid of an image, one image after the other. Among them may
            be −(c + 1): the image is annotated for category c, even if it shows no label of it. It counts as one in ``sizes``.
        grid: the places of a map's points on the label grid. "half_pixel": as ``interpolate(mode="bilinear", align_corners=False)``;
            pixel i is at (i + ½) · h / rows − ½. "anchored": as in the original Network Dissection, for a network input of ``height`` ×
            ``width``. With s = height // h and r = round(width / columns), point j is at pixel (s // 2) // r + j · (s // r). Pixels
            outside the outermost points have the values of those points.
        height, width: of the network's input; only for "anchored".
        per_plane: how to count a label that several planes (or whole-image entries) give to one pixel. True: once for each of them, in
            truth and intersection, as in the original. False: once.
        boxes: float64 (N, 4) on the CPU, only for "half_pixel": where the map of each image lies on its label grid, if that is not the
            whole grid: top, left, bottom and right, in pixels of the grid. Pixel i is at (i + ½ − top) · h / (bottom − top) − ½, to the
            nearest 2⁻²⁰. Pixels outside the outermost points have the values of those points.

    Raises:
        ValueError: the arguments do not fit together, reach beyond their storage, or share memory with counts; a label is out of range; a
            map is finer than the label grid with "anchored"; or a limit is exceeded. The counts are unchanged then.

    Limits: 2²⁰ rows or columns of a map or a label grid, 2²⁸ pixels of a label grid, 2²⁴ for ``height``, ``width`` and the coordinates of
    boxes, 2²⁰ columns of ``activation``, and 512 MiB for the label masks of a batch, a bit for each pixel of each label of each image, and
    as much again while they grow; the environment variable ``TORCHPROBE_MOST_MASK_BYTES`` sets another limit.

    Numerics: weights are the exact fractions rounded to float32. Rows are interpolated before columns, each as a + w·(b − a), and every
    operation is rounded to float32. Active means strictly greater. So a plateau keeps its value, and no pixel exceeds the largest value of
    its map. The exception is a difference b − a that overflows, beyond 1.7e38; then, and with inf and nan, the formula still applies, and
    nan is not active. Counts are integers, so neither the order of images nor the number of threads matters. Calls that share counts must
    not run at the same time.

    >>> import torch
    >>> from torchprobe.ops import overlap_tally_
    >>> intersection, activation, truth = (torch.zeros(shape, dtype=torch.int64) for shape in [(1, 3), (1, 2), (3,)])
    >>> plane = torch.tensor([[1, 1, 2, 2]] * 2, dtype=torch.int32)
    >>> maps = torch.tensor([[[[4.0, 0.0]]]])  # on four columns: 4, 3, 1, 0
    >>> overlap_tally_(intersection, activation, truth, maps, torch.tensor([0.5]), torch.tensor([-1, 0, 0]),
    ...                plane.flatten(), torch.tensor([[1, 2, 4, 0]]), torch.tensor([], dtype=torch.int64))
    >>> intersection.tolist(), activation.tolist(), truth.tolist()
    ([[0, 4, 2]], [[6, 6]], [0, 4, 4])
    """
    if isinstance(maps, Tensor) and maps.is_floating_point():
        maps = maps.detach().to(torch.float32)
    if isinstance(thresholds, Tensor):
        thresholds = thresholds.to(torch.float32)
    a = Arguments(intersection, activation, truth, maps, thresholds, category, planes, sizes, whole, grid, height, width, per_plane, boxes)
    try:
        torch.ops.torchprobe.overlap_tally_(*a)
    except (RuntimeError, TypeError, AttributeError):
        check(a)  # a clear message, if an argument was the cause
        check_memory(*memory_of(a), copied=True)
        check_values(a)
        raise


def memory_of(a: Arguments) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors among the arguments, by name: what is written to, and what is read."""
    tensors = {name: value for name, value in a._asdict().items() if isinstance(value, Tensor)}
    counts: tuple[str, ...] = ("intersection", "activation", "truth")
    written = {name: tensors.pop(name) for name in counts if name in tensors}
    return written, tensors


def check(a: Arguments) -> None:
    """Raises ``ValueError`` that names the shapes and types that do not fit. Reads no values."""
    maps = a.maps
    if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.dtype != torch.float32:
        got = f"{maps.dtype} of shape {tuple(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps must be floating point of shape (images, units, h, w), got {got}")
    images, units, h, w = maps.shape
    if h == 0 or w == 0 or max(h, w) > LONGEST:
        raise ValueError(f"maps of shape {tuple(maps.shape)} have no positions, or more than {LONGEST} rows or columns")
    labels = a.truth.shape[0] if a.truth.dim() == 1 else -1
    columns = a.activation.shape[-1]
    for name, tensor, dtype, shape in (
        ("intersection", a.intersection, torch.int64, (units, labels)),
        ("activation", a.activation, torch.int64, (units, columns)),
        ("truth", a.truth, torch.int64, (labels,)),
        ("thresholds", a.thresholds, torch.float32, (units,)),
        ("category", a.category, torch.int64, (labels,)),
        ("planes", a.planes, torch.int32, (a.planes.numel(),)),
        ("sizes", a.sizes, torch.int64, (images, 4)),
        ("whole", a.whole, torch.int64, (a.whole.numel(),)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape} for {images} maps of {units} units and {labels} labels, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    counts = {"intersection": a.intersection, "activation": a.activation, "truth": a.truth}
    for name, tensor in {**counts, "thresholds": a.thresholds}.items():
        if tensor.device != maps.device or (name in counts and not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous on {maps.device}, where the maps are; it is on {tensor.device}")
    if not 1 <= columns <= MOST_CATEGORIES:
        raise ValueError(f"activation has {columns} columns; it needs a last one, which counts every image, and at most {MOST_CATEGORIES}")
    if a.grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {a.grid!r}")
    if a.grid == "anchored" and not (h <= a.height <= FARTHEST and w <= a.width <= FARTHEST):
        given = f"{a.height} × {a.width} is less than the {h} × {w} of the maps, or more than {FARTHEST}"
        raise ValueError(f'grid="anchored" needs height and width of the network\'s input; {given}')
    if (boxes := a.boxes) is not None:
        if boxes.dtype != torch.float64 or tuple(boxes.shape) != (images, 4) or boxes.device.type not in ("cpu", "meta"):
            given = f"{boxes.dtype} of shape {tuple(boxes.shape)} on {boxes.device}"
            raise ValueError(f"boxes must be float64 of shape ({images}, 4) on the CPU, got {given}")
        if a.grid == "anchored":
            raise ValueError('boxes need grid="half_pixel": an anchored grid belongs to the whole picture')


def check_values(a: Arguments) -> None:
    """Raises ``ValueError`` if sizes do not add up, a label or category does not exist, or a grid is impossible; names the image."""
    labels, categories = a.truth.shape[0], a.activation.shape[1] - 1
    if labels and int(a.category.amax()) >= categories:
        raise ValueError(f"category holds {int(a.category.amax())}, but activation has room for {categories} categories")
    sizes = a.sizes.tolist()
    for n, (count, rows, columns, wholes) in enumerate(sizes):
        if count < 0 or wholes < 0 or not 0 < rows <= LONGEST or not 0 < columns <= LONGEST or rows * columns > MOST_PIXELS:
            limits = f"a grid has between 1 and {LONGEST} rows and columns, and at most {MOST_PIXELS} pixels"
            raise ValueError(f"sizes[{n}] = {sizes[n]}: {limits}; no number is negative")
    pixels, wholes = [k * rows * columns for k, rows, columns, _ in sizes], [row[3] for row in sizes]
    for name, tensor, lengths, least in (("planes", a.planes, pixels, 0), ("whole", a.whole, wholes, -categories)):
        if sum(lengths) != tensor.numel():
            raise ValueError(f"{name} has {tensor.numel()} elements, but sizes require {sum(lengths)}")
        if tensor.numel() and (int(tensor.amin()) < least or int(tensor.amax()) >= labels):
            for n, part in enumerate(tensor.split(lengths)):
                for label in part[(part < least) | (part >= labels)][:1].tolist():
                    also = f"; whole may also hold −1 to −{categories} for categories" if least else ""
                    raise ValueError(f"image {n} of the batch has label {label}, but labels are numbered 0 to {labels - 1}{also}")
    if a.boxes is not None:
        for n, (top, left, bottom, right) in enumerate(a.boxes.tolist()):
            if not (-FARTHEST <= top < bottom <= FARTHEST and -FARTHEST <= left < right <= FARTHEST):
                raise ValueError(f"boxes[{n}] = {a.boxes[n].tolist()} must be top < bottom and left < right, within ±{FARTHEST}")
    for rows, columns in {(rows, columns) for _, rows, columns, _ in sizes}:
        upsample(a.maps[:0, :0], rows, columns, a.grid, a.height, a.width)
    most = most_mask_bytes()
    if sum(size * min(labels, size) for size in pixels) // 8 > most:  # the usual batch is far from it
        needed = 0
        for n, (size, part) in enumerate(zip(pixels, a.planes.split(pixels), strict=True)):
            needed += len(part.unique()) * size // max(sizes[n][0], 1) // 8
            if needed > most:
                what = f"the label masks of this batch take more than {most} bytes, at image {n}: pass fewer images at a time"
                raise ValueError(f"planes: {what}, or set TORCHPROBE_MOST_MASK_BYTES")


def axis_in_box(n: int, size: int, first: float, last: float) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`axis`, for a map that reaches from ``first`` to ``last`` on an axis of ``size`` pixels."""
    if (first, last) == (0, size):
        return axis(n, size, "half_pixel")
    at = (torch.arange(size, dtype=torch.float64) + 0.5 - first) * n / (last - first) - 0.5
    at = torch.floor(at.clamp(0, n - 1) * STEPS + 0.5) / STEPS
    low = at.floor().long()
    return low, (low + 1).clamp(max=n - 1), (at - low).float()


def axis(n: int, size: int, grid: str, length: int = 0, reduction: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The place of each of ``size`` pixels between the ``n`` points of a map: lower point, upper point (int64), weight (float32).

    ``length`` is that of the network's input along this axis, for "anchored".
    """
    i = torch.arange(size)
    if grid == "half_pixel":
        numerator, denominator = (2 * i + 1) * n - size, 2 * size
    else:
        denominator = length // n // reduction
        if denominator == 0:
            raise ValueError(f'grid="anchored" needs a map that is coarser than the label grid: {n} points for {size} pixels of labels')
        numerator = i - length // n // 2 // reduction
    numerator = numerator.clamp(0, (n - 1) * denominator)
    low = numerator // denominator
    weight = (numerator - low * denominator).double() / denominator
    return low, (low + 1).clamp(max=n - 1), weight.float()


def upsample(
    maps: Tensor, rows: int, columns: int, grid: str = "half_pixel", height: int = 0, width: int = 0, box: Sequence[float] | None = None
) -> Tensor:
    """The definition: float32 maps (…, h, w) on a label grid (…, rows, columns). Each operation is a separate kernel, so none is fused.
    ``box``: a row of ``boxes`` of :func:`overlap_tally_`."""
    if box is None:
        reduction = max((2 * width + columns) // (2 * columns), 1)
        x, y = axis(maps.shape[-1], columns, grid, width, reduction), axis(maps.shape[-2], rows, grid, height, reduction)
    else:
        x, y = axis_in_box(maps.shape[-1], columns, box[1], box[3]), axis_in_box(maps.shape[-2], rows, box[0], box[2])
    low, high, weight = (t.to(maps.device) for t in x)
    left = maps[..., low]
    across = left + weight * (maps[..., high] - left)
    low, high, weight = (t.to(maps.device) for t in y)
    upper = across[..., low, :]
    return upper + weight[:, None] * (across[..., high, :] - upper)


@takes(Arguments)
@every_number()
def reference(a: Arguments) -> None:
    """The meaning of :func:`overlap_tally_`, in PyTorch on any device: images with the same grid together, only active units, intersections
    as a product of masks. On other devices every operation and synchronization is expensive, so a batch needs only a few dozen operations
    and a few synchronizations."""
    check(a)
    check_memory(*memory_of(a), copied=True)
    check_values(a)
    maps, thresholds, device = a.maps, a.thresholds, a.maps.device
    sizes = a.sizes.tolist()
    planes_of = a.planes.split([k * rows * columns for k, rows, columns, _ in sizes])
    wholes_of = a.whole.split([row[3] for row in sizes])
    # A map whose points do not exceed the threshold does not exceed it between them, unless differences overflow.
    active = ((maps > thresholds[:, None, None]) | ~(maps.abs() < 2.0**126)).flatten(2).any(2)
    block = _BLOCK[device.type != "cpu"]
    boxes = [None] * len(sizes) if a.boxes is None else [tuple(box) for box in a.boxes.tolist()]
    grids = [(rows, columns, box) for (_, rows, columns, _), box in zip(sizes, boxes, strict=True)]
    for rows, columns, box in dict.fromkeys(grids):
        images = [n for n, grid in enumerate(grids) if grid == (rows, columns, box)]
        pixels = rows * columns
        # (images, planes, pixels), padded with 0 if an image has fewer planes
        planes = pad_sequence([planes_of[n].view(-1, pixels) for n in images], True).to(device)
        whole = pad_sequence([wholes_of[n] for n in images], True).to(device)
        shown = torch.zeros(len(images), len(a.truth), dtype=torch.bool, device=device)
        shown.scatter_(1, planes.flatten(1).long(), True).scatter_(1, whole.clamp(min=0), True)[:, :1] = False
        labels, units = _true_columns(shown), _true_columns(active[images])
        step = max(1, block // (pixels * max(labels.shape[1], units.shape[1], 1)))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            at_once = max(1, block // (pixels * step))
            regions = []
            for some in units[part].split(at_once, 1):
                image = torch.tensor(images[part], device=device)[:, None]
                mask = upsample(maps[image, some], rows, columns, a.grid, a.height, a.width, box) > thresholds[some][..., None, None]
                regions.append((some, (mask & active[image, some][..., None, None]).flatten(2)))
            areas = []
            for names in labels[part].split(at_once, 1):  # an image may show very many labels
                masks = _masks(planes[part], whole[part], names, a.per_plane)
                areas.append(masks.sum(2).long())
                a.truth.index_add_(0, names.flatten(), areas[-1].flatten())
                for some, mask in regions:
                    common = (mask.to(masks.dtype) @ masks.mT).long()
                    a.intersection.index_put_((some[:, :, None], names[:, None]), common, accumulate=True)
            present = _present(a.category.to(device)[labels[part]], torch.cat(areas, 1), whole[part], a.activation.shape[1])
            for some, mask in regions:
                a.activation.index_add_(0, some.flatten(), (mask.sum(2)[..., None] * present[:, None]).flatten(0, 1))


def most_mask_bytes() -> int:
    """How much memory the label masks of a batch may take."""
    given = os.environ.get("TORCHPROBE_MOST_MASK_BYTES", "")
    return int(given) if given.isdecimal() and int(given) else MOST_MASK_BYTES


def _true_columns(chosen: Tensor) -> Tensor:
    """The columns that are True in each row, ascending: bool (n, m) → int64 (n, most). Shorter rows end with columns that are False."""
    most = int(chosen.sum(1).amax()) if chosen.numel() else 0
    return chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def _masks(planes: Tensor, whole: Tensor, labels: Tensor, per_plane: bool) -> Tensor:
    """How often each pixel carries each label: planes (n, k, pixels), whole (n, m), labels (n, l) → (n, l, pixels)."""
    dtype = torch.float32 if planes.shape[1:].numel() < 1 << 24 else torch.float64  # sums of a product must be exact
    counts = (whole[:, None] == labels[:, :, None]).sum(2, keepdim=True).to(dtype).expand(-1, -1, planes.shape[2]).contiguous()
    for plane in planes.unbind(1):
        counts += plane[:, None] == labels[:, :, None]
    counts *= labels[:, :, None] > 0  # rows of an image with fewer labels are padded, and 0 may be among the padding
    return counts if per_plane else counts.clamp(max=1)


def _present(category: Tensor, area: Tensor, whole: Tensor, columns: int) -> Tensor:
    """The columns of ``activation`` in which each image counts: categories (n, l) of its labels, their areas, whole (n, m) → int64
    (n, columns)."""
    present = torch.zeros(len(category), columns + 1, dtype=torch.int64, device=category.device)
    present.scatter_(1, category.where((category >= 0) & (area > 0), columns), 1)
    present.scatter_(1, (-1 - whole).where(whole < 0, columns), 1)  # annotated, whatever the image shows
    present[:, columns - 1] = 1  # the last column counts every image
    return present[:, :columns]


def register(library: torch.library.Library) -> None:
    """Defines the operator, except for native kernels."""
    define(library, SCHEMA, reference, fake=takes(Arguments)(check))
