"""Streaming estimate of an upper quantile of each feature."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.numbers import shown, whole
from torchprobe.ops.memory import MOST_CALLS
from torchprobe.ops.observe import MOST_FEATURES
from torchprobe.statistics.dynamic import DynamicStatistic
from torchprobe.statistics.saved import check_keys, check_mapping, same
from torchprobe.statistics.tail import Tail, loaded, slots
from torchprobe.statistics.tensors import check_input, describe

NETDISSECT = Fraction(5, 999)
"""The true level of Network Dissection's thresholds: they take entry 5 of 1000 evenly spaced levels from the top, which is 994/999."""

METHODS = ("inverted_cdf", "hazen")
"""How a quantile between two values is chosen, in NumPy's names: one of the values, or linear between two of them."""

MEMORY = 256 << 20
"""Default budget in bytes. At 0.5 %, 2048 features are exact up to 3.5 million positions."""

MOST_MEMORY = 1 << 42
"""The largest budget in bytes: 4 TiB."""

_SAFETY = (7, 10, 13)  # thinnings of the three small samples, which the main buffer falls back on
_SHARE = 16  # the capacity of the main buffer is this many times that of a small sample
_FIXED = 4 * slots(0) + 4  # values that the buffers need in addition to their capacities


class Quantile(DynamicStatistic):
    """The value that a share ``quantile`` of all values of a feature exceeds, over all positions of all inputs.

    Of n values (nan left out), it is the smallest one that at most ⌊quantile · n⌋ values exceed. This is ``numpy.quantile(x, 1 - quantile,
    method="inverted_cdf")`` in exact arithmetic. So a strict comparison with it selects at most that share. For the thresholds of Network
    Dissection use ``quantile=torchprobe.statistics.quantile.NETDISSECT``, which is 5/999, not 0.005, and ``value(method="hazen")``.

    **It is exact** as long as ⌊quantile · n⌋ fits the memory: each feature keeps its largest values, and a value that is dropped can never
    be the quantile. The result is then the same for any order, partition and merging.

    **Beyond that it is a sketch**. Every other value that was kept is dropped, again and again, and of the values that follow a random
    share is taken. The k-th largest in a sample of one in 2^t stands for the k · 2^t-th largest of all. Its level has a relative standard
    deviation of √((1 − 2^-t)/k): 0.8 to 1.1 % of ``quantile`` with the default memory and 2048 features. In a sorted stream no large values
    follow. Then three small samples with more thinning answer, with up to 9 %. :meth:`error` states it for each feature.

    Args:
        features: the width of the layer.
        quantile: the share above the value, in (0, 1). Decimal numbers are taken at their decimal value, fractions as they are.
        device: the device of the buffers, which must be that of the activations. Default: PyTorch's default device.
        memory: budget in bytes. The memory in use grows with the values seen. See :func:`memory_for`.
        seed: of the random samples. Statistics that will be merged should have different seeds.

    Raises:
        ValueError: ``features`` or ``quantile`` is out of range, or ``memory`` is too small.

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
            "quantile_error": "standard deviation of its level, as a share of all values; 0 if it is exact",
            "values": "values seen of each feature, nan included",
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
        self.features = whole("features", features, 1, MOST_FEATURES)
        self.quantile = _level(quantile)
        self.capacity = _capacity(whole("memory", memory, 1, MOST_MEMORY) // (4 * self.features))
        self.seed = whole("seed", seed, 0, (1 << 63) - 1)
        self._device = device
        self.reset()

    # -- the contract of a statistic ----------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, mask: Tensor | None = None) -> None:
        """Adds every value of ``x``.

        Args:
            x: floating point, any strides; ``features`` along ``feature_dim``. It may hold no position at all.
            feature_dim: the dimension of the features.
            mask: bool, the shape of ``x`` without ``feature_dim``. Positions where it is False are left out.

        Raises:
            ValueError: another width or type, or a mask that does not fit.
        """
        check_input("Quantile", self.features, x, feature_dim, mask)
        x = x.detach()
        if x.dim() == 1:
            x, feature_dim, mask = x[None], -1, None if mask is None else mask[None]
        if mask is not None:
            x, feature_dim = x.movedim(feature_dim, -1)[mask], -1
        self.positions += x.numel() // self.features
        self._fit()
        if self._main.thinning:  # the buffers no longer see every nan
            self._main.counts[1] += _nans(x, feature_dim)
        draw = torch.rand(x.select(feature_dim, 0).shape, generator=self._generator, device="cpu", dtype=torch.float32)
        for tail in self._tails:
            tail.add(x, feature_dim, draw)

    def merge(self, other: Quantile) -> Quantile:
        """Adds, in place, everything ``other`` has seen, and returns itself. ``other`` may be on another device.

        Raises:
            TypeError: ``other`` is not a :class:`Quantile`.
            ValueError: it has another width, quantile or memory.
        """
        self.check_mergeable(other)
        self.positions += other.positions
        for mine, theirs in zip(self._tails, other._tails, strict=True):
            mine.merge(theirs, self._generator)
        self._fit()
        return self

    def reset(self) -> None:
        """Forgets everything."""
        self.positions = 0
        self._generator = torch.Generator("cpu").manual_seed(self.seed)
        sample_capacity = max(self.capacity // _SHARE, 1)
        # One more value than the rank needs, for what is between two ranks.
        sizes = [(self.capacity + 1, 0), *((sample_capacity, thinning) for thinning in _SAFETY)]
        self._tails = [Tail(self.features, capacity, thinning, self._device) for capacity, thinning in sizes]

    def state_dict(self) -> dict[str, Any]:
        """``features``, ``quantile`` (as "numerator/denominator"), ``capacity``, ``positions``, ``generator``, and the ``thinning``,
        ``offered``, ``values``, ``counts`` and ``bound`` of each buffer. Empty room in the buffers is left out."""
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
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: another width, quantile or memory; a part is missing, unknown or damaged. Nothing is changed then.
        """
        check_mapping("Quantile", state)
        for name in ("features", "quantile", "capacity"):
            if not same(state.get(name), own := str(self.quantile) if name == "quantile" else getattr(self, name)):
                raise ValueError(f"the saved Quantile has {name}={shown(state.get(name))}, this one has {name}={own}")
        check_keys("Quantile", state, self._keys())
        tails = [loaded(index, tail, state) for index, tail in enumerate(self._tails)]
        positions = state["positions"]
        if type(positions) is not int or not positions <= MOST_CALLS or positions < max(tails[0].offered, int(tails[0].counts[1].max())):
            raise ValueError(f"positions of the saved Quantile are {shown(positions)}, absurd or fewer than its buffers saw")
        generator = torch.Generator("cpu")
        try:
            generator.set_state(state["generator"])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError("generator of the saved Quantile is not the state of a random generator") from error
        self.positions, self._tails, self._generator = positions, tails, generator

    def _keys(self) -> list[str]:
        parts = [f"{i}/{part}" for i in range(len(self._tails)) for part in ("thinning", "offered", "values", "counts", "bound")]
        return ["features", "quantile", "capacity", "positions", "generator", *parts]

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> Quantile:
        check_mapping("Quantile", state)
        features, quantile, capacity = (state.get(name) for name in ("features", "quantile", "capacity"))
        features = whole("features of the saved Quantile", features, 1, MOST_FEATURES)
        capacity = whole("capacity of the saved Quantile", capacity, 1, MOST_MEMORY)
        if not isinstance(quantile, str) or not re.fullmatch(r"[1-9][0-9]{0,399}/[1-9][0-9]{0,399}", quantile):
            raise ValueError(f"the saved Quantile has quantile={shown(quantile)}; expected a fraction between 0 and 1")
        if getattr(state.get("0/bound"), "shape", None) != (features,):  # before any memory is allocated
            raise ValueError(f"0/bound of the saved Quantile is {describe(state.get('0/bound'))}, expected the shape {(features,)}")
        new = cls(features, Fraction(quantile), device, memory=4 * features * (_FIXED + 2))  # the least; the capacity follows
        new.capacity = capacity
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
        """:attr:`fields` as plain numbers; nan if nothing was seen."""
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
    def bound(self) -> Tensor:
        """The level at or below which values are dropped: float32 (features,). It only rises, and no exact :meth:`value` is below it."""
        return self._main.bound

    @property
    def exact(self) -> bool:
        """Whether :meth:`value` is exact; otherwise it is estimated."""
        return self._main.thinning == 0

    def value(self, quantile: float | Fraction | None = None, method: str = "inverted_cdf") -> Tensor:
        """The quantile of each feature: float32 (features,), nan if nothing was seen, or nothing is known (then :meth:`error` is inf).

        Args:
            quantile: another share, at most that of the statistic. Default: that of the statistic.
            method: "inverted_cdf", see above. "hazen": linear between the two values around it, as ``numpy.quantile(x, 1 - quantile,
                method="hazen")`` and as Network Dissection reads its sketch: value k of n sorted ones is at the level (k + ½) / n. The
                original sorts values together with two extremes of weight 0, in no fixed order, so it may be half a rank off from this.

        Raises:
            ValueError: the share is larger, or outside (0, 1), or the method is unknown.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "inverted_cdf":
            return self._read(quantile)[0]
        level = self._level_of(quantile)
        ranks = [max(level * n - Fraction(1, 2), Fraction(0)) for n in self.count.tolist()]  # from the largest value, which has 0
        before = torch.tensor([_floor(rank) for rank in ranks], device=self.device)
        upper, lower = (self._at(torch.minimum(rank, self.count.clamp(min=1) - 1))[0].double() for rank in (before, before + 1))
        share = torch.tensor([float(rank - _floor(rank)) for rank in ranks], dtype=torch.float64, device=self.device)
        between = upper + share * (lower - upper)
        return between.where((share > 0) & (upper != lower) & upper.isfinite(), upper).float()

    def error(self, quantile: float | Fraction | None = None) -> Tensor:
        """Standard deviation of the level of :meth:`value`, as a share of all values: float64 (features,), 0 if it is exact."""
        return self._read(quantile)[1]

    def shares(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the values above and equal to ``value``, float64 (features,) each, as exact as :meth:`value`; nan: unknown."""
        above = torch.full_like(value, torch.nan, dtype=torch.float64)
        equal, missing = above.clone(), self.count > 0
        for tail in self._tails:
            more, same, known = tail.tally(value.to(self.device))
            scale = 2.0**tail.thinning / self.count.double()
            above, equal = (more * scale).where(missing & known, above), (same * scale).where(missing & known, equal)
            missing = missing & ~known
        return above.clamp(max=1), equal.clamp(max=1)

    def _level_of(self, quantile: float | Fraction | None) -> Fraction:
        level = self.quantile if quantile is None else _level(quantile)
        if level > self.quantile:
            raise ValueError(f"this statistic keeps only the upper {float(self.quantile):g} of the values; {float(level):g} is below it")
        return level

    def _read(self, quantile: float | Fraction | None) -> tuple[Tensor, Tensor]:
        level = self._level_of(quantile)
        return self._at(torch.tensor([_floor(level * n) for n in self.count.tolist()], device=self.device))

    def _at(self, above: Tensor) -> tuple[Tensor, Tensor]:
        """The value that so many values exceed, and the error of its level; int64 (features,)."""
        counts = self.count
        value = torch.full_like(self._main.bound, torch.nan)
        error = torch.full_like(value, torch.inf, dtype=torch.float64).where(counts > 0, 0)
        missing = counts > 0
        limit = torch.full_like(value, torch.inf)
        for tail in self._tails:
            rank = above >> tail.thinning
            found, known = tail.largest(rank)
            if tail.thinning:  # that a sample has too few values says "−inf" only if it has taken as many
                known = known & ((found > -torch.inf) | ((rank < tail.offered) & (counts == self.positions)))
            limit = torch.minimum(limit, tail.bound.where(tail.bound > -torch.inf, torch.inf))
            value = found.where(missing & known, value)
            rate = 2.0**-tail.thinning
            spread = ((rank + 1) * (1 - rate)).sqrt().double() / rate / counts
            error = spread.where(missing & known, error)
            missing = missing & ~known
            if not missing.any():
                break
        else:  # only a limit is known: the value is at most the least that any buffer dropped; nan: not even that
            value = limit.where(limit < torch.inf, torch.nan).where(missing, value)
        return value, error

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def _main(self) -> Tail:
        return self._tails[0]

    def _fit(self) -> None:
        """Thins the main buffer until the quantile of all positions is well inside it."""
        while 5 * (_floor(self.quantile * self.positions) >> self._main.thinning) >= 4 * self.capacity:
            self._main.halve(self._generator)

    def __repr__(self) -> str:
        state = "exact" if self.exact else f"a sketch, 1 in {2**self._main.thinning}"
        return f"Quantile({self.features} features, upper {float(self.quantile):.6g}, {self.positions} positions, {state})"


