"""How often a head is right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprobe.analysis.decisions import predict, rows_of, settle
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.heads import HeadLike, normalizes, weight_and_bias

__all__ = ["Evaluation", "evaluate", "predict", "right", "settle"]

_TOP = 5
_BLOCK = 1 << 13  # rows in work at a time


@dataclass(repr=False)
class Evaluation:
    """How often a head is right on some embeddings.

    Attributes:
        accuracy: share of the evaluated images whose largest logit is that of their class, float.
        top5: share whose class is among the five largest; of all where there are fewer than five.
        n: images evaluated.
        correct: for each of them whether it is right, bool (n,).
        predicted: the row of the head with the largest logit, int64 (n,); −1 where the representation has nan or inf.
        rows: which rows of the embeddings were evaluated, int64 (n,).
        classes: the rows of the head to choose from, ascending.
        per_class: accuracy on the images of each of ``classes``, float64 (len(classes),); nan where there is none.
        images: how many there are of each, int64 (len(classes),).
        unlabelled: rows left out because their label is not known.
        outside: rows left out because their class is not among ``classes``.
        nonfinite: evaluated rows with nan or inf, which count as wrong.
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
    unlabelled: int = 0
    outside: int = 0
    nonfinite: int = 0

    def __repr__(self) -> str:
        beside = [f"{getattr(self, name)} {name}" for name in ("unlabelled", "outside", "nonfinite") if getattr(self, name)]
        said = [f"accuracy={self.accuracy:.4f}", f"top5={self.top5:.4f}", f"n={self.n}", f"{len(self.classes)} classes", *beside]
        return f"Evaluation({', '.join(said)})"


def evaluate(head: HeadLike, embeddings: Embeddings, classes: Iterable[int] | None = None) -> Evaluation:
    """How often ``head`` is right on ``embeddings``.

    Decisions are those of the exact logits (see :func:`predict`), so the result does not depend on threads or on how the work is cut;
    the lowest row wins a tie. Where rows stand for the same class (``embeddings.groups``, as in ObjectNet), any of them is right.
    Representations that are memory-mapped are read block by block.

    Args:
        head: an ``nn.Linear``, a :class:`torchprobe.encoders.Head`, or a weight (classes, features).
        embeddings: from :func:`embed`.
        classes: the rows of the head to choose from; default: ``embeddings.classes``, or all. Images of other classes are left out and
            counted, so the images of ImageNet may be evaluated on the classes of ImageNet-R.

    Raises:
        ValueError: a head of another width, a label or class that is no row of it, or nothing to evaluate.

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
            f"nothing to evaluate: of {len(y)} rows {int((~known).sum())} have no label and {int((known & ~used).sum())} one that is not "
            "among the classes"
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
    hits = right(best, labels[:, None], groups)
    correct = hits[:, 0]
    per_label = torch.bincount(labels, minlength=len(weight))[list(picked)]
    right_per_label = torch.bincount(labels[correct], minlength=len(weight))[list(picked)]
    return Evaluation(
        accuracy=int(correct.sum()) / len(index),
        top5=int(hits.any(-1).sum()) / len(index),
        n=len(index),
        correct=correct,
        predicted=best[:, 0],
        rows=index,
        classes=picked,
        per_class=(right_per_label.double() / per_label).where(per_label > 0, math.nan),
        images=per_label,
        unlabelled=int((~known).sum()),
        outside=int((known & ~used).sum()),
        nonfinite=int((best[:, 0] < 0).sum()),
    )


def right(predicted: Tensor, y: Tensor, groups: Mapping[int, tuple[int, ...]] | None = None) -> Tensor:
    """Whether rows of the head are those of the labels, or stand for the same class: bool, of the broadcast shape.

    Args:
        predicted: int64, rows of the head; −1 is never right.
        y: int64, labels.
        groups: see :class:`torchprobe.datasets.LabeledImages`.

    >>> right(torch.tensor([409, 530, 3]), torch.tensor([409, 409, 409]), {409: (409, 530)})
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
        raise ValueError(f"label {last} (of {name!r}) is no row of the head, which has {classes} (0 to {classes - 1})")
    for label, rows in (embeddings.groups or {}).items():
        if max(rows) >= classes:
            raise ValueError(f"class {label} stands for row {max(rows)}, which the head, with {classes} rows, does not have")
