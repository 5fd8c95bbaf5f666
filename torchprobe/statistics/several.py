"""Several statistics of one layer as one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchprobe.statistics.saved import DamagedState, check_mapping
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import MOST_METRICS, metric_names, number_dtype


class Several(Statistic):
    """Statistics that read the same activations; ``torchprobe.record(model, statistic=[Moments, Zeros])`` makes one for every layer.

    ``several["Zeros"]``, ``several[Zeros]`` and ``several[1]`` return one of them; iterating returns all, in the order of the list. Of two
    with the same name, the second is called ``Zeros_2``. Of two fields with the same name, the second is called ``Zeros.name``.

    Args:
        statistics: at least one, all of the same width.

    Raises:
        ValueError: there is none, or they differ in width.

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
            raise ValueError(f"the statistics of one layer must have the same width, got {sorted(widths)}")
        self.features = widths.pop()
        self.statistics = tuple(statistics)
        self.labels = _labels([type(statistic).__name__ for statistic in statistics])
        self.capturable = all(statistic.capturable for statistic in statistics)
        fields, shown, metrics = dict[str, str](), list[str](), list[list[str]]()
        for label, statistic in self._labeled():
            names = {field: f"{label}.{field}" if field in fields else field for field in statistic.fields}
            fields.update({names[field]: text for field, text in statistic.fields.items()})
            shown += [names[field] for field in (statistic.fields if statistic.table_fields is None else statistic.table_fields)]
            metrics.append([names[field] for field in metric_names(statistic)])
        self.fields, self.table_fields, self.metric_fields = fields, tuple(shown), _shared(metrics)
        self.headline = statistics[0].headline
        self._with_histogram = next((index for index, statistic in enumerate(statistics) if statistic.histogram_bins), 0)
        self.histogram_bins = statistics[self._with_histogram].histogram_bins

    arguments = ()

    # -- a sequence ----------------------------------------------------------------------------------------------------

    def __getitem__(self, which: int | str | type[Statistic]) -> Any:
        if isinstance(which, int):
            return self.statistics[which]
        for label, statistic in self._labeled():
            if which in (label, type(statistic)):
                return statistic
        name = which if isinstance(which, str) else which.__name__
        raise KeyError(f"no statistic {name!r} was recorded; there are {', '.join(self.labels)}")

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def _labeled(self) -> Iterator[tuple[str, Statistic]]:
        return zip(self.labels, self.statistics, strict=True)

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
        for label, statistic in self._labeled():  # all are tried before one is changed
            with _under(label):
                statistic.clone().load_state_dict(states[label])
        for label, statistic in self._labeled():
            statistic.load_state_dict(states[label])

    def clone(self) -> Several:
        return type(self)([statistic.clone() for statistic in self.statistics])

    def contents(self) -> dict[str, Tensor]:
        return {f"{label}.{name}": tensor for label, statistic in self._labeled() for name, tensor in statistic.contents().items()}

    @classmethod
    def from_states(cls, kinds: Sequence[type[Statistic]], state: Mapping[str, Any], device: torch.device | str = "cpu") -> Several:
        """New statistics of these classes that hold what :meth:`state_dict` returned.

        Raises:
            ValueError: the state belongs to other statistics, or is incomplete or damaged.
        """
        labels = _labels([kind.__name__ for kind in kinds])
        states = _split(state, labels)
        found = list[Statistic]()
        for kind, label in zip(kinds, labels, strict=True):
            with _under(label):
                found.append(kind.from_state(states[label], device))
        return cls(found)

    def problem(self) -> tuple[str, str] | None:
        found = ((label, statistic.problem()) for label, statistic in self._labeled())
        return next(((f"{label}.{problem[0]}", problem[1]) for label, problem in found if problem), None)

    # -- what recorders use --------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {f"{label}.{name}": tensor for label, statistic in self._labeled() for name, tensor in statistic.tensors().items()}

    @property
    def device(self) -> torch.device:
        return self.statistics[0].device

    def group_key(self) -> tuple[Any, ...]:
        return tuple(statistic.group_key() for statistic in self.statistics)

    def saw_anything(self) -> Tensor:
        return torch.stack([statistic.saw_anything().to(self.device) for statistic in self.statistics]).any()

    def add_window(self, window: Several) -> Several:
        for mine, theirs in zip(self.statistics, window.statistics, strict=True):
            mine.add_window(theirs)
        return self

    def histogram_edges(self) -> Tensor:
        return self.statistics[self._with_histogram].histogram_edges()

    @classmethod
    def summaries(cls, statistics: Sequence[Several], histograms: bool = False) -> Tensor:
        first = statistics[0]
        fields, bins = [], []
        for index, one in enumerate(first.statistics):
            with_bins = histograms and index == first._with_histogram
            numbers = type(one).summaries([several.statistics[index] for several in statistics], with_bins)
            numbers = numbers.to(first.device, number_dtype(first.device))
            fields.append(numbers[:, : len(one.fields)])
            bins.append(numbers[:, len(one.fields) :])
        return torch.cat([*fields, *bins], -1)

    @classmethod
    def take_windows(cls, windows: Sequence[Several], into: list[Several]) -> None:
        columns: list[list[Statistic]] = [[] for _ in windows[0].statistics]
        try:
            for index, column in enumerate(columns):
                mine = [window.statistics[index] for window in windows]
                type(mine[0]).take_windows(mine, column)
        except BaseException:
            for index, column in enumerate(columns):
                for window, taken in zip(windows, column, strict=False):
                    window.statistics[index].restore_window(taken)
            raise
        into += [cls(row) for row in zip(*columns, strict=True)]

    def restore_window(self, taken: Several) -> None:
        for mine, one in zip(self.statistics, taken.statistics, strict=True):
            mine.restore_window(one)

    @classmethod
    def join_windows(cls, taken: Sequence[Several], closed: Sequence[Several | None]) -> list[Several]:
        columns = [
            type(one).join_windows(
                [window.statistics[index] for window in taken],
                [None if before is None else before.statistics[index] for before in closed],
            )
            for index, one in enumerate(taken[0].statistics)
        ]
        return [cls(row) for row in zip(*columns, strict=True)]

    @classmethod
    def reset_all(cls, statistics: Sequence[Several]) -> None:
        for row in zip(*statistics, strict=True):
            type(row[0]).reset_all(row)

    def __repr__(self) -> str:
        return f"Several({', '.join(map(repr, self.statistics))})"


@contextlib.contextmanager
def _under(label: str) -> Iterator[None]:
    """Damage in the block is told under the name that the part has here."""
    try:
        yield
    except DamagedState as error:
        raise DamagedState(label, f"{label}.{error.part}", error.what) from error


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with numbers that tell equal ones apart."""
    labels: list[str] = []
    for name in names:
        label, number = name, 1
        while label in labels:
            number += 1
            label = f"{name}_{number}"
        labels.append(label)
    return tuple(labels)


def _shared(metrics: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """At most :data:`MOST_METRICS` names in all, from each list about as many: first those at the head of each."""
    turns = [name for turn in itertools.zip_longest(*metrics) for name in turn if name is not None]
    return tuple(name for names in metrics for name in names if name in turns[:MOST_METRICS])


def _split(state: Mapping[str, Any], labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The parts of a state_dict by their labels."""
    check_mapping(", ".join(labels), state)
    parts: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for key, value in state.items():
        label, _, name = key.partition(".")
        if label not in parts:
            raise ValueError(f"the saved state has {key!r}, which belongs to none of {', '.join(labels)}")
        parts[label][name] = value
    return parts
