"""Several statistics of one layer as one, so that a single hook updates all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchprobe.statistics.statistic import Statistic


class Several(Statistic):
    """Statistics that read the same activations; ``torchprobe.record(model, statistic=[Moments, Zeros])`` makes one for every layer.

    ``several["Zeros"]``, ``several[Zeros]`` and ``several[1]`` give one of them; iterating gives all, in the order in which they were
    given. Of two with one name, the second is called ``Zeros_2``. Of two fields with one name, the second is ``Zeros.name``.

    Args:
        statistics: at least one, all of one width.

    >>> from torchprobe.statistics import Moments, TopInputs
    >>> several = Several([Moments(3), TopInputs(3, k=2)])
    >>> several.update(torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]))
    >>> several["Moments"].vectors, several[TopInputs].ids[:, 0].tolist()
    (2, [1, 0, 0])
    """

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        if not statistics:
            raise ValueError("statistic= is an empty list; leave it out to record Moments")
        widths = {statistic.features for statistic in statistics}
        if len(widths) > 1:
            raise ValueError(f"the statistics of one layer have one width, got {sorted(widths)}")
        self.features = widths.pop()
        self.statistics = tuple(statistics)
        self.labels = _labels([type(statistic).__name__ for statistic in statistics])
        self._names: list[dict[str, str]] = []  # for each statistic: its own field → the name here
        self.fields = fields = dict[str, str]()
        for label, statistic in zip(self.labels, statistics, strict=True):
            names = {field: f"{label}.{field}" if field in fields else field for field in statistic.fields}
            self._names.append(names)
            fields.update({names[field]: text for field, text in statistic.fields.items()})
        shown = [
            names[field]
            for statistic, names in zip(statistics, self._names, strict=True)
            for field in (statistic.fields if statistic.table_fields is None else statistic.table_fields)
        ]
        self.table_fields = tuple(shown)
        self.headline = statistics[0].headline
        self._histogram = next((index for index, statistic in enumerate(statistics) if statistic.bins), None)
        self.bins = 0 if self._histogram is None else statistics[self._histogram].bins

    # -- a sequence ----------------------------------------------------------------------------------------------------

    def __getitem__(self, which: int | str | type[Statistic]) -> Any:
        if isinstance(which, int):
            return self.statistics[which]
        for label, statistic in zip(self.labels, self.statistics, strict=True):
            if which in (label, type(statistic)):
                return statistic
        name = which if isinstance(which, str) else which.__name__
        raise KeyError(f"no statistic {name!r} was recorded; there are {', '.join(self.labels)}")

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    # -- the contract of a statistic -----------------------------------------------------------------------------------

    def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
        for statistic in self.statistics:
            statistic.update(x, feature_dim, mask=mask)

    def merge(self, other: Several) -> Several:
        self.check_mergeable(other)
        for mine, theirs in zip(self.statistics, other.statistics, strict=True):
            mine.merge(theirs)
        return self

    def check_mergeable(self, other: Statistic) -> None:
        if not isinstance(other, Several) or other.labels != self.labels:
            theirs = list(other.labels) if isinstance(other, Several) else type(other).__name__
            raise TypeError(f"cannot merge {list(self.labels)} with {theirs}")
        for mine, one in zip(self.statistics, other.statistics, strict=True):
            mine.check_mergeable(one)

    def setup(self) -> dict[str, Any]:
        own = {f"{label}.{key}": value for label, one in self._labeled() for key, value in one.setup().items() if key != "features"}
        return {"features": self.features, **own}

    def state_dict(self) -> dict[str, Any]:
        return {f"{label}.{key}": value for label, statistic in self._labeled() for key, value in statistic.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        states = _split(state, self.labels)
        before = self.state_dict()
        try:
            for label, statistic in self._labeled():
                statistic.load_state_dict(states[label])
        except ValueError:
            for label, part in _split(before, self.labels).items():
                self[label].load_state_dict(part)
            raise

    @classmethod
    def from_states(cls, kinds: Sequence[type[Statistic]], state: Mapping[str, Any], device: torch.device | str = "cpu") -> Several:
        """New statistics of these classes that hold what :meth:`state_dict` returned.

        Raises:
            ValueError: the state is of other statistics, incomplete or damaged.
        """
        labels = _labels([kind.__name__ for kind in kinds])
        states = _split(state, labels)
        return cls([kind.from_state(states[label], device) for kind, label in zip(kinds, labels, strict=True)])

    def problem(self) -> tuple[str, str] | None:
        found = ((label, statistic.problem()) for label, statistic in self._labeled())
        return next(((f"{label}.{problem[0]}", problem[1]) for label, problem in found if problem), None)

    # -- what recorders use --------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {f"{label}.{name}": tensor for label, statistic in self._labeled() for name, tensor in statistic.tensors().items()}

    @property
    def device(self) -> torch.device:
        return self.statistics[0].device

    def alike(self) -> tuple[Any, ...]:
        return tuple(statistic.alike() for statistic in self.statistics)

    def anything(self) -> Tensor:
        return torch.stack([statistic.anything().to(self.device) for statistic in self.statistics]).any()

    def add_window(self, window: Several) -> Several:
        for mine, theirs in zip(self.statistics, window.statistics, strict=True):
            mine.add_window(theirs)
        return self

    def bin_edges(self) -> Tensor:
        return self.statistics[self._histogram or 0].bin_edges()

    @classmethod
    def summaries(cls, statistics: Sequence[Several], histograms: bool = False) -> Tensor:
        first = statistics[0]
        fields, bins = [], []
        for index, one in enumerate(first.statistics):
            wanted = histograms and index == first._histogram
            numbers = type(one).summaries([several.statistics[index] for several in statistics], wanted).to(first.device)
            fields.append(numbers[:, : len(one.fields)])
            if wanted:
                bins.append(numbers[:, len(one.fields) :])
        return torch.cat([*fields, *bins], -1)

    @classmethod
    def close_windows(cls, windows: Sequence[Several], closed: Sequence[Several | None]) -> list[Several]:
        columns = [
            type(one).close_windows(
                [window.statistics[index] for window in windows],
                [None if before is None else before.statistics[index] for before in closed],
            )
            for index, one in enumerate(windows[0].statistics)
        ]
        return [cls(row) for row in zip(*columns, strict=True)]

    @classmethod
    def reset_all(cls, statistics: Sequence[Several]) -> None:
        for row in zip(*statistics, strict=True):
            type(row[0]).reset_all(row)

    def _labeled(self) -> Iterator[tuple[str, Statistic]]:
        return zip(self.labels, self.statistics, strict=True)

    def __repr__(self) -> str:
        return f"Several({', '.join(map(repr, self.statistics))})"


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    again = [names[:index].count(name) for index, name in enumerate(names)]
    return tuple(f"{name}_{count + 1}" if count else name for name, count in zip(names, again, strict=True))


def _split(state: Mapping[str, Any], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for key, value in state.items():
        label, _, name = key.partition(".")
        if label not in parts:
            raise ValueError(f"the saved state has {key!r}, which belongs to none of {', '.join(labels)}")
        parts[label][name] = value
    return parts
