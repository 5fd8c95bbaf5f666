"""A standard model that a table lists twice counts once: it would pull the line twice as hard, and make its interval too narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def once(models: Sequence[str], accuracies: Mapping[str, NDArray[Any]]) -> tuple[tuple[str, ...], dict[str, NDArray[Any]]]:
    """The models and accuracies with one row for each model.

    Args:
        models: the name of each row.
        accuracies: columns, one value for each row, nan if unknown.

    Raises:
        ValueError: two rows of one name have different accuracies.

    >>> once(["a", "b", "a"], {"imagenet": np.array([60.0, 70.0, 60.0])})[0]
    ('a', 'b')
    """
    first: dict[str, int] = {}
    for row, name in enumerate(models):
        earlier = first.setdefault(name, row)
        if earlier == row:
            continue
        for column, values in accuracies.items():
            if not np.array_equal(values[earlier], values[row], equal_nan=True):
                raise ValueError(
                    f"{name!r} is listed twice, with {column} {values[earlier]:g} and {values[row]:g}: keep one, or name them apart"
                )
    kept = [*first.values()]
    return tuple(first), {name: values[kept] for name, values in accuracies.items()}
