"""One model with its inputs, built when asked for."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

BATCH = (2, 3, 2)
"""The batch sizes of the geometries. Other sizes of the inputs differ too, so that only the features keep theirs.

In the third geometry, if a case has it, sizes coincide: tokens or height and width are as many as features.
"""

ADVERSARIAL = 2


class CannotBuild(Exception):
    """A model that cannot be built or run here, with the reason."""


@dataclass
class Built:
    """A model and its inputs.

    ``inputs(batch)`` makes the same inputs each time, so models may change them in place.
    """

    model: nn.Module
    inputs: Callable[[int], Inputs]
    note: str = ""
    trains: bool = True  # whether it also runs in train mode with these inputs
    batched: bool = True  # whether `inputs` takes any batch size
    axes: dict[str, int] | None = None  # the feature dimension of each layer, if it is known by construction
    featureless: tuple[str, ...] = ()  # layers whose outputs are no features: as wide as the batch, or of changing widths


@dataclass(frozen=True)
class Case:
    """``build(geometry)`` makes the model for small inputs (0), for inputs of other sizes (1), or for sizes that coincide (2).

    Raises :class:`CannotBuild` with the reason.
    """

    library: str
    name: str
    make: Callable[[int], Built]

    def build(self, geometry: int = 0) -> Built:
        with quiet():
            seed_everything(0)
            try:
                return self.make(geometry)
            except CannotBuild:
                raise
            except Exception as error:
                raise CannotBuild(brief(error)) from error


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - models use it


def brief(error: BaseException) -> str:
    """One line about an error, without addresses, so that reasons can be counted."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other libraries warn about their own matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread once the time is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, over)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of a limit around this one
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.01) if left else 0)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def forget() -> None:
    """Frees the memory of the last model."""
    gc.collect()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randint(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
