"""What happens to a feature, and to the decisions of a head, when one entry of one parameter is changed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchprobe.analysis.decisions import predict
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.inputs import HeadLike, blocks, normalizes, weight_and_bias
from torchprobe.analysis.kurtosis import vector_kurtosis
from torchprobe.analysis.outliers import outlier_features
from torchprobe.analysis.provenance.parameters import Entry
from torchprobe.analysis.provenance.results import ChangeRow

HOW = ("median", "zero")


class Changes:
    """Compares representations with those before any change.

    Args:
        before: the representations of the unchanged encoder.
        head: on top of them, or None.
    """

    def __init__(self, before: Embeddings, head: HeadLike | None) -> None:
        self.before, self.head = before, head
        self._rows = {row["feature"]: row for row in outlier_features(before).rows()}
        self._kurtosis = float(vector_kurtosis(before.h).nanmean())
        self._decisions, self._accuracy = self._decided(before)

    def row(self, feature: int, entry: Entry, how: str, after: Embeddings) -> ChangeRow:
        """One change, from the representations after it."""
        row = next(row for row in outlier_features(after).rows() if row["feature"] == feature)
        decisions, accuracy = self._decided(after)
        agreement = math.nan
        if decisions is not None and self._decisions is not None and len(decisions):
            agreement = float((decisions == self._decisions).double().mean())
        return ChangeRow(
            feature=feature,
            parameter=entry.peers.parameter,
            index=entry.index,
            how=how,
            relative_size_before=self._rows[feature]["relative_size"],
            relative_size=row["relative_size"],
            outlier_share_before=self._rows[feature]["outlier_share"],
            outlier_share=row["outlier_share"],
            feature_kurtosis_before=_kurtosis(self.before.h[:, feature]),
            feature_kurtosis=_kurtosis(after.h[:, feature]),
            vector_kurtosis_before=self._kurtosis,
            vector_kurtosis=float(vector_kurtosis(after.h).nanmean()),
            cosine=_cosine(self.before.h, after.h),
            agreement=agreement,
            accuracy_before=self._accuracy,
            accuracy=accuracy,
        )

    def _decided(self, embeddings: Embeddings) -> tuple[Tensor | None, float]:
        if self.head is None:
            return None, math.nan
        weight, bias = weight_and_bias(self.head, embeddings.features)
        decisions = predict(weight, bias, embeddings.h, embeddings.classes, normalizes(self.head), 1).flatten().cpu()
        labeled = bool((embeddings.y >= 0).any())
        return decisions, evaluate(self.head, embeddings).accuracy if labeled else math.nan


@contextlib.contextmanager
def changed(model: nn.Module, entry: Entry, how: str) -> Iterator[None]:
    """While the block lasts, one entry of a parameter has another value."""
    parameter = model.get_parameter(entry.peers.parameter)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(entry.peers.replaced(before, entry.index, how))
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def measure_changes(
    model: nn.Module, wanted: list[tuple[int, Entry]], represent: Callable[[], Embeddings], head: HeadLike | None
) -> list[ChangeRow]:
    """Changes each entry in turn, in both ways, and runs ``represent`` each time. The parameters are as before afterwards."""
    if not wanted:
        return []
    changes, rows = Changes(represent(), head), []
    for feature, entry in wanted:
        for how in HOW:
            with changed(model, entry, how):
                rows.append(changes.row(feature, entry, how, represent()))
    return rows


def _kurtosis(values: Tensor) -> float:
    """Pearson's, over images; nan for a constant feature."""
    return float(vector_kurtosis(values[None]).nanmean()) if len(values) > 1 else math.nan


def _cosine(a: Tensor, b: Tensor) -> float:
    parts = [functional.cosine_similarity(x, y, dim=1) for x, y in zip(blocks(a), blocks(b), strict=True)]
    return float(torch.cat(parts).nanmean())
