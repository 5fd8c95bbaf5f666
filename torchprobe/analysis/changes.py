"""What changed between two recordings: distances of each layer, and which of them are beyond the noise of the windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from torchprobe.analysis.change_sides import Side
from torchprobe.analysis.layer_distance import LayerDistance, distance, moments_of
from torchprobe.analysis.window_noise import FEWEST, Array, apart, attainable, drifts
from torchprobe.common.messages import counted, listing
from torchprobe.recording import Recording
from torchprobe.recording.matching import match_layers
from torchprobe.statistics import Statistic

ALPHA = 0.05
"""The largest probability of any verdict between recordings of the same (we chose the usual value)."""

MOMENT_FIELDS = (
    *("vector_kurtosis", "vector_kurtosis_median", "vector_kurtosis_std", "kurtosis_median", "std", "rms", "mean_abs_max"),
    "outlier_features",
)
"""The numbers of :class:`~torchprobe.Moments` that are compared. Extremes say little of a window, and counts say nothing of the model."""

_COUNTS = ("vectors", "constant_vectors", "invalid_vectors", "nonfinite")
_UNBIASED = ("vector_kurtosis", "rms", "norm_mean", "rms_mean", "zero_share")  # means over vectors, or of their squares
_SAME_SIZE = 1.1  # windows whose sizes differ by a larger factor are compared in these numbers only


@dataclass(frozen=True)
class FieldChange:
    """One number of one layer in the windows of both recordings.

    ``before`` and ``after`` are means over windows; ``change`` is the difference, of logarithms for ``scale="log"``; ``noise`` its standard
    error from the spread of the windows; ``p`` is adjusted for all numbers of all layers.
    """

    field: str
    before: float
    after: float
    change: float
    noise: float
    p: float
    scale: str

    @property
    def times_noise(self) -> float:
        """abs(change) / noise; inf for a change without any spread."""
        if self.noise:
            return abs(self.change) / self.noise
        return math.inf if self.change else 0.0


@dataclass(frozen=True)
class LayerChange:
    """One layer of both recordings.

    Attributes:
        layer, other: its name in the first and in the second recording.
        features, other_features: its widths.
        verdict: "changed", "within noise", "no noise known", "other width", or "not seen" (one of them saw nothing).
        distance: of all its features; None if it cannot be said.
        fields: the numbers whose windows were compared, the surest change first.
        nonfinite, other_nonfinite: nan and inf values in each.
    """

    layer: str
    other: str
    features: int
    other_features: int
    verdict: str
    distance: LayerDistance | None
    fields: Sequence[FieldChange] = ()
    nonfinite: float = 0.0
    other_nonfinite: float = 0.0

    @property
    def surest(self) -> FieldChange | None:
        """The number whose change is surest."""
        return self.fields[0] if self.fields else None

    def row(self) -> dict[str, Any]:
        """For a table."""
        surest = self.surest
        told = {} if surest is None else {**asdict(surest), "times_noise": surest.times_noise}
        return {
            "layer": self.layer,
            "other": self.other if self.other != self.layer else "",
            "features": self.features,
            "other_features": self.other_features if self.other_features != self.features else None,
            "verdict": self.verdict,
            **told,
            **({} if self.distance is None else self.distance.row()),
            "nonfinite": self.nonfinite,
            "other_nonfinite": self.other_nonfinite,
        }


@dataclass(frozen=True)
class RecordingComparison:
    """What changed between two recordings; see :func:`compare_recordings`.

    Attributes:
        layers: in the order of the run of the first recording.
        first: the first of them that changed, in that order; None if none did, or if the noise is not known. A module counts when it
            ends, so layers inside a block come before the block.
        first_nonfinite: the first with nan or inf in only one of the recordings.
        only_before, only_after: layers of one recording only.
        noise: where the noise comes from: "windows", or "none".
        alpha: the false-alarm rate of all verdicts together.
        windows: closed windows of each.
        remarks: what a reader must know, in words.
        why: the reason why there is no noise, in words; "" if there is.
    """

    layers: list[LayerChange]
    first: str | None
    first_nonfinite: str | None
    only_before: list[str]
    only_after: list[str]
    noise: str
    alpha: float
    windows: tuple[int, int]
    remarks: list[str] = field(default_factory=list)
    why: str = ""

    @property
    def changed(self) -> list[str]:
        """The layers whose verdict is "changed"."""
        return [layer.layer for layer in self.layers if layer.verdict == "changed"]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each layer, for a table."""
        return [layer.row() for layer in self.layers]

    def answer(self) -> str:
        """The result in one or two sentences."""
        parts = []
        total = len(self.layers) + len(self.only_before)
        other = sum(layer.verdict == "other width" for layer in self.layers)
        if 2 * other > total:
            parts.append(f"{other} of {counted(total, 'layer')} {_have(other)} other widths, and {_were(other)} not compared.")
        elif 2 * len(self.only_before) > total:
            lone = len(self.only_before)
            parts.append(f"{lone} of {counted(total, 'layer')} {_have(lone)} no partner in the second, and {_were(lone)} not compared.")
        if self.first_nonfinite is not None:
            parts.append(f"The first layer with nan or inf in only one of the two is {self.first_nonfinite or '(output)'}.")
        if self.noise == "none":
            parts.append(f"No verdict: {self.why or 'the noise is not known'}.")
        elif self.first is None:
            parts.append("No layer changed beyond the noise of the windows.")
        else:
            count = f"{len(self.changed)} of {counted(len(self.layers), 'layer')} changed beyond the noise of the windows"
            parts.append(f"{count}; the first in the order of the run is {self.first or '(output)'}.")
        unknown = [layer for layer in self.layers if layer.verdict not in ("changed", "within noise")]
        if unknown and self.noise != "none":
            why = listing([*dict.fromkeys(layer.verdict for layer in unknown)])
            parts.append(f"{counted(len(unknown), 'layer')} {_have(len(unknown))} no verdict ({why}).")
        return " ".join(parts)

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers and text, for JSON."""
        layers = [
            {
                **{key: value for key, value in asdict(layer).items() if key not in ("distance", "fields")},
                "distance": None if layer.distance is None else layer.distance.row(),
                "fields": [{**asdict(one), "times_noise": one.times_noise} for one in layer.fields],
            }
            for layer in self.layers
        ]
        own = ("first", "first_nonfinite", "only_before", "only_after", "noise", "alpha", "windows", "remarks", "changed")
        return {"answer": self.answer(), **{name: getattr(self, name) for name in own}, "layers": layers}


def _have(n: int) -> str:
    return "has" if n == 1 else "have"


def _were(n: int) -> str:
    return "was" if n == 1 else "were"


def compare_recordings(
    before: Recording | Sequence[Recording],
    after: Recording | Sequence[Recording],
    *,
    alpha: float = ALPHA,
    rename: Mapping[str, str] | None = None,
    seed: int = 0,
) -> RecordingComparison:
    """What changed from one recording to another: of two checkpoints, two precisions, eager and compiled, before and after quantization.

    The verdict is about the numbers of whole layers that a history keeps of each window (:data:`MOMENT_FIELDS`; of other statistics all).
    Two recordings of one model on other batches differ, too. How much, the windows tell: :func:`torchprobe.analysis.window_noise.apart`
    compares the windows of both by a permutation test, for all numbers of all layers at once. If the windows could be exchanged, the
    probability of any false verdict is at most ``alpha``. So windows must hold different batches in the same way: call ``rec.snapshot``
    every few batches, at least 4 times for ``alpha`` = 0.05, while the model does not change. If windows depend on those before them, as
    during training, there is no verdict. ``distance`` compares every feature, over everything that was recorded, but its noise is unknown:
    two layers can be far apart and yet keep all numbers that the verdict is about, such as after a permutation of features.

    Args:
        before, after: recordings of the same statistic, positions and kind; of each side one, or one for each rank.
        alpha: the probability of a false verdict about any layer.
        rename: name or glob of a layer before → name after; see :func:`torchprobe.recording.matching.match_layers`.
        seed: of the permutations.

    Raises:
        ValueError: other settings, no layer in common, or ``alpha`` outside (0, 1).

    >>> import torch, torchprobe
    >>> def recorded(model, seed):
    ...     torch.manual_seed(seed)
    ...     with torchprobe.record(model, "*") as rec:
    ...         for window in range(6):
    ...             _ = model(torch.randn(64, 8))
    ...             rec.snapshot(window)
    ...     return rec
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    >>> before, again = recorded(model, 1), recorded(model, 2)
    >>> with torch.no_grad():
    ...     _ = model[2].weight.mul_(1.5)
    >>> compare_recordings(before, again).first, compare_recordings(before, recorded(model, 3)).first
    (None, '2')
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is a probability between 0 and 1, got {alpha}")
    one, other = Side(before), Side(after)
    _check_settings(one, other)
    for side, which in ((one, "first"), (other, "second")):
        if not side.layers:
            raise ValueError(f"the {which} recording has no layer: nothing was seen while it was made")
    matched = match_layers(one.layers, other.layers, rename)
    if not matched.pairs:
        raise ValueError(
            f"the recordings have no layer in common: one has {listing([*map(repr, one.layers)])}, the other "
            f"{listing([*map(repr, other.layers)])}. Say which is which with rename={{'blocks.*': 'layers.*'}}"
        )
    remarks = [*matched.remarks]
    for names, which in ((matched.only_first, "first"), (matched.only_second, "second")):
        if names:
            remarks.append(f"{counted(len(names), 'layer')} of the {which} only, not compared: {listing(names, 6)}")
    order = [other.layers.index(name) for _, name in matched.pairs]
    if order != sorted(order):
        remarks.append("the layers did not run in the same order in both; the order is that of the first")
    totals = one.total, other.total
    alike = [(a, b) for a, b in matched.pairs if totals[0][a].features == totals[1][b].features]
    changes, noise, why = _windows(one, other, alike, alpha, seed, remarks)
    layers = [_layer(totals[0][a], totals[1][b], (a, b), changes.get(a, ()), noise, alpha) for a, b in matched.pairs]
    sigmas = one.settings.outlier_sigma, other.settings.outlier_sigma
    if sigmas[0] != sigmas[1]:
        remarks.append(f"outliers are counted from {sigmas[0]:g} and from {sigmas[1]:g} standard deviations on, so they are not compared")
    return RecordingComparison(
        layers,
        next((layer.layer for layer in layers if layer.verdict == "changed"), None),
        next((layer.layer for layer in layers if (layer.nonfinite > 0) != (layer.other_nonfinite > 0)), None),
        matched.only_first,
        matched.only_second,
        noise,
        alpha,
        (one.windows, other.windows),
        remarks,
        why,
    )


