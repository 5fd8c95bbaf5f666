"""Standard models: how accurate they are under a distribution shift, given how accurate they are on ImageNet.

Effective robustness is measured from a line through their accuracies, in logits. The line is a least squares fit to models trained on
ImageNet without extra data and without an intervention for robustness (Taori et al. 2020, https://arxiv.org/abs/2007.00644). All accuracies
are in percent.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchprobe.analysis.repeated import once
from torchprobe.analysis.resampling import LEVEL
from torchprobe.common.csv_files import read_rows
from torchprobe.common.deprecation import RenamedAttribute, renamed_arguments

ImagenetClasses = Literal["full", "subset"]
"""The classes of an ImageNet accuracy: all 1000, or only those that a shift has."""

Floats = TypeVar("Floats", float, NDArray[np.float64])

IMAGENET = "imagenet"
"""The name of the unshifted images, also if they are not ImageNet's."""

SHIFTS = ("imagenet_v2", "imagenet_r", "imagenet_sketch", "objectnet", "imagenet_a")
"""The five shifts, under the names that every function and every column uses."""

MEAN = "mean"
"""The name of the mean accuracy over the five shifts; it can be given as a shift."""

SUBSETS = {"imagenet_r": "imagenet_on_r_classes", "objectnet": "imagenet_on_objectnet_classes", "imagenet_a": "imagenet_on_a_classes"}
"""Shift with only some of the classes → the name of the ImageNet accuracy on these classes. The other shifts have all classes."""

POOR = 0.85
"""Every row notes a fit with a smaller R² (we chose the number)."""