def memory_for(features: int, positions: int, quantile: float | Fraction = 0.005) -> int:
    """A budget in bytes for which so many positions are exact.

    >>> memory_for(2048, 63305 * 7 * 7) <= MEMORY
    True
    """
    capacity = _floor(_level(quantile) * positions) * 5 // 4 + 1
    return 4 * features * (capacity * 95 // 64 + 1 + _FIXED)


def _capacity(total: int) -> int:
    """The capacity of the main buffer, if there is room for ``total`` values of a feature. A buffer has 1/4 more room than its capacity,
    and each of the three small samples has 1/16 of the main buffer's capacity and room."""
    capacity = (total - _FIXED) * 64 // 95
    if capacity < 1:
        raise ValueError(f"the memory has room for only {total} values of a feature; at least {_FIXED + 2} are needed")
    return capacity


def _level(quantile: float | Fraction) -> Fraction:
    try:
        level = quantile if isinstance(quantile, Fraction) else Fraction(str(quantile)) if 0 < quantile < 1 else Fraction(0)
    except (TypeError, ValueError, RuntimeError):
        level = Fraction(0)
    if not 0 < level < 1:
        raise ValueError(f"quantile must be between 0 and 1, got {shown(quantile)}")
    return level


def _floor(x: Fraction) -> int:
    return x.numerator // x.denominator


def _nans(x: Tensor, feature_dim: int) -> Tensor:
    """How many values of each feature are nan: int64 (features,)."""
    if x.device.type == "cpu" and not x.sum().isnan():  # the usual case, in one read; another device would synchronize here
        return torch.zeros(x.shape[feature_dim], dtype=torch.int64, device="cpu")
    return x.isnan().movedim(feature_dim, -1).reshape(-1, x.shape[feature_dim]).sum(0)
