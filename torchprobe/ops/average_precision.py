"""``torchprobe::average_precision``: how well each unit ranks the images of each concept.

Schema::

    average_precision(Tensor scores, Tensor crow, Tensor col, int concepts, Tensor? eligible=None, Tensor? group=None, bool both=False)
        -> Tensor

The native kernel is in ``csrc/cpu/average_precision.cpp``. This file has the schema, the fake kernel and the reference in PyTorch, which
runs on every device without a native kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchprobe.ops.float_mode import every_number
from torchprobe.ops.library import define, takes
from torchprobe.ops.memory import check_memory

SCHEMA = (
    "average_precision(Tensor scores, Tensor crow, Tensor col, int concepts, Tensor? eligible=None, Tensor? group=None, bool both=False) "
    "-> Tensor"
)
MOST_CONCEPTS, MOST_UNITS, MOST_GROUPS, MOST_RESULTS = 1 << 22, 1 << 26, 1 << 20, 1 << 26
"""The limits of one call of the operator. :func:`average_precision` divides the units among as many calls as the results need."""
_BLOCK = 1 << 22  # entries of the label matrix, for all units that the reference processes at a time


class Arguments(NamedTuple):
    """The arguments of :func:`average_precision`, which explains them, in the order of the schema."""

    scores: Tensor
    crow: Tensor
    col: Tensor
    concepts: int
    eligible: Tensor | None = None
    group: Tensor | None = None
    both: bool = False


def average_precision(
    scores: Tensor,
    crow: Tensor,
    col: Tensor,
    concepts: int,
    eligible: Tensor | None = None,
    group: Tensor | None = None,
    both: bool = False,
) -> Tensor:
    """AP = Σ (R_n − R_{n−1}) P_n over the distinct scores of a unit, in descending order: images of equal score enter together.

    Precision P and recall R are those of ``sklearn.metrics.average_precision_score``. All units and concepts are computed at once, and each
    unit is sorted once.

    Args:
        scores: (units, images), float64 or float32 (smaller types are converted to float32); no nan.
        crow, col: int64 or int32, the indices of a CSR matrix (images, concepts). The concepts of image i are ``col[crow[i]:crow[i + 1]]``,
            each at most once.
        concepts: the number of concepts, at most 2²². The operator gives at most 2²⁶ results at a time, and takes at most 2²⁶ units and
            2²⁰ groups; this function calls it several times if need be.
        eligible, group: bool (images, groups) and int64 (concepts,). For concept c only the images i with ``eligible[i, group[c]]`` count.
            The others are left out even if they show the concept. Default: all images.
        both: also compute AP of ``−scores``, from the same sort.

    Returns:
        float64 (units, concepts), or (2, units, concepts) with ``both``; nan for a concept that no image shows.

    Raises:
        ValueError: a nan, or arguments that do not fit together or reach beyond their storage; the message says which.

    >>> import torch
    >>> from torchprobe.ops import average_precision
    >>> crow, col = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0])  # images 0 and 2 show concept 0; no image shows concept 1
    >>> average_precision(torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]), crow, col, 2)
    tensor([[0.8333,    nan],
            [0.6667,    nan]], dtype=torch.float64)
    """
    if isinstance(scores, Tensor) and scores.dtype in (torch.float16, torch.bfloat16):
        with every_number():
            scores = scores.float()
    a = Arguments(scores, crow, col, concepts, eligible, group, both)
    if isinstance(scores, Tensor) and scores.dim() == 2 and scores.shape[0] and isinstance(concepts, int) and 0 < concepts <= MOST_CONCEPTS:
        step = MOST_RESULTS // (2 * concepts)
        if step < scores.shape[0] <= MOST_UNITS:
            return torch.cat([_call(a._replace(scores=part)) for part in scores.split(step)], 1 if both else 0)
    return _call(a)


def _call(a: Arguments) -> Tensor:
    try:
        result: Tensor = torch.ops.torchprobe.average_precision(*a)
    except (RuntimeError, TypeError, AttributeError):
        check(a)  # a clear message, if an argument was the cause
        check_memory({}, memory_of(a), copied=True)
        check_values(a)
        raise
    return result


def memory_of(a: Arguments) -> dict[str, Tensor | None]:
    """The tensors among the arguments, by name."""
    return {name: value for name, value in a._asdict().items() if isinstance(value, Tensor)}


def check(a: Arguments) -> None:
    """Raises ``ValueError`` that names the shapes and types that do not fit. Reads no values."""
    if not isinstance(a.scores, Tensor) or a.scores.dim() != 2 or a.scores.dtype not in (torch.float32, torch.float64):
        got = f"{a.scores.dtype} of shape {tuple(a.scores.shape)}" if isinstance(a.scores, Tensor) else type(a.scores).__name__
        raise ValueError(f"scores must be floating point of shape (units, images), got {got}")
    images, crow, col = a.scores.shape[1], a.crow, a.col
    if crow.dtype not in (torch.int64, torch.int32) or col.dtype != crow.dtype or col.dim() != 1 or tuple(crow.shape) != (images + 1,):
        raise ValueError(
            f"labels must be crow of shape ({images + 1},) for {images} images, and col, both int64 or both int32; got {crow.dtype} "
            f"{tuple(crow.shape)} and {col.dtype} {tuple(col.shape)}"
        )
    units = a.scores.shape[0]
    if not 0 <= a.concepts <= MOST_CONCEPTS:
        raise ValueError(f"the number of concepts cannot be {a.concepts}; it is from 0 to {MOST_CONCEPTS}")
    if images >= 1 << 31:
        raise ValueError(f"scores has {images} images, more than 2**31")
    if units > MOST_UNITS or (1 + a.both) * units * a.concepts > MOST_RESULTS:
        raise ValueError(
            f"scores of {units} units for {a.concepts} concepts give more than {MOST_RESULTS} results: pass fewer units at a time"
        )
    if (a.eligible is None) != (a.group is None):
        raise ValueError("eligible and group must be given together")
    if a.eligible is not None and a.group is not None:
        if a.eligible.dtype != torch.bool or a.eligible.dim() != 2 or a.eligible.shape[0] != images:
            got = f"{a.eligible.dtype} of shape {tuple(a.eligible.shape)}"
            raise ValueError(f"eligible must be bool of shape ({images}, groups), got {got}")
        if a.eligible.shape[1] > MOST_GROUPS:
            raise ValueError(f"eligible has {a.eligible.shape[1]} groups, more than {MOST_GROUPS}")
        if a.group.dtype != torch.int64 or tuple(a.group.shape) != (a.concepts,):
            raise ValueError(f"group must be int64 of shape ({a.concepts},), got {a.group.dtype} of shape {tuple(a.group.shape)}")


def check_values(a: Arguments) -> None:
    """Raises ``ValueError`` for nan, decreasing rows, concepts that do not exist or are repeated; names the unit or image."""
    scores, crow, col, concepts, eligible, group, _ = a
    if (invalid := scores.isnan().any(1).nonzero()).numel():
        unit = int(invalid[0])
        image = int(scores[unit].isnan().nonzero()[0])
        raise ValueError(f"the score of unit {unit} for image {image} is nan: leave that unit or image out")
    lengths = crow.diff()
    if int(crow[0]) != 0 or int(crow[-1]) != col.shape[0] or bool((lengths < 0).any()):
        raise ValueError(f"crow must rise from 0 to {col.shape[0]}, the length of col")
    image_of = torch.arange(len(lengths), device=col.device).repeat_interleave(lengths)
    for wrong in ((col < 0) | (col >= concepts)).nonzero()[:1, 0].tolist():
        raise ValueError(f"image {int(image_of[wrong])} shows concept {int(col[wrong])}, but there are {concepts}")
    ordered = (image_of * concepts + col).sort().values
    for repeated in (ordered[1:] == ordered[:-1]).nonzero()[:1, 0].tolist():
        raise ValueError(f"image {int(ordered[repeated]) // concepts} shows concept {int(ordered[repeated]) % concepts} twice")
    if eligible is not None and group is not None and group.numel() and not 0 <= int(group.amin()) <= int(group.amax()) < eligible.shape[1]:
        raise ValueError(f"group must number the {eligible.shape[1]} columns of eligible, got {int(group.amin())} … {int(group.amax())}")


@takes(Arguments)
@every_number()
def reference(a: Arguments) -> Tensor:
    """The meaning of :func:`average_precision`, in PyTorch on any device, several units at a time.

    For each positive image, n is the number of eligible images whose score is not lower, and tp the number of positives among them. AP is
    the mean of tp / n over the positives.
    """
    check(a)
    check_memory({}, memory_of(a), copied=True)
    check_values(a)
    device, (units, images) = a.scores.device, a.scores.shape
    col = a.col.to(device).long()
    image = torch.arange(images, device=device).repeat_interleave(a.crow.to(device).diff())
    if a.eligible is None or a.group is None:
        eligible, group = torch.ones(images, 1, dtype=torch.bool, device=device), torch.zeros(a.concepts, dtype=torch.int64, device=device)
    else:
        eligible, group = a.eligible.to(device), a.group.to(device)
    kept = eligible[image, group[col]]
    col, order = col[kept].sort()  # concept by concept
    image, group = image[kept][order], group[col]
    positives = torch.bincount(col, minlength=a.concepts)
    before = positives.cumsum(0)[col] - positives[col]
    step = max(1, _BLOCK // max(1, len(col), eligible.numel()))
    results = []
    for sign in (1, -1) if a.both else (1,):
        for part in (-sign * a.scores).contiguous().split(step):
            ascending, best_first = part.sort(1)
            last = torch.searchsorted(ascending, part[:, image], right=True)  # images whose score is not lower
            key = (col * (images + 1) + last).sort(1).values  # within each concept, best first
            tp = torch.searchsorted(key, key, right=True) - before
            n = eligible[best_first].cumsum(1)[torch.arange(len(part), device=device)[:, None], key - col * (images + 1) - 1, group]
            sums = torch.zeros(len(part), a.concepts, dtype=torch.float64, device=device).index_add_(1, col, tp / n.double())
            results.append(sums / positives)  # nan for a concept without positives
    result = torch.cat([a.scores.new_empty(0, a.concepts, dtype=torch.float64), *results])
    return result.view(2, units, a.concepts) if a.both else result


@takes(Arguments)
def _fake(a: Arguments) -> Tensor:
    check(a)
    shape = (a.scores.shape[0], a.concepts)
    return a.scores.new_empty((2, *shape) if a.both else shape, dtype=torch.float64)


def register(library: torch.library.Library) -> None:
    """Defines the operator, except for native kernels."""
    define(library, SCHEMA, reference, _fake)