@dataclass(frozen=True)
class Fit:
    """A line through standard models, both axes in logits: logit(p) = ln(p / (100 − p)).

    Attributes:
        shift: one of :data:`SHIFTS`, or ``"mean"``.
        imagenet_classes: "full": the x axis is ImageNet accuracy on all classes; "subset": on the classes that the shift has.
        slope, intercept: of the line.
        r2: share of the variance of the logits that the line explains.
        n: number of models that it was fitted to.
        lowest_x, highest_x: their lowest and highest ImageNet accuracy, percent.
        residual_std: standard deviation of the residuals with n − 2 degrees of freedom, in logits.
        x_mean, x_squares: mean of the logits of the ImageNet accuracies, and Σ (logit − mean)²; for :meth:`interval`.
        source: a description of the models.
    """

    shift: str
    imagenet_classes: ImagenetClasses
    slope: float
    intercept: float
    r2: float
    n: int
    lowest_x: float
    highest_x: float
    residual_std: float
    x_mean: float
    x_squares: float
    source: str

    x = RenamedAttribute("imagenet_classes")

    def predict(self, imagenet_accuracy: Floats) -> Floats:
        """The accuracy under the shift of a standard model with this ImageNet accuracy, percent."""
        return _accuracy(self.slope * _logit(imagenet_accuracy) + self.intercept)

    def interval(
        self, imagenet_accuracy: Floats, level: float = LEVEL, *, scatter: bool = True, error: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[Floats, Floats]:
        """The prediction interval for the accuracy of one more standard model, symmetric in logits.

        ŷ ± t · s · √(1 + 1/n + (x − mean x)² / Σ (x − mean x)²), t with n − 2 degrees of freedom. Outside the range of the fitted models it
        assumes that the line continues.

        Args:
            imagenet_accuracy: percent.
            level: of the interval.
            scatter: False leaves out the 1 under the root: the interval of the line, not of a model.
            error: how far the interval of the logit of the ImageNet accuracy goes down and up; times the slope it is added in squares.
        """
        half, center = self.half(imagenet_accuracy, level, scatter=scatter), self.slope * _logit(imagenet_accuracy) + self.intercept
        down, up = ((half**2 + (self.slope * end) ** 2) ** 0.5 for end in error)
        return _accuracy(center - down), _accuracy(center + up)

    def half(self, imagenet_accuracy: Floats, level: float = LEVEL, *, scatter: bool = True) -> Floats:
        """The half width of :meth:`interval` in logits, for a known ImageNet accuracy."""
        line = 1 / self.n + (_logit(imagenet_accuracy) - self.x_mean) ** 2 / self.x_squares
        half: Floats = self.student(level) * self.residual_std * (scatter + line) ** 0.5
        return half

    def student(self, level: float = LEVEL) -> float:
        """t such that a Student variable with n − 2 degrees of freedom lies within ±t with probability ``level``."""
        return _student(self.n - 2, level)

    def extrapolates(self, imagenet_accuracy: float) -> bool:
        """Whether the fitted models are all better, or all worse, on ImageNet."""
        return not self.lowest_x <= imagenet_accuracy <= self.highest_x

    @property
    def poor(self) -> bool:
        """Whether R² is below :data:`POOR`."""
        return self.r2 < POOR


_SOURCE = (
    "standard models of the ImageNet testbed (Taori et al. 2020) with at least 55 % on the ImageNet validation set; models whose accuracy "
    "under the shift is missing or 0 are left out"
)

FITS: Mapping[tuple[str, ImagenetClasses], Fit] = {
    (fit.shift, fit.imagenet_classes): fit
    for fit in (
        Fit(
            "imagenet_v2", "full", 0.923228982, -0.497689869, 0.996045642, 85, 56.522, 84.726, 0.0186165255, 1.17086876, 8.50079876, _SOURCE
        ),
        Fit("imagenet_r", "full", 0.911591151, -1.59991562, 0.877173917, 80, 56.522, 84.726, 0.105344912, 1.19058346, 7.43903558, _SOURCE),
        Fit(
            "imagenet_sketch", "full", 1.07091454, -2.37007146, 0.869005537, 85, 56.522, 84.726, 0.13306408, 1.17086876, 8.50079876, _SOURCE
        ),
        Fit("objectnet", "full", 1.199268, -2.02425058, 0.941002087, 85, 56.522, 84.726, 0.0961014847, 1.17086876, 8.50079876, _SOURCE),
        Fit("imagenet_a", "full", 3.05163871, -6.2916698, 0.772983461, 84, 56.522, 84.726, 0.532471724, 1.17100029, 8.50067523, _SOURCE),
        Fit("mean", "full", 1.04390697, -1.89177587, 0.947717508, 80, 56.522, 84.726, 0.0757201566, 1.19058346, 7.43903558, _SOURCE),
        Fit("imagenet_r", "subset", 0.636844062, -2.10771597, 0.889402039, 80, 76.91, 96.5, 0.099963585, 2.50159466, 15.4547876, _SOURCE),
        Fit("objectnet", "subset", 0.980910798, -1.92828937, 0.952511215, 85, 56.608, 88.304, 0.086219858, 1.33368317, 12.8621244, _SOURCE),
        Fit("imagenet_a", "subset", 1.99000481, -7.63247473, 0.827793199, 84, 76.15, 96.9, 0.463759641, 2.46947883, 21.4073572, _SOURCE),
    )
}
"""(shift, classes) → the fit to the standard models of the ImageNet testbed: the 85 models with at least 55 % on ImageNet.

One rule holds for all fits, also for the class-subsampled fit of ImageNet-A. A model whose accuracy under the shift is missing or 0 is left
out, because 0 has no logit. We chose this rule: clipping 0 to 0.01 % would let ResNet-50, against which ImageNet-A was filtered, pull the
line down. The fit of ImageNet-A is poor; its authors use a line in two pieces."""


class Baseline:
    """Your own standard models: their accuracies, and the lines through them.

    Args:
        accuracies: name → accuracies in percent, all of one length, nan if unknown. The names are ``"imagenet"``, the shifts of
            :data:`SHIFTS` or any other shifts, and for ``imagenet_classes="subset"`` those in :data:`SUBSETS`.
        models: their names. A model that is listed twice counts once.
        minimum, source: models with a smaller ImageNet accuracy are left out (the published fits use 55); a description that fits keep.

    Raises:
        ValueError: no ``"imagenet"``, no shift, different lengths, a value outside 0 to 100, or a model with two accuracies.

    >>> Baseline({"imagenet": [60, 70, 80], "imagenet_v2": [47, 58, 69]}).fit("imagenet_v2").n
    3
    """

    def __init__(
        self,
        accuracies: Mapping[str, ArrayLike],
        models: Sequence[str] | None = None,
        *,
        minimum: float = 0.0,
        source: str = "a baseline of your own",
    ) -> None:
        self.accuracies = {name: np.asarray(values, dtype=np.float64) for name, values in accuracies.items()}
        self.minimum = minimum
        self.source = source
        shapes = {name: values.shape for name, values in self.accuracies.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise ValueError(f"accuracies of a baseline need one value for each model, got the shapes {shapes}")
        if IMAGENET not in shapes or not self.shifts:
            raise ValueError(
                f"a baseline needs 'imagenet' and at least one shift, such as {', '.join(SHIFTS)}; it has {', '.join(shapes) or 'nothing'}"
            )
        count = len(self.accuracies[IMAGENET])
        self.models = tuple(models) if models is not None else tuple(f"model {i}" for i in range(count))
        if len(self.models) != count:
            raise ValueError(f"{count} models need as many names, got {len(self.models)}")
        for name, values in self.accuracies.items():
            for i in np.nonzero(~np.isnan(values) & ~((values >= 0) & (values <= 100)))[0]:
                raise ValueError(f"{self.models[i]}, {name}: {values[i]:g} is not a percentage; accuracies are 0 to 100")
            if np.nanmax(values, initial=0.0) <= 1 and (values > 0).any():
                raise ValueError(f"{name} is never above 1: these look like fractions; accuracies are in percent, so multiply by 100")
        self.models, self.accuracies = once(self.models, self.accuracies)

    @property
    def shifts(self) -> tuple[str, ...]:
        """Its shifts, in the order of its columns."""
        return tuple(name for name in self.accuracies if name not in (IMAGENET, *SUBSETS.values()))

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], *, minimum: float = 0.0) -> Baseline:
        """Reads a table with the columns ``model``, ``imagenet``, some of :data:`SHIFTS`, and optionally the names in :data:`SUBSETS`.

        An empty cell is an unknown accuracy. Any other column of percentages is a shift with the name of the column. Other columns, such as
        text, are ignored.

        Raises:
            OSError: the file cannot be read.
            ValueError: a column is missing, a cell is not a percentage (the message has its line), or there are no rows.
        """
        known = (IMAGENET, *SHIFTS, *SUBSETS.values())
        try:
            lines = read_rows(path, strict=True)
            header = [name.strip() for name in next(lines, (1, []))[1]]
            if missing := [name for name in ("model", IMAGENET) if name not in header]:
                raise ValueError(f"no column {' and no column '.join(missing)}; the first line has {', '.join(header) or 'nothing'}")
            if twice := {name for name in header if header.count(name) > 1 and name in (*known, "model")}:
                raise ValueError(f"column {' and column '.join(sorted(twice))} twice")
            rows = []
            for line, values in lines:
                if len(values) > len(header):
                    raise ValueError(f"line {line} has more cells than the first line")
                rows.append((line, dict(zip(header, [*values, *[None] * (len(header) - len(values))], strict=True))))
            columns = [name for name in known if name in header]
            columns += [name for name in header if name and name not in (*known, "model") and _percentages(row[name] for _, row in rows)]
            accuracies = {name: [_percentage(row[name], name, line) for line, row in rows] for name in columns}
            if not rows:
                raise ValueError("no models: there is nothing below the first line")
            return cls(accuracies, [str(row["model"]) for _, row in rows], minimum=minimum, source=f"the models in {os.fspath(path)}")
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a baseline: {error}") from error

    @renamed_arguments(x="imagenet_classes")
    def fit(self, shift: str, imagenet_classes: ImagenetClasses = "full") -> Fit:
        """The line through the models. Models below ``minimum`` or with an accuracy that is missing, 0 or 100 are left out.

        With ``shift="mean"`` it is the line through the mean accuracies of the models that have all five shifts.

        Raises:
            ValueError: an unknown shift, accuracies that the baseline does not have, fewer than three models, or models that
                are all equal on ImageNet.
        """
        across, along, usable = self._usable(shift, imagenet_classes)
        x_logits, y_logits = _logit(across[usable]), _logit(along[usable])
        n = int(usable.sum())
        if n < 3 or np.ptp(x_logits) == 0:
            reason = "a line needs three" if n < 3 else "they are all equal on ImageNet"
            raise ValueError(f"{self.source}: {n} of {len(usable)} models can be used for {shift}; {reason}")
        deviation = x_logits - x_logits.mean()
        squares = float(deviation @ deviation)
        slope = float(deviation @ y_logits) / squares
        intercept = float(y_logits.mean() - slope * x_logits.mean())
        residuals = y_logits - slope * x_logits - intercept
        rest, total = float(residuals @ residuals), float(((y_logits - y_logits.mean()) ** 2).sum())
        return Fit(
            shift=shift,
            imagenet_classes=imagenet_classes if shift in SUBSETS else "full",
            slope=slope,
            intercept=intercept,
            r2=1 - rest / total if total > 0 else math.nan,
            n=n,
            lowest_x=float(across[usable].min()),
            highest_x=float(across[usable].max()),
            residual_std=math.sqrt(rest / (n - 2)),
            x_mean=float(x_logits.mean()),
            x_squares=squares,
            source=self.source,
        )

    def residual_correlation(self, shifts: Sequence[str], imagenet_classes: ImagenetClasses = "full") -> NDArray[np.float64]:
        """How the residuals of the lines go together over models: a model above one line is often above another.

        Returns:
            float64 (shifts, shifts), Pearson's correlations over the models that both lines have. 1, the largest possible, where fewer than
            four are common, or the models lie on a line.

        >>> models = {"imagenet": [60, 70, 80, 85], "imagenet_r": [30, 45, 50, 62], "objectnet": [40, 50, 62, 71]}
        >>> Baseline(models).residual_correlation(["imagenet_r", "objectnet"]).round(2).tolist()
        [[1.0, 0.34], [0.34, 1.0]]
        """
        residuals = np.full((len(shifts), len(self.models)), math.nan)
        for row, shift in zip(residuals, shifts, strict=True):
            across, along, usable = self._usable(shift, imagenet_classes)
            fit = self.fit(shift, imagenet_classes)
            row[usable] = _logit(along[usable]) - fit.slope * _logit(across[usable]) - fit.intercept
        found = np.ones((len(shifts), len(shifts)))
        for i, j in itertools.combinations(range(len(shifts)), 2):
            a, b = residuals[[i, j]][:, np.isfinite(residuals[[i, j]]).all(0)]
            scale = math.sqrt(float(a @ a) * float(b @ b))
            if len(a) > 3 and scale > 0:
                found[i, j] = found[j, i] = float(a @ b) / scale
        return found

    def points(self, shift: str, imagenet_classes: ImagenetClasses = "full") -> list[tuple[float, float]]:
        """The models that :meth:`fit` takes: ImageNet accuracy and accuracy under the shift, percent.

        Raises:
            ValueError: an unknown shift, or accuracies that the baseline does not have.

        >>> Baseline({"imagenet": [60, 70, 0], "imagenet_v2": [47, 58, 0]}).points("imagenet_v2")
        [(60.0, 47.0), (70.0, 58.0)]
        """
        across, along, usable = self._usable(shift, imagenet_classes)
        return list(zip(across[usable].tolist(), along[usable].tolist(), strict=True))

    def _usable(self, shift: str, classes: ImagenetClasses) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """ImageNet accuracy and accuracy under the shift of all models, and which of them have a logit and are good enough."""
        check_names(shift, classes, self.shifts)
        across = self._column(imagenet_name(shift, classes))
        along = np.mean([self._column(name) for name in SHIFTS], 0) if shift == MEAN else self._column(shift)
        usable = self.accuracies[IMAGENET] >= self.minimum
        for values in (across, along):
            usable = usable & (values > 0) & (values < 100)  # nan is neither
        return across, along, usable

    def _column(self, name: str) -> NDArray[np.float64]:
        if name not in self.accuracies:
            raise ValueError(f"{self.source}: no accuracies {name!r}; it has {', '.join(self.accuracies)}")
        return self.accuracies[name]


