"""Counts the cases that a property test tries, and the time they take."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

counts: dict[str, tuple[int, float]] = {}
"""Name of a test → cases, seconds."""


def tried(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator, below ``given``: every case is counted."""

    @functools.wraps(test)
    def counted(*args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        try:
            test(*args, **kwargs)
        finally:
            cases, seconds = counts.get(test.__name__, (0, 0.0))
            counts[test.__name__] = cases + 1, seconds + time.perf_counter() - begin

    return counted
