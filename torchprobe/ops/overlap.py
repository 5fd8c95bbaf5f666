"""``torchprobe::overlap_tally_``: how many pixels each unit's activated region shares with each label.

Schema::

    overlap_tally_(Tensor(a!) intersection, Tensor(b!) activation, Tensor(c!) truth, Tensor maps, Tensor thresholds, Tensor category,
                   Tensor planes, Tensor sizes, Tensor whole, str grid="half_pixel", int height=0, int width=0, bool per_plane=False) -> ()

The native kernel lives in ``csrc/cpu/overlap.cpp``. Here are the schema, the fake kernel, and the reference in plain PyTorch, which is also
what runs on every device that has no kernel. All of them count the same, exactly: the definition is in float32, and every step is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = (
    "overlap_tally_(Tensor(a!) intersection, Tensor(b!) activation, Tensor(c!) truth, Tensor maps, Tensor thresholds, Tensor category, "
    'Tensor planes, Tensor sizes, Tensor whole, str grid="half_pixel", int height=0, int width=0, bool per_plane=False) -> ()'
)
GRIDS = ("half_pixel", "anchored")
LONGEST, MOST_PIXELS = 1 << 20, 1 << 31
"""Rows, columns and pixels that a label grid may have; on a longer one a rounded weight might carry a value beyond both of its ends."""
_BLOCK = 1 << 23  # pixels of all units that the reference interpolates at a time


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
) -> None:
    """Adds the counts of a batch of images, in place.

    A map is brought to the image's label grid, and the unit is active where the result exceeds the unit's threshold. Then, for every unit
    and label, the pixels that are active and carry the label are counted. Labels are numbered 0 … L − 1, and 0 means unlabelled.

    Args:
        intersection: int64 (U, L): active pixels that carry the label.
        activation: int64 (U, C + 1): active pixels in images that hold some label of category c; the last column counts every image.
        truth: int64 (L,): pixels that carry the label.
        maps: (N, U, h, w), any floating point type; widened or rounded to float32.
        thresholds: (U,), rounded to float32. A unit with the threshold nan is never active.
        category: int64 (L,), the category of each label, 0 … C − 1, or negative for a label that belongs to none.
        planes: int32 (sum of planes · rows · columns,): the label planes of all images, one after the other, row by row.
        sizes: int64 (N, 4) on the CPU: number of planes, rows, columns, number of whole-image labels, of each image.
        whole: int64 (sum of whole-image labels,): labels that cover the whole grid of an image, one image after the other.
        grid: where the points of a map lie on the label grid. "half_pixel": as ``interpolate(mode="bilinear", align_corners=False)``:
            pixel i is at (i + ½) · h / rows − ½. "anchored": as in the original Network Dissection for a network input of ``height`` ×
            ``width``: with s = height // h and r = round(width / columns), point j is at pixel (s // 2) // r + j · (s // r). Beyond the
            outermost points their values go on.
        height, width: of the network's input; for "anchored" only.
        per_plane: a label that several planes (or whole-image entries) give to one pixel counts once for each of them, in truth and
            intersection, as in the original. Otherwise it counts once.

    Raises:
        ValueError: something does not fit together, a label is out of range, or ``anchored`` meets a map finer than the label grid. The
            counts are as before then.

    Numerics: weights are the exact fractions rounded to float32; rows first, then columns, each as a + w·(b − a) with every operation
    rounded to float32; active means strictly greater. So a plateau keeps its value, and no pixel exceeds the largest value of its map. Only
    where b − a overflows, beyond 1.7e38, is that not so; then, and with inf and nan, the same formula says what happens: nan is not active.
    Counts are integers, so neither the order of images nor the number of threads matters. Calls that share counts must take turns.

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
    arguments = (intersection, activation, truth, maps, thresholds, category, planes, sizes, whole, grid, height, width, per_plane)
    try:
        torch.ops.torchprobe.overlap_tally_(*arguments)
    except (RuntimeError, TypeError, AttributeError):
        check(*arguments)  # the same refusal in words, if a bad argument was the cause
        check_values(*arguments)
        raise