def published(shift: str, imagenet_classes: ImagenetClasses = "full") -> Fit:
    """The entry of :data:`FITS`.

    Raises:
        ValueError: an unknown shift, or ``"mean"`` with ``imagenet_classes="subset"``.
    """
    check_names(shift, imagenet_classes)
    return FITS[shift, imagenet_classes if shift in SUBSETS else "full"]


def imagenet_name(shift: str, imagenet_classes: ImagenetClasses = "full") -> str:
    """The name of the ImageNet accuracy to compare a shift with."""
    return SUBSETS.get(shift, IMAGENET) if imagenet_classes == "subset" else IMAGENET


def check_names(shift: str, imagenet_classes: str, shifts: Sequence[str] = SHIFTS) -> None:
    """Refuses an unknown shift or choice of classes; ``shifts`` are those of the baseline."""
    known = dict.fromkeys((*SHIFTS, *shifts, MEAN))
    if shift not in known:
        near = difflib.get_close_matches(shift, known, 1, 0.4)
        raise ValueError(f"unknown shift {shift!r}" + (f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"))
    if imagenet_classes not in get_args(ImagenetClasses):
        raise ValueError(f"imagenet_classes is 'full' or 'subset', got {imagenet_classes!r}")
    if shift == MEAN and imagenet_classes == "subset":
        raise ValueError(
            "the five shifts have no subset of the classes in common: take imagenet_classes='full', or mean_effective_robustness"
        )


def _percentages(cells: Iterable[object]) -> bool:
    """Whether a column holds only percentages, and at least one."""
    try:
        values = [_percentage(cell, "", 0) for cell in cells]
    except ValueError:
        return False
    return not all(map(math.isnan, values))


def _percentage(cell: object, column: str, line: int) -> float:
    if cell is None:
        raise ValueError(f"line {line} has fewer cells than the first line")
    text = str(cell).strip()
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise ValueError(f"line {line}, column {column}: {text!r} is not a number") from None
    if text and not 0 <= value <= 100:
        raise ValueError(f"line {line}, column {column}: {text} is not a percentage; accuracies are 0 to 100")
    return value


def _logit(accuracy: Floats) -> Floats:
    logit: Floats = np.log(accuracy / (100 - accuracy))
    return logit


def _accuracy(logit: Floats) -> Floats:
    accuracy: Floats = 50 * (1 + np.tanh(logit / 2))  # = 100 / (1 + exp(−logit)), without overflow
    return accuracy


@functools.lru_cache
def _student(freedom: int, level: float) -> float:
    """t such that a Student variable lies within ±t with probability ``level`` (Abramowitz and Stegun 26.7.3 and 26.7.4, inverted)."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        cosine, sine = math.cos(angle), math.sin(angle)
        odd = freedom % 2
        term, total = (cosine if odd else 1.0), 0.0
        for k in range(1 + odd, freedom, 2):
            total += term
            term *= cosine * cosine * k / (k + 1)
        inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
        low, high = (angle, high) if inside < level else (low, angle)
    return math.sqrt(freedom) * math.tan(low)
