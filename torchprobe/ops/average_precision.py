"""``torchprobe::average_precision``: how well each unit ranks the images of each concept.

Schema::

    average_precision(Tensor scores, Tensor crow, Tensor col, int concepts, Tensor? eligible=None, Tensor? group=None, bool both=False)
        -> Tensor

The native kernel lives in ``csrc/cpu/average_precision.cpp``. Here are the schema, the fake kernel, and the reference in plain PyTorch,
which is also what runs on every device that has no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = (
    "average_precision(Tensor scores, Tensor crow, Tensor col, int concepts, Tensor? eligible=None, Tensor? group=None, bool both=False) "
    "-> Tensor"
)
_BLOCK = 1 << 22  # entries of the label matrix, for all units that the reference takes at a time


def average_precision(
    scores: Tensor,
    crow: Tensor,
    col: Tensor,
    concepts: int,
    eligible: Tensor | None = None,
    group: Tensor | None = None,
    both: bool = False,
) -> Tensor:
    """AP = Σ (R_n − R_{n−1}) P_n over the distinct scores of a unit, falling: images of equal score enter together.

    Precision P and recall R as in ``sklearn.metrics.average_precision_score``, for every unit and concept at once: a unit is sorted once.

    Args:
        scores: (units, images), float64 or float32 (anything narrower is widened); no nan.
        crow, col: int64 or int32, the concepts of image i are ``col[crow[i]:crow[i + 1]]``, each at most once; the indices of a CSR matrix
            (images, concepts).
        concepts: how many there are.
        eligible, group: bool (images, groups) and int64 (concepts,): for concept c only images i with ``eligible[i, group[c]]`` exist.
            Others are left out, even if they show the concept. Default: all images.
        both: also the opposite direction, AP of ``−scores``, from the same sort.

    Returns:
        float64 (units, concepts), or (2, units, concepts) with ``both``; nan for a concept that no image shows.

    Raises:
        ValueError: a nan, or arguments that do not fit together; the message says which.

    >>> import torch
    >>> from torchprobe.ops import average_precision
    >>> crow, col = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0])  # images 0 and 2 show concept 0; no image shows concept 1
    >>> average_precision(torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]), crow, col, 2)
    tensor([[0.8333,    nan],
            [0.6667,    nan]], dtype=torch.float64)
    """
    if isinstance(scores, Tensor) and scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    arguments = (scores, crow, col, concepts, eligible, group, both)
    try:
        result: Tensor = torch.ops.torchprobe.average_precision(*arguments)
    except (RuntimeError, TypeError, AttributeError):
        check(*arguments)  # the same refusal in words, if a bad argument was the cause
        check_values(scores, crow, col, concepts, eligible, group)
        raise
    return result


def check(
    scores: Tensor,
    crow: Tensor,
    col: Tensor,
    concepts: int,
    eligible: Tensor | None = None,
    group: Tensor | None = None,
    both: bool = False,
) -> None:
    """Raises ``ValueError`` that names which shapes and types do not fit; reads no values."""
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.dtype not in (torch.float32, torch.float64):
        got = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores must be floating point of shape (units, images), got {got}")
    images = scores.shape[1]
    if crow.dtype not in (torch.int64, torch.int32) or col.dtype != crow.dtype or col.dim() != 1 or tuple(crow.shape) != (images + 1,):
        raise ValueError(
            f"labels must be crow of shape ({images + 1},) for {images} images, and col, both int64 or both int32; got {crow.dtype} "
            f"{tuple(crow.shape)} and {col.dtype} {tuple(col.shape)}"
        )
    if concepts < 0:
        raise ValueError(f"the number of concepts cannot be {concepts}")
    if (eligible is None) != (group is None):
        raise ValueError("eligible and group come together")
    if eligible is not None and group is not None:
        if eligible.dtype != torch.bool or eligible.dim() != 2 or eligible.shape[0] != images:
            raise ValueError(f"eligible must be bool of shape ({images}, groups), got {eligible.dtype} of shape {tuple(eligible.shape)}")
        if group.dtype != torch.int64 or tuple(group.shape) != (concepts,):
            raise ValueError(f"group must be int64 of shape ({concepts},), got {group.dtype} of shape {tuple(group.shape)}")


def check_values(scores: Tensor, crow: Tensor, col: Tensor, concepts: int, eligible: Tensor | None, group: Tensor | None) -> None:
    """Raises ``ValueError`` for nan, rows that fall, concepts that do not exist or come twice; names the unit or image."""
    if (invalid := scores.isnan().any(1).nonzero()).numel():
        unit = int(invalid[0])
        image = int(scores[unit].isnan().nonzero()[0])
        raise ValueError(f"the score of unit {unit} for image {image} is nan: leave that unit or image out")
    rows = crow.diff()
    if int(crow[0]) != 0 or int(crow[-1]) != col.shape[0] or bool((rows < 0).any()):
        raise ValueError(f"crow must rise from 0 to {col.shape[0]}, the length of col")
    image_of = torch.arange(len(rows), device=col.device).repeat_interleave(rows)
    for wrong in ((col < 0) | (col >= concepts)).nonzero()[:1, 0].tolist():
        raise ValueError(f"image {int(image_of[wrong])} shows concept {int(col[wrong])}, but there are {concepts}")
    ordered = (image_of * concepts + col).sort().values
    for twice in (ordered[1:] == ordered[:-1]).nonzero()[:1, 0].tolist():
        raise ValueError(f"image {int(ordered[twice]) // concepts} shows concept {int(ordered[twice]) % concepts} twice")
    if eligible is not None and group is not None and group.numel() and not 0 <= int(group.amin()) <= int(group.amax()) < eligible.shape[1]:
        raise ValueError(f"group must number the {eligible.shape[1]} columns of eligible, got {int(group.amin())} … {int(group.amax())}")


def reference(
    scores: Tensor,
    crow: Tensor,
    col: Tensor,
    concepts: int,
    eligible: Tensor | None = None,
    group: Tensor | None = None,
    both: bool = False,
) -> Tensor:
    """What :func:`average_precision` means, in plain PyTorch on any device: with tp and n the images of the concept, and of all that count,
    whose score is not below that of a positive, AP is the mean of tp / n over the positives. Several units at a time."""
    check(scores, crow, col, concepts, eligible, group, both)
    check_values(scores, crow, col, concepts, eligible, group)
    device, (units, images) = scores.device, scores.shape
    col = col.to(device).long()
    image = torch.arange(images, device=device).repeat_interleave(crow.to(device).diff())
    if eligible is None or group is None:
        counts, group = torch.ones(images, 1, dtype=torch.bool, device=device), torch.zeros(concepts, dtype=torch.int64, device=device)
    else:
        counts, group = eligible.to(device), group.to(device)
    kept = counts[image, group[col]]
    col, order = col[kept].sort()  # concept by concept
    image, group = image[kept][order], group[col]
    positives = torch.bincount(col, minlength=concepts)
    before = positives.cumsum(0)[col] - positives[col]
    step = max(1, _BLOCK // max(1, len(col), counts.numel()))
    signs = (1, -1) if both else (1,)
    results = []
    for sign in signs:
        for part in (-sign * scores).contiguous().split(step):
            falling, best = part.sort(1)
            last = torch.searchsorted(falling, part[:, image], right=True)  # images that score no less
            key = (col * (images + 1) + last).sort(1).values  # within each concept, best first
            tp = torch.searchsorted(key, key, right=True) - before
            n = counts[best].cumsum(1)[torch.arange(len(part), device=device)[:, None], key - col * (images + 1) - 1, group]
            sums = torch.zeros(len(part), concepts, dtype=torch.float64, device=device).index_add_(1, col, tp / n.double())
            results.append(sums / positives)  # nan where there is none
    result = torch.cat([scores.new_empty(0, concepts, dtype=torch.float64), *results])
    return result.view(2, units, concepts) if both else result


def _fake(
    scores: Tensor,
    crow: Tensor,
    col: Tensor,
    concepts: int,
    eligible: Tensor | None = None,
    group: Tensor | None = None,
    both: bool = False,
) -> Tensor:
    check(scores, crow, col, concepts, eligible, group, both)
    shape = (scores.shape[0], concepts)
    return scores.new_empty((2, *shape) if both else shape, dtype=torch.float64)


def register(library: torch.library.Library) -> None:
    """Defines the operator with everything that is not a native kernel."""
    library.define(SCHEMA)
    library.impl("average_precision", reference, "CompositeExplicitAutograd")
    library.impl("average_precision", torch.library.fallthrough_kernel, "Autograd")  # nothing here is differentiable
    torch.library.register_fake("torchprobe::average_precision", _fake, lib=library)
