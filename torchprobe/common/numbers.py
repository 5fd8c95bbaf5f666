"""Numbers that a caller gave, checked: an absurd one is an error that names its argument, whatever its type."""

from __future__ import annotations

from typing import Any


def whole(name: str, value: Any, least: int = 0, most: int = 1 << 53) -> int:
    """A whole number from ``least`` to ``most``, as ``int``; also from NumPy, from a tensor, or a float such as 3.0.

    Raises:
        ValueError: it is none.

    >>> whole("features", 3.0), whole("features", 10**400)
    Traceback (most recent call last):
    ValueError: features must be at most 9007199254740992, got 1000000000000000000000000000…
    """
    try:
        number = int(value) if not isinstance(value, (bool, str, bytes)) else None
        if number is None or number != value:
            number = None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # nan, inf, several numbers, a tensor without memory
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    if not least <= number <= most:
        raise ValueError(f"{name} must be at {f'least {least}' if number < least else f'most {most}'}, got {shown(value)}")
    return number


def real(name: str, value: Any) -> float:
    """A number as ``float``; it may be inf or nan.

    Raises:
        ValueError: it is none, or it is too large for a float.

    >>> real("low", -1)
    -1.0
    """
    try:
        if not isinstance(value, (bool, str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ValueError(f"{name} must be a number, got {shown(value)}")


def positive(name: str, value: Any) -> float:
    """A number above 0 as ``float``; it may be inf.

    Raises:
        ValueError: it is none.

    >>> positive("outlier_sigma", 6)
    6.0
    """
    try:
        number = real(name, value)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise ValueError(f"{name} must be positive, got {shown(value)}")
    return number


def shown(value: Any, most: int = 40) -> str:
    """The beginning of its repr, at most so many characters, for a message."""
    try:
        text = repr(value)
    except (ValueError, RuntimeError):  # Python refuses to write out a number of thousands of digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= most else text[: most - 12] + "…"
