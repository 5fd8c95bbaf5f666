"""The accuracy of a head on embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.analysis.decisions import predict, rows_of, settle
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.inputs import HeadLike, normalizes, weight_and_bias
from torchprobe.common.deprecation import RenamedAttribute, renamed

__all__ = ["Evaluation", "evaluate", "is_correct", "predict", "settle"]

__getattr__ = renamed(__name__, {"right": "is_correct"})

_TOP = 5
_BLOCK = 1 << 13  # rows at a time


@dataclass(repr=False)
class Evaluation:
    """The accuracy of a head on some embeddings.

    Attributes:
        accuracy: share of the evaluated images whose class has the largest logit.
        top5: share of the images whose class is among the five largest logits, or among all if there are fewer than five.
        n: number of images evaluated.
        correct: whether the decision on each of them is correct, bool (n,).
        predicted: the row of the head with the largest logit, int64 (n,); −1 if the representation has nan or inf.
        rows: the rows of the embeddings that were evaluated, int64 (n,).
        classes: the rows of the head to choose from, in ascending order.
        per_class: accuracy on the images of each of ``classes``, float64 (len(classes),); nan for a class without images.
        images: number of images of each of ``classes``, int64 (len(classes),).
        unlabeled: number of rows left out because their label is unknown.
        outside: number of rows left out because their class is not among ``classes``.
        nonfinite: number of evaluated rows with nan or inf, which count as wrong.
    """

    accuracy: float
    top5: float
    n: int
    correct: Tensor
    predicted: Tensor
    rows: Tensor
    classes: tuple[int, ...]
    per_class: Tensor
    images: Tensor
    unlabeled: int = 0
    outside: int = 0
    nonfinite: int = 0

    unlabelled = RenamedAttribute("unlabeled")

    def __repr__(self) -> str:
        left_out = [f"{getattr(self, name)} {name}" for name in ("unlabeled", "outside", "nonfinite") if getattr(self, name)]
        parts = [f"accuracy={self.accuracy:.4f}", f"top5={self.top5:.4f}", f"n={self.n}", f"{len(self.classes)} classes", *left_out]
        return f"Evaluation({', '.join(parts)})"


def evaluate(head: HeadLike, embeddings: Embeddings, classes: Iterable[int] | None = None) -> Evaluation:
    """The accuracy of ``head`` on ``embeddings``.

    Decisions are those of the exact logits (see :func:`predict`), so the result depends neither on threads nor on the size of blocks. The
    lowest row wins a tie. If several rows stand for one class (``embeddings.groups``, as in ObjectNet), each of them is correct.
    Memory-mapped representations are read block by block.

    Args:
        head: an ``nn.Linear``, a :class:`torchprobe.encoders.Head`, or a weight (classes, features).
        embeddings: from :func:`embed`.
        classes: the rows of the head to choose from; default: ``embeddings.classes``, or all. Images of other classes are left out and
            counted. So the images of ImageNet can be evaluated on the classes of ImageNet-R.

    Raises:
        ValueError: the head has another width, a label or class is not a row of it, or no image is left to evaluate.

    >>> embeddings = Embeddings(torch.eye(3), torch.tensor([0, 1, 0]), ["a", "b", "c"])
    >>> evaluate(torch.eye(3), embeddings)
    Evaluation(accuracy=0.6667, top5=1.0000, n=3, 3 classes)
    """
    weight, bias = weight_and_bias(head, embeddings.features)
    chosen = rows_of(embeddings.classes if classes is None else classes, len(weight))
    y, groups = embeddings.y.cpu(), embeddings.groups
    _check_labels(embeddings, len(weight))
    among = torch.ones(len(weight), dtype=torch.bool)
    if chosen is not None:
        among = torch.zeros(len(weight), dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)
        for rows in (groups or {}).values():
            among[list(rows)] = among[list(rows)].any()
    known = y >= 0
    used = known.clone()
    used[known] = among[y[known]]
    index = used.nonzero().flatten()
    if not len(index):
        raise ValueError(
            f"nothing to evaluate: of {len(y)} rows {int((~known).sum())} have no label, and the class of {int((known & ~used).sum())} is "
            "not among the classes to choose from"
        )
    picked = tuple(range(len(weight)) if chosen is None else chosen)
    top = min(_TOP, len(picked))
    best = torch.cat(
        [
            predict(weight, bias, embeddings.h[part.to(embeddings.h.device)], chosen, normalizes(head), top).reshape(-1, top).cpu()
            for part in index.split(_BLOCK)
        ]
    )
    labels = y[index]
    hits = is_correct(best, labels[:, None], groups)
    correct = hits[:, 0]
    per_label = torch.bincount(labels, minlength=len(weight))[list(picked)]
    correct_per_label = torch.bincount(labels[correct], minlength=len(weight))[list(picked)]
    return Evaluation(
        accuracy=int(correct.sum()) / len(index),
        top5=int(hits.any(-1).sum()) / len(index),
        n=len(index),
        correct=correct,
        predicted=best[:, 0],
        rows=index,
        classes=picked,
        per_class=(correct_per_label.double() / per_label).where(per_label > 0, math.nan),
        images=per_label,
        unlabeled=int((~known).sum()),
        outside=int((known & ~used).sum()),
        nonfinite=int((best[:, 0] < 0).sum()),
    )


def is_correct(predicted: Tensor, y: Tensor, groups: Mapping[int, tuple[int, ...]] | None = None) -> Tensor:
    """Whether predicted rows of the head are those of the labels, or stand for the same class: bool, of the broadcast shape.

    Args:
        predicted: int64, rows of the head; −1 is never correct.
        y: int64, labels.
        groups: rows that stand for one class, by label, as of :class:`Embeddings`.

    >>> is_correct(torch.tensor([409, 530, 3]), torch.tensor([409, 409, 409]), {409: (409, 530)})
    tensor([ True,  True, False])
    """
    if groups:
        highest = max(int(tensor.max()) if tensor.numel() else 0 for tensor in (predicted, y))
        label_of = torch.arange(1 + max(highest, *(max(rows) for rows in groups.values())), device=predicted.device)
        for label, rows in groups.items():
            label_of[list(rows)] = label
        predicted, y = (label_of[tensor.clamp_min(0)].where(tensor >= 0, -1) for tensor in (predicted, y))
    return (predicted == y) & (predicted >= 0)


def _check_labels(embeddings: Embeddings, classes: int) -> None:
    if len(embeddings) and (last := int(embeddings.y.max())) >= classes:
        name = embeddings.ids[int(embeddings.y.argmax())]
        raise ValueError(f"label {last} (of {name!r}) is not a row of the head, which has {classes} rows (0 to {classes - 1})")
    for label, rows in (embeddings.groups or {}).items():
        if max(rows) >= classes:
            raise ValueError(f"class {label} stands for row {max(rows)}, but the head has only {classes} rows")
