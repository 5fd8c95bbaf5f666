"""States that were saved, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchprobe.common.numbers import shown
from torchprobe.ops.memory import MOST_CALLS, check_memory

Kind = TypeVar("Kind")


class DamagedState(ValueError):
    """A part of a saved state holds what no run leaves there."""

    def __init__(self, name: str, part: str, what: str) -> None:
        super().__init__(f"{part} in the saved state of {name} {what}")
        self.part, self.what = part, what


def check_mapping(name: str, state: Any) -> None:
    """Raises ``ValueError`` unless a saved state is a mapping with text as keys."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        what = f"keys such as {shown(next(key for key in state if not isinstance(key, str)))}" if isinstance(state, Mapping) else "no keys"
        raise ValueError(f"the saved state of {name} is a {type(state).__name__} with {what}; expected what state_dict() returned")


def check_keys(name: str, state: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ``ValueError`` unless a saved state has just the expected keys."""
    found, wanted = set(state), set(expected)
    if found != wanted:
        raise ValueError(f"the saved state of {name} lacks {sorted(wanted - found)} and has unknown {sorted(found - wanted)[:8]}")


def same(found: Any, expected: Any) -> bool:
    """Whether two plain values are equal and of one kind: a tensor or an array equals nothing, and 1 is not True.

    >>> same(6, 6.0), same(True, 1), same(torch.ones(2), 1.0)
    (True, False, False)
    """
    if isinstance(expected, tuple):
        return isinstance(found, tuple) and len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, bool) or isinstance(found, bool):
        return found is expected
    if isinstance(expected, (int, float)):
        return isinstance(found, (int, float)) and found == expected
    return type(found) is type(expected) and bool(found == expected)


def fits(found: Any, part: Tensor) -> bool:
    """Whether a saved value can be copied to a part of a state: numbers of its shape and kind."""
    shaped = isinstance(found, Tensor) and tuple(found.shape) == tuple(part.shape)
    return shaped and found.is_floating_point() == part.is_floating_point() and holds_numbers(found)


def holds_numbers(found: Any) -> bool:
    """Whether a saved value is a dense tensor of real numbers within its storage."""
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_nested or found.is_quantized or found.is_meta:
        return False
    if found.is_complex() or found.dtype == torch.bool:
        return False
    try:
        check_memory({}, {"": found}, copied=True)
    except ValueError:
        return False
    return True


def made(kind: type[Kind], features: int, device: torch.device | str, arguments: Mapping[str, Any]) -> Kind:
    """A new statistic with arguments from a saved state.

    Raises:
        ValueError: the constructor does not take them, or fails on them.
    """
    constructor: Any = kind
    try:
        new: Kind = constructor(features, device=device, **arguments)
    except (NotImplementedError, RuntimeError, MemoryError):  # of PyTorch: a "meta" tensor was read, or memory ran out
        raise
    except Exception as error:
        told = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
        raise ValueError(f"the saved state of {kind.__name__} has {told}, which its constructor refuses: {error}") from error
    return new


def count_problem(name: str, counts: Tensor, most: Tensor | float = MOST_CALLS) -> tuple[str, str] | None:
    """What is wrong with numbers that count something: each is a whole number from 0 to ``most``."""
    wrong = ~((counts >= 0) & (counts <= most) & (counts == counts.round()))
    if not bool(wrong.any()):
        return None
    return name, f"holds {float(counts[wrong][0]):g}, which is negative, nan, not whole, or more than there can be"