def _check_settings(before: Side, after: Side) -> None:
    for name, what in (("statistic", "statistic="), ("of", "of="), ("positions", "positions=")):
        one, other = getattr(before.settings, name), getattr(after.settings, name)
        if one != other:
            raise ValueError(f"the recordings cannot be compared: {what}{one!r} and {what}{other!r}. Record both in the same way")


def _layer(one: Statistic, other: Statistic, pair: tuple[str, str], fields: Sequence[FieldChange], noise: str, alpha: float) -> LayerChange:
    a, b = moments_of(one), moments_of(other)
    nonfinite = [0.0 if m is None else float(m.nonfinite.sum()) for m in (a, b)]
    same = one.features == other.features
    found = distance(a, b) if a is not None and b is not None and same else None
    if not same:
        verdict = "other width"
    elif not (one.saw_anything() and other.saw_anything()):
        verdict = "not seen"
    elif noise == "none" or not fields:
        verdict = "no noise known"
    else:
        verdict = "changed" if fields[0].p <= alpha else "within noise"
    return LayerChange(*pair, one.features, other.features, verdict, found, fields, *nonfinite)


# -- the windows -------------------------------------------------------------------------------------------------------------


def _windows(
    before: Side, after: Side, pairs: Sequence[tuple[str, str]], alpha: float, seed: int, remarks: list[str]
) -> tuple[dict[str, list[FieldChange]], str, str]:
    """The numbers of each layer, the surest change first; where the noise comes from; and why it is not known, which is a remark, too."""
    counts = before.windows, after.windows
    if min(counts) == 0:
        without = " and ".join(name for name, count in zip(("the first", "the second"), counts, strict=True) if not count)
        why = f"{without} {_have(counts.count(0))} no closed windows"
        remarks.append(f"no noise known: {why}. Call rec.snapshot(step) every few batches while you record")
        return {}, "none", why
    if min(counts) < FEWEST or attainable(*counts) > alpha:
        why = f"{counts[0]} and {counts[1]} windows cannot give a verdict at a false-alarm rate of {alpha:g}"
        remarks.append(f"no noise known: {why}. {_needed(alpha)}")
        return {}, "none", why
    names = _fields(before, after, remarks)
    keys, columns = list[tuple[str, str, str]](), list[tuple[Array, Array]]()
    for a, b in pairs:
        for name in names:
            one, other = before.column(name, a), after.column(name, b)
            if np.isfinite(one).any() and np.isfinite(other).any():
                log = name in MOMENT_FIELDS and name != "outlier_features" and _positive(one) and _positive(other)
                keys.append((a, name, "log" if log else "linear"))
                columns.append((np.log(one), np.log(other)) if log else (one, other))
    if not columns:
        why = "no layer of both has a finite number in its windows" if pairs else "no layer has the same width in both"
        remarks.append(f"no noise known: {why}")
        return {}, "none", why
    values = [np.stack([column[i] for column in columns], 1) for i in (0, 1)]
    found = apart(values[0], values[1], seed=seed)
    changes: dict[str, list[FieldChange]] = {}
    for i, (layer, name, scale) in enumerate(keys):
        if math.isfinite(found.p[i]):
            first, second = (float(np.nanmean(np.exp(part[:, i]) if scale == "log" else part[:, i])) for part in values)
            gap, error = float(found.difference[i]), float(found.noise[i])
            changes.setdefault(layer, []).append(FieldChange(name, first, second, gap, error, float(found.p[i]), scale))
    for fields in changes.values():
        fields.sort(key=lambda one: (one.p, -one.times_noise))
    for which, side, part in zip(("first", "second"), (before, after), values, strict=True):
        if any(drifts(one, seed) for one in side.apart(part)):
            why = f"the windows of the {which} drift, as while a model trains, so their spread does not measure noise"
            remarks.append(f"no verdict: {why}. Record each checkpoint on the same data while it does not change")
            return changes, "none", why
    return changes, "windows", ""


def _needed(alpha: float) -> str:
    windows = next((n for n in range(FEWEST, 20) if attainable(n, n) <= alpha), None)
    return (
        "No number of windows can: take a larger rate"
        if windows is None
        else f"Record at least {windows} windows of each (more are better)"
    )


def _fields(before: Side, after: Side, remarks: list[str]) -> list[str]:
    """The numbers to compare."""
    moments = before.settings.statistic == "Moments"
    names = [name for name in before.fields if name in (MOMENT_FIELDS if moments else after.fields) and name not in _COUNTS]
    if "vectors" in before.fields:
        sizes = [side.typical("vectors") for side in (before, after)]
        if min(sizes) > 0 and max(sizes) / min(sizes) > _SAME_SIZE:
            left_out = [name for name in names if name.rpartition(".")[2] not in _UNBIASED]
            names = [name for name in names if name not in left_out]
            remarks.append(
                f"windows of the first hold {sizes[0]:,.0f} vectors, those of the second {sizes[1]:,.0f}: the verdict is approximate, and "
                f"does without the numbers that depend on the size of a window: {listing([name.replace('_', ' ') for name in left_out])}"
            )
    return names


def _positive(values: Array) -> bool:
    return bool((values[np.isfinite(values)] > 0).all())