def check(
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
) -> None:
    """Raises ``ValueError`` that names which shapes and types do not fit; reads no values."""
    if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.dtype != torch.float32:
        got = f"{maps.dtype} of shape {tuple(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps must be floating point of shape (images, units, h, w), got {got}")
    images, units, h, w = maps.shape
    if h == 0 or w == 0:
        raise ValueError(f"maps of shape {tuple(maps.shape)} have no positions")
    labels = truth.shape[0] if truth.dim() == 1 else -1
    columns = activation.shape[-1]
    for name, tensor, dtype, shape in (
        ("intersection", intersection, torch.int64, (units, labels)),
        ("activation", activation, torch.int64, (units, columns)),
        ("truth", truth, torch.int64, (labels,)),
        ("thresholds", thresholds, torch.float32, (units,)),
        ("category", category, torch.int64, (labels,)),
        ("planes", planes, torch.int32, (planes.numel(),)),
        ("sizes", sizes, torch.int64, (images, 4)),
        ("whole", whole, torch.int64, (whole.numel(),)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape} for {images} maps of {units} units and {labels} labels, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    for name, tensor in (("intersection", intersection), ("activation", activation), ("truth", truth), ("thresholds", thresholds)):
        if tensor.device != maps.device or (name != "thresholds" and not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous on {maps.device}, where the maps are; it is on {tensor.device}")
    if columns < 1:
        raise ValueError("activation needs a last column, which counts every image")
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
    if grid == "anchored" and (height < h or width < w):
        given = f"{height} × {width} is less than the {h} × {w} of the maps"
        raise ValueError(f'grid="anchored" needs height and width of the network\'s input; {given}')


def check_values(
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
) -> None:
    """Raises ``ValueError`` when sizes do not add up, a label or category does not exist, or a grid cannot be; names the image."""
    labels, categories = truth.shape[0], activation.shape[1] - 1
    if labels and int(category.amax()) >= categories:
        raise ValueError(f"category holds {int(category.amax())}, but activation has room for {categories} categories")
    given = sizes.tolist()
    for n, (count, rows, columns, wholes) in enumerate(given):
        if count < 0 or wholes < 0 or not 0 < rows <= LONGEST or not 0 < columns <= LONGEST or rows * columns > MOST_PIXELS:
            limits = f"a grid has between 1 and {LONGEST} rows and columns, and at most {MOST_PIXELS} pixels"
            raise ValueError(f"sizes[{n}] = {given[n]}: {limits}; no number is negative")
    pixels, everywhere = [k * rows * columns for k, rows, columns, _ in given], [row[3] for row in given]
    for name, tensor, parts in (("planes", planes, pixels), ("whole", whole, everywhere)):
        if sum(parts) != tensor.numel():
            raise ValueError(f"{name} has {tensor.numel()} elements, but sizes tell of {sum(parts)}")
        if tensor.numel() and (int(tensor.amin()) < 0 or int(tensor.amax()) >= labels):
            for n, part in enumerate(tensor.split(parts)):
                for bad in part[(part < 0) | (part >= labels)][:1].tolist():
                    raise ValueError(f"image {n} of the batch has label {bad}, but labels are numbered 0 to {labels - 1}")
    for rows, columns in {(rows, columns) for _, rows, columns, _ in given}:
        upsample(maps[:0, :0], rows, columns, grid, height, width)


def axis(n: int, size: int, grid: str, given: int = 0, reduction: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Where each of ``size`` pixels lies between the ``n`` points of a map: lower point, upper point (int64), weight (float32).

    ``given`` is the length of the network's input along this axis, for "anchored".
    """
    i = torch.arange(size)
    if grid == "half_pixel":
        numerator, denominator = (2 * i + 1) * n - size, 2 * size
    else:
        denominator = given // n // reduction
        if denominator == 0:
            raise ValueError(f'grid="anchored" needs a map that is coarser than the label grid: {n} points for {size} pixels of labels')
        numerator = i - given // n // 2 // reduction
    numerator = numerator.clamp(0, (n - 1) * denominator)
    low = numerator // denominator
    weight = (numerator - low * denominator).double() / denominator
    return low, (low + 1).clamp(max=n - 1), weight.float()


def upsample(maps: Tensor, rows: int, columns: int, grid: str = "half_pixel", height: int = 0, width: int = 0) -> Tensor:
    """The definition: float32 maps (…, h, w) on a label grid (…, rows, columns). Each operation is a kernel of its own: none is fused."""
    reduction = max((2 * width + columns) // (2 * columns), 1)
    low, high, weight = (t.to(maps.device) for t in axis(maps.shape[-1], columns, grid, width, reduction))
    left = maps[..., low]
    across = left + weight * (maps[..., high] - left)
    low, high, weight = (t.to(maps.device) for t in axis(maps.shape[-2], rows, grid, height, reduction))
    upper = across[..., low, :]
    return upper + weight[:, None] * (across[..., high, :] - upper)


def reference(
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
) -> None:
    """What :func:`overlap_tally_` means, in plain PyTorch on any device: image by image, active units only, intersections as a product."""
    arguments = (intersection, activation, truth, maps, thresholds, category, planes, sizes, whole, grid, height, width, per_plane)
    check(*arguments)
    check_values(*arguments)
    given = sizes.tolist()
    device = maps.device
    primary = category.to(device)
    pixels = planes.split([k * rows * columns for k, rows, columns, _ in given])
    everywhere = whole.split([row[3] for row in given])
    # A map that exceeds its threshold nowhere exceeds it nowhere between its points, unless differences overflow.
    limit = thresholds[:, None, None]
    active = ((maps > limit) | ~(maps.abs() < 2.0**126)).flatten(2).any(2)
    for n, (k, rows, columns, _) in enumerate(given):
        labels, masks = _masks(pixels[n].to(device).view(k, rows * columns), everywhere[n].to(device), per_plane)
        area = masks.sum(1).long()
        truth.index_add_(0, labels, area)
        present = primary[labels[area > 0]]
        present = torch.cat([present[present >= 0].unique(), present.new_tensor([activation.shape[1] - 1])])
        for units in active[n].nonzero().squeeze(1).split(max(1, _BLOCK // (rows * columns))):
            mask = (upsample(maps[n, units], rows, columns, grid, height, width) > limit[units]).flatten(1)
            both = (mask.to(masks.dtype) @ masks.T).long()
            intersection.index_put_((units[:, None], labels[None]), both, accumulate=True)
            activation.index_put_((units[:, None], present[None]), mask.sum(1, keepdim=True).expand(-1, len(present)), accumulate=True)


def _masks(planes: Tensor, whole: Tensor, per_plane: bool) -> tuple[Tensor, Tensor]:
    """The labels of an image, and how often each pixel carries each of them: planes (k, pixels) → (labels,), (labels, pixels)."""
    labels = torch.cat([planes.flatten().long(), whole]).unique()
    labels = labels[labels > 0]
    dtype = torch.float32 if planes.numel() < 1 << 24 else torch.float64  # sums of a product must be exact
    masks = torch.zeros(len(labels), planes.shape[1], dtype=dtype, device=planes.device)
    for plane in planes:
        masks += plane == labels[:, None]
    masks += (whole == labels[:, None]).sum(1, keepdim=True)
    return labels, masks if per_plane else masks.clamp(max=1)


def _fake(
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
) -> None:
    check(intersection, activation, truth, maps, thresholds, category, planes, sizes, whole, grid, height, width, per_plane)


def register(library: torch.library.Library) -> None:
    """Defines the operator with everything that is not a native kernel."""
    library.define(SCHEMA)
    library.impl("overlap_tally_", reference, "CompositeExplicitAutograd")
    library.impl("overlap_tally_", torch.library.fallthrough_kernel, "Autograd")  # nothing here is differentiable
    torch.library.register_fake("torchprobe::overlap_tally_", _fake, lib=library)
