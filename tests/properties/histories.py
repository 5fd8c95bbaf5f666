"""What happens to statistics: an activation comes in parts, to several statistics, which are saved, copied and merged."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from properties.activations import Activation
from torchprobe.statistics import Statistic

S = TypeVar("S", bound=Statistic)


def _saved(statistic: Any) -> Any:
    file = io.BytesIO()
    torch.save(statistic.state_dict(), file)
    file.seek(0)
    return type(statistic).from_state(torch.load(file, weights_only=True))


def _loaded(statistic: Any) -> Any:
    other = copy.deepcopy(statistic)
    other.reset()
    other.load_state_dict(statistic.state_dict())
    return other


ROUND_TRIPS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda statistic: statistic,
    "pickle": lambda statistic: pickle.loads(pickle.dumps(statistic)),
    "deepcopy": copy.deepcopy,
    "clone": lambda statistic: statistic.clone(),
    "from_state": lambda statistic: type(statistic).from_state(statistic.state_dict()),
    "load_state_dict": _loaded,
    "save": _saved,
}

histories = st.fixed_dictionaries(
    {
        "statistics": st.sampled_from((1, 1, 2, 3, 4)),
        "parts": st.sampled_from((1, 2, 3, 6)),
        "trip": st.sampled_from(sorted(ROUND_TRIPS)),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def lived(
    new: Callable[[], S], a: Activation, history: dict[str, Any], update: Callable[[S, Tensor, Tensor | None, slice], None] | None = None
) -> S:
    """A statistic that has seen the activation by way of a history.

    The activation is cut along its first position, at random places; parts may be empty. Each part goes to one of several statistics. In
    between they make the round trip, sometimes. In the end they are merged as a random tree.
    """
    rng = np.random.default_rng(history["seed"])
    dim, feature_dim = first_position(a), a.feature_dim
    statistics, trip = [new() for _ in range(history["statistics"])], ROUND_TRIPS[history["trip"]]
    size = a.x.shape[dim] if dim is not None else 1
    cuts = [0, *sorted(rng.integers(0, size + 1, history["parts"] - 1).tolist()), size] if dim is not None else [0, 1]
    for begin, end in itertools.pairwise(cuts):
        which = int(rng.integers(len(statistics)))
        x = a.x if dim is None else a.x.narrow(dim, begin, end - begin)
        mask = a.mask if dim is None or a.mask is None else a.mask.narrow(0, begin, end - begin)
        if update is None:
            statistics[which].update(x, feature_dim, mask=mask)
        else:
            update(statistics[which], x, mask, slice(begin, end))
        if rng.random() < 0.5:
            statistics[which] = trip(statistics[which])
    while len(statistics) > 1:
        mine, other = (statistics.pop(int(rng.integers(len(statistics)))) for _ in range(2))
        before = other.state_dict()
        statistics.append(mine.merge(other))
        same(other.state_dict(), before)  # merging leaves it alone
    return trip(statistics[0])


def first_position(a: Activation) -> int | None:
    """The first dimension that is not that of the features."""
    return next((dim for dim in range(a.x.dim()) if dim != a.feature_dim % a.x.dim()), None)


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Holds two states against each other, bit by bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, Tensor):
            assert value.dtype == b[name].dtype and value.shape == b[name].shape, name
            assert torch.equal(value.contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8)), name
        else:
            assert value == b[name], name
