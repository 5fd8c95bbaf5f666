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
from torch.nn.utils.rnn import pad_sequence

SCHEMA = (
    "overlap_tally_(Tensor(a!) intersection, Tensor(b!) activation, Tensor(c!) truth, Tensor maps, Tensor thresholds, Tensor category, "
    'Tensor planes, Tensor sizes, Tensor whole, str grid="half_pixel", int height=0, int width=0, bool per_plane=False) -> ()'
)
GRIDS = ("half_pixel", "anchored")
LONGEST, MOST_PIXELS = 1 << 20, 1 << 31
"""Rows, columns and pixels that a label grid may have; on a longer one a rounded weight might carry a value beyond both of its ends."""
_BLOCK = 1 << 23, 1 << 26  # pixels of all units that the reference interpolates at a time: on the CPU, elsewhere


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
    """What :func:`overlap_tally_` means, in plain PyTorch on any device: images of one grid together, active units only, intersections as a
    product of masks. A few dozen operations and a handful of synchronisations for a whole batch, since elsewhere each has its price."""
    arguments = (intersection, activation, truth, maps, thresholds, category, planes, sizes, whole, grid, height, width, per_plane)
    check(*arguments)
    check_values(*arguments)
    given = sizes.tolist()
    flat = planes.split([k * rows * columns for k, rows, columns, _ in given])
    everywhere = whole.split([row[3] for row in given])
    # A map that exceeds its threshold nowhere exceeds it nowhere between its points, unless differences overflow.
    active = ((maps > thresholds[:, None, None]) | ~(maps.abs() < 2.0**126)).flatten(2).any(2)
    block = _BLOCK[maps.device.type != "cpu"]
    for rows, columns in dict.fromkeys((rows, columns) for _, rows, columns, _ in given):
        images = [n for n, row in enumerate(given) if row[1:3] == [rows, columns]]
        pixels = rows * columns
        # (images, planes, pixels), 0 where there are fewer
        stacked = pad_sequence([flat[n].view(-1, pixels) for n in images], True).to(maps.device)
        whole_of = pad_sequence([everywhere[n] for n in images], True).to(maps.device)
        shown = torch.zeros(len(images), len(truth), dtype=torch.bool, device=maps.device)
        shown.scatter_(1, stacked.flatten(1).long(), True).scatter_(1, whole_of, True)[:, :1] = False
        labels, units = _first(shown), _first(active[images])
        step = max(1, block // (pixels * max(labels.shape[1], units.shape[1])))
        for at in range(0, len(images), step):
            part = slice(at, at + step)
            masks = _masks(stacked[part], whole_of[part], labels[part], per_plane)
            area = masks.sum(2).long()
            truth.index_add_(0, labels[part].flatten(), area.flatten())
            present = _present(category.to(maps.device)[labels[part]], area, activation.shape[1])
            for few in units[part].split(max(1, block // (pixels * step)), 1):
                image = torch.tensor(images[part], device=maps.device)[:, None]
                mask = upsample(maps[image, few], rows, columns, grid, height, width) > thresholds[few][..., None, None]
                mask = (mask & active[image, few][..., None, None]).flatten(2)
                both = (mask.to(masks.dtype) @ masks.mT).long()
                intersection.index_put_((few[:, :, None], labels[part][:, None]), both, accumulate=True)
                activation.index_add_(0, few.flatten(), (mask.sum(2)[..., None] * present[:, None]).flatten(0, 1))


def _first(chosen: Tensor) -> Tensor:
    """Of each row the places that are chosen, ascending, and others behind, as many as the row with most: bool (n, m) → int64 (n, most)."""
    most = int(chosen.sum(1).amax()) if chosen.numel() else 0
    return chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def _masks(planes: Tensor, whole: Tensor, labels: Tensor, per_plane: bool) -> Tensor:
    """How often each pixel carries each label: planes (n, k, pixels), whole (n, m), labels (n, l) → (n, l, pixels)."""
    dtype = torch.float32 if planes.shape[1:].numel() < 1 << 24 else torch.float64  # sums of a product must be exact
    often = (whole[:, None] == labels[:, :, None]).sum(2, keepdim=True).to(dtype).expand(-1, -1, planes.shape[2]).contiguous()
    for plane in planes.unbind(1):
        often += plane[:, None] == labels[:, :, None]
    often *= labels[:, :, None] > 0  # where an image has fewer labels, 0 may stand behind them
    return often if per_plane else often.clamp(max=1)


def _present(category: Tensor, area: Tensor, columns: int) -> Tensor:
    """In which columns of ``activation`` each image counts: categories (n, l) of its labels, their areas → int64 (n, columns)."""
    present = torch.zeros(len(category), columns + 1, dtype=torch.int64, device=category.device)
    present.scatter_(1, category.where((category >= 0) & (area > 0), columns), 1)
    present[:, columns - 1] = 1  # the last counts every image
    return present[:, :columns]


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
