"""The values a vector kurtosis is read against."""

from __future__ import annotations

import math


def gaussian_kurtosis(features: int) -> float:
    """Expected Pearson kurtosis (biased) of one vector of ``features`` independent Gaussian values: 3(d − 1)/(d + 1).

    >>> round(gaussian_kurtosis(768), 3)
    2.992
    """
    return 3 * (features - 1) / (features + 1)


def gaussian_kurtosis_std(features: int) -> float:
    """Standard deviation of that kurtosis from vector to vector; about √(24/d) (Fisher 1930).

    >>> round(gaussian_kurtosis_std(768), 3)
    0.175
    """
    d = features
    if d < 4:
        return math.nan  # two values always give 1, three always give 1.5
    return math.sqrt(24 * d * (d - 2) * (d - 3) / ((d + 1) ** 2 * (d + 3) * (d + 5)))


def kurtosis_ceiling(features: int) -> float:
    """The largest kurtosis ``features`` values can have, reached when all but one are equal: (d² − 3d + 3)/(d − 1).

    >>> kurtosis_ceiling(2)
    1.0
    """
    return (features**2 - 3 * features + 3) / (features - 1) if features > 1 else math.nan
