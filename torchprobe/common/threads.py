"""The order of threads: one lock for everything in Python that changes or reads what they may share."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

lock = threading.RLock()
"""Held by whoever changes or reads a statistic, a recorder or a history in Python. Under one lock no two threads can wait for each other,
in whatever order they merge; and a statistic may update another one. What a native kernel changes is ordered by locks of its own, inside
of operators: see :mod:`torchprobe.ops.states`. Nobody waits for another process or for a disk under this lock."""

if hasattr(os, "register_at_fork"):  # a process that forks waits until no other thread is inside, so the child finds everything whole
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def ordered(function: Function) -> Function:
    """Runs a function under :data:`lock`.

    >>> ordered(len)([1, 2])
    2
    """
    if is_ordered(function):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return function(*args, **kwargs)

    call.ordered = True  # type: ignore[attr-defined]
    return cast(Function, call)


def is_ordered(function: object) -> bool:
    """Whether a function runs under :data:`lock` already."""
    return getattr(function, "ordered", False) is True
