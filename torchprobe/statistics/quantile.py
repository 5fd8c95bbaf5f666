"""The value at an upper quantile of each feature, streaming."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from torchprobe.statistics.statistic import Unstacked
from torchprobe.statistics.tail import Tail, slots

NETDISSECT = Fraction(5, 999)
"""The level that Network Dissection's thresholds really have: entry 5 of 1000 from the top, evenly spaced, is level 994/999 = 0.994995."""

MEMORY = 256 << 20
"""Default budget in bytes: 2048 features are exact up to 3.5 million positions at 0.5 %."""

_SAFETY = (7, 10, 13)  # thinnings of the small samples beside the main one
_SHARE = 16  # each has this fraction of its capacity
_FIXED = 4 * slots(0) + 4  # values that the buffers need beside their capacities
_updating = threading.Lock()  # threads may share a statistic


class Quantile(Unstacked):
    """The value that the share ``quantile`` of all values of a feature exceeds, over all positions of all inputs.

    Of n values (nan left out), it is the smallest seen that at most ⌊quantile · n⌋ exceed: ``numpy.quantile(x, 1 - quantile,
    method="inverted_cdf")``, computed in exact arithmetic. So a strict comparison with it selects at most that share. The original's
    thresholds have ``quantile=torchprobe.statistics.quantile.NETDISSECT``, 5/999 instead of 0.005.

    **Exact** as long as ⌊quantile · n⌋ fits the memory: each feature keeps its largest values, and what falls out can never be the
    quantile. The result is then the same for any order, partition and merging. **Beyond that a sketch**: the values kept are thinned to
    every other one, again and again, and so is, at random, what comes after. The k-th largest of a sample of one in 2^t stands for the
    k · 2^t-th of all, with a relative standard deviation of √((1 − 2^-t)/k) of the level: 0.8 to 1.1 % of ``quantile`` with the
    default memory and 2048 features. A stream whose tail dries up – a sorted one – is caught by three small samples with more thinning, at
    up to 9 %. :meth:`error` states it for each feature.

    Args:
        features: the width of the layer.
        quantile: the share above the value, in (0, 1); decimal numbers are taken at their decimal value, fractions as they are.
        device: where the buffers lie; it must be where the activations are. Default: PyTorch's default device.
        memory: budget in bytes; what is really used grows with what is seen. See :func:`memory_for`.
        seed: of the samples. Statistics that will be merged should have different ones.

    Values are float32: half precision is exact, float64 is rounded. inf is a value like any other; nan is counted in ``nan``.

    >>> import torch
    >>> from torchprobe.statistics import Quantile
    >>> q = Quantile(features=2, quantile=0.1)
    >>> q.update(torch.stack([torch.arange(50.0), -torch.arange(50.0)], 1))
    >>> q.update(torch.stack([torch.arange(50.0, 100.0), -torch.arange(50.0, 100.0)], 1))
    >>> q.value()
    tensor([ 89., -10.])
    """

    fields = MappingProxyType(
        {
            "quantile_max": "the largest quantile of a feature",
            "quantile_median": "the median over features of the quantile",
            "quantile_error": "standard deviation of its level, as a share of all values; 0 while it is exact",
            "positions": "values of each feature seen, nan included",
            "nan": "nan values seen; left out",
        }
    )
    arguments = ("quantile", "capacity")

    def __init__(
        self,
        features: int,
        quantile: float | Fraction = 0.005,
        device: torch.device | str | None = None,
        memory: int = MEMORY,
        seed: int = 0,
    ) -> None:
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features = int(features)
        self.quantile = _level(quantile)
        self.capacity = _capacity(memory // (4 * self.features))
        self.seed = seed
        self._device = device
        self.reset()

    # -- the verbs of a statistic ----------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, mask: Tensor | None = None) -> None:
        """Adds every value of ``x``: any floating type and strides, ``features`` along ``feature_dim``. No position is fine.

        Args:
            mask: bool, the shape of ``x`` without ``feature_dim``; where it is False, ``x`` is left out.

        Raises:
            ValueError: another width or type; a mask of another shape.
        """
        x, mask = self.checked(x, feature_dim, mask)
        if x.dim() == 1:
            x, feature_dim, mask = x[None], -1, None if mask is None else mask[None]
        if mask is not None:
            x, feature_dim = x.movedim(feature_dim, -1)[mask], -1
        with _updating:
            self.positions += x.numel() // self.features
            self._fit()
            if self._main.thinning:  # then the buffers do not see every nan
                self._main.counts[1] += _nans(x, feature_dim)
            draw = torch.rand(x.select(feature_dim, 0).shape, generator=self._generator)
            for tail in self._tails:
                tail.add(x, feature_dim, draw)

    def merge(self, other: Quantile) -> Quantile:
        """Adds, in place, everything ``other`` saw; returns self. ``other`` may lie on another device.

        Raises:
            TypeError: ``other`` is no :class:`Quantile`.
            ValueError: another width, quantile or memory.
        """
        self.check_mergeable(other)
        with _updating:
            self.positions += other.positions
            for mine, theirs in zip(self._tails, other._tails, strict=True):
                mine.merge(theirs, self._generator)
            self._fit()
        return self

    def reset(self) -> None:
        """Forgets everything."""
        self.positions = 0
        self._generator = torch.Generator().manual_seed(self.seed)
        small = max(self.capacity // _SHARE, 1)
        sizes = [(self.capacity, 0), *((small, thinning) for thinning in _SAFETY)]
        self._tails = [Tail(self.features, capacity, thinning, self._device) for capacity, thinning in sizes]

    def state_dict(self) -> dict[str, Any]:
        """``features``, ``quantile`` (as "numerator/denominator"), ``capacity``, ``positions``, ``generator``, and of each buffer its
        ``thinning``, ``offered``, ``values``, ``counts`` and ``bound``. No larger than what is kept."""
        state: dict[str, Any] = {
            "features": self.features,
            "quantile": str(self.quantile),
            "capacity": self.capacity,
            "positions": self.positions,
            "generator": self._generator.get_state(),
        }
        for index, tail in enumerate(self._tails):
            state[f"{index}/thinning"], state[f"{index}/offered"] = tail.thinning, tail.offered
            filled = int(tail.counts[0].max())
            state[f"{index}/values"] = tail.values[:, :filled].clone()
            state[f"{index}/counts"], state[f"{index}/bound"] = tail.counts.clone(), tail.bound.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: another width, quantile or memory; a part missing, unknown or damaged. Nothing is changed then.
        """
        for name in ("features", "quantile", "capacity"):
            if state.get(name) != (own := str(self.quantile) if name == "quantile" else getattr(self, name)):
                raise ValueError(f"the saved Quantile has {name}={state.get(name)}, this one has {name}={own}")
        if state.keys() != (expected := self.state_dict().keys()):
            raise ValueError(
                f"the saved Quantile lacks {sorted(expected - state.keys())} and has unknown {sorted(state.keys() - expected)}"
            )
        tails = [_loaded(index, tail, state) for index, tail in enumerate(self._tails)]
        positions = state["positions"]
        if not isinstance(positions, int) or positions < max(tails[0].offered, int(tails[0].counts[1].max())):
            raise ValueError(f"positions of the saved Quantile are {positions!r}, fewer than its buffers saw")
        generator = torch.Generator()
        try:
            generator.set_state(state["generator"])
        except (RuntimeError, TypeError) as error:
            raise ValueError("generator of the saved Quantile is no state of a random generator") from error
        self.positions, self._tails, self._generator = positions, tails, generator

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> Quantile:
        try:
            new = cls(state["features"], Fraction(state["quantile"]), device)
            new.capacity = int(state["capacity"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"the saved Quantile is damaged: {error!r}") from error
        new.reset()
        new.load_state_dict(state)
        return new

    @property
    def empty(self) -> bool:
        return self.positions == 0

    @property
    def device(self) -> torch.device:
        return self._main.values.device

    def summary(self) -> dict[str, float]:
        """:attr:`fields` as plain numbers; nan where nothing was seen."""
        if self.empty:
            return dict.fromkeys(self.fields, math.nan)
        value, error = self._read(None)
        known = value[~value.isnan()]
        largest, median = (known.max(), known.median()) if len(known) else (math.nan, math.nan)
        numbers = (largest, median, error.max(), self.positions, self.nan.sum())
        return dict(zip(self.fields, map(float, numbers), strict=True))

    # -- reads -----------------------------------------------------------------------------------------------------

    @property
    def count(self) -> Tensor:
        """Values seen, nan left out: int64 (features,)."""
        return self.positions - self.nan

    @property
    def nan(self) -> Tensor:
        """Nan seen, left out of everything else: int64 (features,)."""
        return self._main.counts[1].clone()

    @property
    def exact(self) -> bool:
        """Whether nothing had to be estimated so far."""
        return self._main.thinning == 0

    def value(self, quantile: float | Fraction | None = None) -> Tensor:
        """The quantile of each feature: float32 (features,), nan where nothing was seen.

        Args:
            quantile: another one, no larger than that of the statistic; default: that one.

        Raises:
            ValueError: it is larger, or outside (0, 1).
        """
        return self._read(quantile)[0]

    def error(self, quantile: float | Fraction | None = None) -> Tensor:
        """Standard deviation of the level of :meth:`value`, as a share of all values: float64 (features,), 0 where it is exact."""
        return self._read(quantile)[1]

    def _read(self, quantile: float | Fraction | None) -> tuple[Tensor, Tensor]:
        level = self.quantile if quantile is None else _level(quantile)
        if level > self.quantile:
            raise ValueError(f"this statistic keeps the upper {float(self.quantile):g} only; {float(level):g} lies below it")
        counts = self.count
        above = torch.tensor([_floor(level * n) for n in counts.tolist()], device=counts.device)
        value = torch.full_like(self._main.bound, torch.nan)
        error = torch.full_like(value, torch.inf, dtype=torch.float64).where(counts > 0, 0)
        missing = counts > 0
        for tail in self._tails:
            rank = above >> tail.thinning
            found, known = tail.largest(rank)
            value = found.where(missing & known, value)
            rate = 2.0**-tail.thinning
            spread = ((rank + 1) * (1 - rate)).sqrt().double() / rate / counts
            error = spread.where(missing & known, error)
            missing = missing & ~known
            if not missing.any():
                break
        else:  # all there is to say: no more than what the last buffer dropped
            value = self._tails[-1].bound.where(missing, value)
        return value, error

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def _main(self) -> Tail:
        return self._tails[0]

    def _fit(self) -> None:
        """Thins the main buffer until the quantile of all positions lies well inside it."""
        while 5 * (_floor(self.quantile * self.positions) >> self._main.thinning) >= 4 * self.capacity:
            self._main.halve(self._generator)

    def __repr__(self) -> str:
        state = "exact" if self.exact else f"a sketch, 1 in {2**self._main.thinning}"
        return f"Quantile({self.features} features, upper {float(self.quantile):.6g}, {self.positions} positions, {state})"


def memory_for(features: int, positions: int, quantile: float | Fraction = 0.005) -> int:
    """The budget in bytes with which so many positions stay exact.

    >>> memory_for(2048, 63305 * 7 * 7) <= MEMORY
    True
    """
    capacity = _floor(_level(quantile) * positions) * 5 // 4 + 1
    return 4 * features * (capacity * 95 // 64 + 1 + _FIXED)


def _capacity(total: int) -> int:
    """How much of a feature's values is the capacity of the main buffer: 1/4 more is room before selections, and the three small samples
    have 1/16 of both each."""
    capacity = (total - _FIXED) * 64 // 95
    if capacity < 1:
        raise ValueError(f"the memory has room for {total} values of a feature; at least {_FIXED + 2} are needed")
    return capacity


def _level(quantile: float | Fraction) -> Fraction:
    level = quantile if isinstance(quantile, Fraction) else Fraction(str(quantile)) if 0 < quantile < 1 else Fraction(0)
    if not 0 < level < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
    return level


def _floor(x: Fraction) -> int:
    return x.numerator // x.denominator


def _nans(x: Tensor, feature_dim: int) -> Tensor:
    """Nan of each feature, int64 (features,)."""
    if x.device.type == "cpu" and not x.sum().isnan():  # the usual case, in one read; elsewhere, asking would synchronize
        return torch.zeros(x.shape[feature_dim], dtype=torch.int64)
    return x.isnan().movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim]).sum(0)


def _loaded(index: int, tail: Tail, state: Mapping[str, Any]) -> Tail:
    """A buffer of a saved state, checked."""
    features = len(tail.bound)
    values, counts, bound = (state[f"{index}/{name}"] for name in ("values", "counts", "bound"))
    thinning, offered = state[f"{index}/thinning"], state[f"{index}/offered"]
    for name, part, dtype, shape in (
        ("values", values, torch.float32, (features, getattr(values, "shape", (0,))[-1])),
        ("counts", counts, torch.int64, (3, features)),
        ("bound", bound, torch.float32, (features,)),
    ):
        if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(
                f"{index}/{name} of the saved Quantile is {getattr(part, 'dtype', type(part).__name__)} of shape "
                f"{tuple(getattr(part, 'shape', ()))}, expected {dtype} of shape {shape}"
            )
    sound = (
        isinstance(thinning, int)
        and isinstance(offered, int)
        and 0 <= thinning < 63
        and values.shape[1] <= min(offered, slots(tail.capacity))
    )
    filled = torch.arange(values.shape[1], device=values.device) < counts[0, :, None]
    if (
        not sound
        or bool((counts < 0).any())
        or bool((counts[0] > values.shape[1]).any())
        or not torch.equal(values > -torch.inf, filled)
        or bool(bound.isnan().any())
    ):
        raise ValueError(f"the buffer {index} of the saved Quantile is damaged")
    loaded = Tail(features, tail.capacity, thinning, tail.bound.device)
    loaded.values, loaded.counts, loaded.bound = (part.to(tail.bound.device).clone() for part in (values, counts, bound))
    loaded.offered = offered
    return loaded
