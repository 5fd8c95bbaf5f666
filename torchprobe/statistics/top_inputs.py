"""The inputs with the largest score of each feature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.numbers import shown, whole
from torchprobe.ops.memory import MOST_CALLS
from torchprobe.ops.observe import MOST_FEATURES
from torchprobe.statistics.dynamic import DynamicStatistic
from torchprobe.statistics.saved import DamagedState, check_keys, check_mapping, count_problem, fits, same
from torchprobe.statistics.tensors import check_input, describe

SCORES = ("max", "mean")

RANK_STRIDE = 1 << 40
"""Default ids of rank r begin at r · RANK_STRIDE, so that the ids of different ranks differ."""

MOST_KEPT = 1 << 32
"""The most inputs that are kept, over all features: 64 GiB."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_BLOCK = 1 << 20  # elements that are widened to float64 at a time


class TopInputs(DynamicStatistic):
    """The ``k`` inputs with the largest score of each feature, with their ids.

    Args:
        features: the width of the layer.
        k: inputs to keep for each feature.
        device: the device of the state, which must be that of the activations. Default: PyTorch's default device.
        score: how the map of one input becomes a number: "max" or "mean" over its positions, nan left out. The mean is summed in float64,
            in an order that depends only on the number of positions.

    Raises:
        ValueError: an argument is out of range.

    Of equal scores the smaller id comes first, so the result is the same for any order, partition and merging. An id that is seen twice
    counts once, with its larger score.

    ``scores`` is float64 (features, k), descending; ``ids`` is int64 (features, k). If fewer than k inputs had a score, the rest is −inf
    and −1. ``inputs`` counts the inputs seen. ``unscored``, int64 (features,), counts the inputs whose map was entirely nan.

    >>> import torch
    >>> from torchprobe.statistics import TopInputs
    >>> top = TopInputs(features=2, k=2)
    >>> top.update(torch.tensor([[0.0, 5.0], [3.0, 1.0], [2.0, 5.0]]), ids=[10, 11, 12])
    >>> top.ids.tolist()
    [[11, 12], [10, 12]]
    """

    fields = MappingProxyType(
        {
            "score_max": "the largest score of any feature",
            "score_median": "the median over features of the largest score",
            "inputs": "inputs seen",
            "unscored": "inputs whose map was entirely nan, summed over features",
        }
    )
    arguments = ("k", "score")

    def __init__(self, features: int, k: int = 20, device: torch.device | str | None = None, score: str = "max") -> None:
        self.features, self.k = whole("features", features, 1, MOST_FEATURES), whole("k", k, 1, MOST_KEPT)
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {shown(score)}")
        if self.features * self.k > MOST_KEPT:
            raise ValueError(f"k must be at most {MOST_KEPT // self.features} for {features} features, got {k}")
        self.score = score
        self.inputs = 0
        self.numbered = 0  # inputs with default ids, in all windows of a recording
        device = torch.device(device) if device is not None else torch.get_default_device()
        with torch.inference_mode(False):
            self._scores = torch.empty(self.features, self.k, dtype=torch.float64, device=device)
            self._ids = torch.empty(self.features, self.k, dtype=torch.int64, device=device)
            self._unscored = torch.empty(self.features, dtype=torch.int64, device=device)
        self.reset()

    # -- the contract of a statistic ----------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, ids: Tensor | Sequence[int] | None = None, *, mask: Tensor | None = None) -> None:
        """Adds inputs.

        Args:
            x: floating point. The first dimension holds the inputs, ``feature_dim`` the features, the others the positions.
            feature_dim: the dimension of the features.
            ids: whole numbers ≥ 0, one for each input. Default: numbers in the order of the calls, continued in the next window of a
                recording, from ``RANK_STRIDE * rank``. Recordings that are merged later, or several devices in one process, need ids
                that differ.
            mask: bool, the shape of ``x`` without ``feature_dim``. Positions where it is False are left out.

        Raises:
            ValueError: shapes or ids do not fit.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            raise ValueError(f"expected a floating-point tensor (inputs, …), got {describe(x)}")
        if not -x.dim() < feature_dim < x.dim() or feature_dim == 0 or x.shape[feature_dim] != self.features:
            raise ValueError(
                f"expected {self.features} features along dimension {feature_dim}, and inputs along dimension 0; got a tensor of "
                f"shape {tuple(x.shape)}"
            )
        check_input("TopInputs", self.features, x, feature_dim, mask)
        x = x.detach()
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(feature_dim % x.dim()), torch.nan)
        inputs, start = x.shape[0], max(self.inputs, self.numbered)
        first_id = start + RANK_STRIDE * _rank()
        numbers = torch.arange(first_id, first_id + inputs, device="cpu") if ids is None else torch.as_tensor(ids)
        if numbers.shape != (inputs,) or (inputs and (numbers.dtype not in _INTEGERS or int(numbers.min()) < 0)):
            raise ValueError(f"ids must be {inputs} whole numbers ≥ 0, one for each input, got {describe(numbers)}")
        if not inputs:
            return
        maps = x.movedim(feature_dim, 1).flatten(2) if x.dim() > 2 else x[:, :, None]
        scores = (_largest if self.score == "max" else _mean)(maps)
        self.inputs += inputs
        if ids is None:
            self.numbered = start + inputs
        self._unscored += scores.isnan().sum(0)
        ids_of = numbers.to(self._ids).expand(self.features, inputs)
        self._take(scores.T.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), ids_of.where(~scores.T.isnan(), -1))

    def merge(self, other: TopInputs) -> TopInputs:
        """Adds, in place, everything ``other`` has seen, and returns itself. ``other`` may be on another device.

        Raises:
            TypeError: ``other`` is not a :class:`TopInputs`.
            ValueError: it has another width, k or score.
        """
        self.check_mergeable(other)
        self.inputs += other.inputs
        self.numbered = max(self.numbered, other.numbered)
        self._unscored += other._unscored.to(self._unscored)
        self._take(other._scores.to(self._scores), other._ids.to(self._ids))
        return self

    def reset(self) -> None:
        """Forgets everything."""
        self.inputs = self.numbered = 0
        self._scores.fill_(-torch.inf)
        self._ids.fill_(-1)
        self._unscored.zero_()

    def state_dict(self) -> dict[str, Any]:
        """``features``, ``k``, ``score``, ``inputs``, ``numbered``, and the tensors ``scores``, ``ids`` and ``unscored``, cloned."""
        numbers = {"features": self.features, "k": self.k, "score": self.score, "inputs": self.inputs, "numbered": self.numbered}
        return {**numbers, **{name: part.clone() for name, part in self._parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises:
            ValueError: another width, k or score; a part is missing, unknown or of the wrong shape. Nothing is changed then.
        """
        check_mapping("TopInputs", state)
        for name in ("features", "k", "score"):
            if not same(state.get(name), getattr(self, name)):
                raise ValueError(f"the saved TopInputs have {name}={shown(state.get(name))}, these have {name}={getattr(self, name)}")
        state = {"numbered": state.get("inputs"), **state}  # missing from states of an earlier version
        check_keys("TopInputs", state, ("features", "k", "score", "inputs", "numbered", *self._parts()))
        for name, part in self._parts().items():
            if not fits(state[name], part) or state[name].dtype != part.dtype:
                raise ValueError(f"{name} of the saved TopInputs is {describe(state[name])}, expected {describe(part)}")
        for name in ("inputs", "numbered"):
            if type(state[name]) is not int or not 0 <= state[name] <= MOST_CALLS:
                raise ValueError(f"{name} of the saved TopInputs is {shown(state[name])}")
        if problem := _problem(state["scores"], state["ids"], state["unscored"], state["inputs"]):
            raise DamagedState("TopInputs", *problem)
        self.inputs, self.numbered = state["inputs"], state["numbered"]
        for name, part in self._parts().items():
            part.copy_(state[name])

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> TopInputs:
        check_mapping("TopInputs", state)
        if missing := [name for name in ("features", "k", "score", "scores") if name not in state]:
            raise ValueError(f"the saved TopInputs lack {missing}")
        features, k = (whole(f"{name} of the saved TopInputs", state[name], 1, MOST_KEPT) for name in ("features", "k"))
        if getattr(state["scores"], "shape", None) != (features, k) or state["score"] not in SCORES:  # before any memory is allocated
            what = f"scores of {describe(state['scores'])} and score={shown(state['score'])}"
            raise ValueError(f"the saved TopInputs have {what}; expected the shape {(features, k)} and one of {', '.join(SCORES)}")
        new = cls(features, k, device, state["score"])
        new.load_state_dict(state)
        return new

    @property
    def empty(self) -> bool:
        return self.inputs == 0

    @property
    def device(self) -> torch.device:
        return self._scores.device

    def summary(self) -> dict[str, float]:
        """:attr:`fields` as plain numbers; nan if nothing was seen."""
        if self.empty:
            return dict.fromkeys(self.fields, math.nan)
        best = self._scores[self._ids[:, 0] >= 0, 0]
        largest, median = (best.max(), best.median()) if len(best) else (math.nan, math.nan)
        numbers = (largest, median, self.inputs, self._unscored.sum())
        return dict(zip(self.fields, map(float, numbers), strict=True))

    @classmethod
    def take_windows(cls, windows: Sequence[TopInputs], into: list[TopInputs]) -> None:
        numbered = [window.numbered for window in windows]
        super().take_windows(windows, into)
        for window, number in zip(windows, numbered, strict=True):
            window.numbered = number

    # -- reads -----------------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Tensor:
        return self._scores.clone()

    @property
    def ids(self) -> Tensor:
        return self._ids.clone()

    @property
    def unscored(self) -> Tensor:
        return self._unscored.clone()

    # -- parts -----------------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Tensor]:
        return {"scores": self._scores, "ids": self._ids, "unscored": self._unscored}

    def _take(self, scores: Tensor, ids: Tensor) -> None:
        """Takes candidates, both (features, n); the id −1 means that there is no input."""
        if scores.device.type == "cpu":  # most features keep what they have; another device would synchronize here
            rows = (scores.amax(1) >= self._scores[:, -1]).nonzero().flatten()
        else:
            rows = torch.arange(self.features, device=scores.device)
        if len(rows):
            best = ranked(torch.cat([self._scores[rows], scores[rows]], 1), torch.cat([self._ids[rows], ids[rows]], 1))
            self._scores[rows], self._ids[rows] = (part[:, : self.k] for part in best)

    def __repr__(self) -> str:
        return f"TopInputs({self.features} features, the {self.k} of {self.inputs} inputs with the largest {self.score})"


