"""Parts of messages: the first of many names, what was probably meant, the reason of an error, the command that installs an extra."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

DISTRIBUTION = "torchprobe-interp"
"""The name of the distribution, which every hint to install something uses. On the public index, ``torchprobe`` is another project.

``pyproject.toml`` has the same name; ``tests/test_packaging.py`` compares them.
"""


def listing(names: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """The first of many names.

    >>> listing(["a", "b", "c", "d"], most=2)
    'a, b … and 2 more'
    """
    return between.join(names[:most]) + (f" … and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names that are similar to an unknown one, as the end of a message; empty if there are none.

    >>> did_you_mean("supervsed", ["zero-shot", "supervised"])
    '; did you mean supervised?'
    """
    similar = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def reason(error: BaseException) -> str:
    r"""The type and the first line of an error, at most 500 characters.

    >>> reason(ValueError("not a picture\nat byte 0"))
    'ValueError: not a picture'
    """
    line = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return line if len(line) <= 500 else line[:499] + "…"


def counted(n: int, noun: str) -> str:
    """A number with its noun, in the singular or the plural.

    >>> counted(1, "image"), counted(1200, "image")
    ('1 image', '1,200 images')
    """
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def install_hint(extra: str) -> str:
    """The command that installs an extra.

    >>> install_hint("report")
    "pip install 'torchprobe-interp[report]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


_PACKAGE = str(Path(__file__).parents[1])


def users_level() -> int:
    """The ``stacklevel`` at which a warning points at the line of the user, however many calls of this package are in between.

    >>> users_level()
    1
    """
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return max(level, 1)


def stable_repr(thing: object) -> str:
    """Its repr without addresses in memory, which differ from run to run.

    >>> stable_repr(object())
    '<object object>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))
