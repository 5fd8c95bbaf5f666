"""What is said when there is no encoder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class EncoderError(RuntimeError):
    """An encoder, a head or a suite that cannot be made; the message says what was wrong, where, and what to do."""


def some(items: Sequence[str], most: int = 8) -> str:
    """The first few of many names."""
    return ", ".join(items[:most]) + (f" … and {len(items) - most} more" if len(items) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """What was probably meant, as the end of a message; empty where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def reason(error: BaseException) -> str:
    """The first line of an error, short."""
    line = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return line if len(line) <= 200 else line[:199] + "…"