def _problem(scores: Tensor, ids: Tensor, unscored: Tensor, inputs: int) -> tuple[str, str] | None:
    """What is wrong with a saved state: scores descend, and each id stands once, before the places without one."""
    if wrong := count_problem("unscored", unscored, inputs):
        return wrong
    if bool(scores.isnan().any()) or bool((scores[:, 1:] > scores[:, :-1]).any()):
        return "scores", "holds nan, or does not descend"
    empty, ordered = ids < 0, ids.sort(1).values
    if bool((ids < -1).any()) or bool((empty[:, :-1] & ~empty[:, 1:]).any()) or bool((empty & (scores > -torch.inf)).any()):
        return "ids", "holds numbers below -1, or a score without an id"
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        return "ids", "holds an id twice for a feature"
    return None


def ranked(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts each row by descending score, then ascending id, each id once. Entries without an input (id −1) go to the end as −inf.

    >>> scores, ids = ranked(torch.tensor([[1.0, 2.0, 1.0, 3.0]]), torch.tensor([[4, 9, 2, 9]]))
    >>> scores.tolist(), ids.tolist()
    ([[3.0, 1.0, 1.0, -inf]], [[9, 2, 4, -1]])
    """
    scores, ids = _sorted(scores, ids, scores, descending=True)
    scores, ids = _sorted(scores, ids, ids, descending=False)  # stable: the largest score of an id comes first
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    ids = ids.masked_fill(repeated, -1)
    scores = scores.masked_fill(ids < 0, -torch.inf)
    scores, ids = _sorted(scores, ids, scores, descending=True)
    # The score of an input may be −inf too; it comes before entries without an input.
    return _sorted(scores, ids, (ids < 0).int(), descending=False)


def _sorted(scores: Tensor, ids: Tensor, key: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    order = key.argsort(dim=1, descending=descending, stable=True)
    return scores.gather(1, order), ids.gather(1, order)


def _largest(maps: Tensor) -> Tensor:
    """The largest value of each map: (inputs, features, positions) → (inputs, features), float64; nan if a map is empty or entirely nan."""
    if not maps.shape[2]:
        return maps.new_full(maps.shape[:2], torch.nan, dtype=torch.float64)
    largest = maps.amax(2)  # nan if any is
    if maps.device.type != "cpu" or largest.isnan().any():
        largest = maps.masked_fill(maps.isnan(), -torch.inf).amax(2).where(~maps.isnan().all(2), torch.nan)
    return largest.double()


def _mean(maps: Tensor) -> Tensor:
    """The mean of each map; otherwise as :func:`_largest`."""
    inputs = max(1, _BLOCK // max(1, maps[:1].numel()))
    return torch.cat([_mean_of_block(part) for part in maps.split(inputs)])


def _mean_of_block(maps: Tensor) -> Tensor:
    present = ~maps.isnan()
    parts = maps.double().where(present, 0)
    while parts.shape[2] > 1:  # add the halves: the same additions for every batch size
        half = parts.shape[2] // 2
        parts = torch.cat([parts[..., :half] + parts[..., half : 2 * half], parts[..., 2 * half :]], 2)
    return parts.sum(2) / present.sum(2)


def _rank() -> int:
    """The rank of this process, 0 without a process group."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
