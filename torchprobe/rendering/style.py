"""The stylesheet of all figures: one file, ``paper.mplstyle``, for figures on a page, in a notebook and in a paper."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

STYLESHEET = Path(__file__).with_name("paper.mplstyle")
"""A stylesheet of matplotlib. For figures of your own: ``pyplot.style.use("torchprobe.rendering.paper")``."""

COLUMN, TEXT = 3.3, 6.75
"""Widths of a figure in a paper, in inches: of one column of two, and of the whole text."""


@functools.cache
def _settings() -> dict[Any, Any]:
    import matplotlib

    return {**matplotlib.rc_params_from_file(STYLESHEET, use_default_template=False)}


def styled(**more: Any) -> AbstractContextManager[None]:
    """A context in which figures are made and saved in the style of the library, whatever the settings of the user are.

    Args:
        more: further settings, with ``_`` in place of the dot: ``svg_hashsalt="a"``.

    >>> import matplotlib
    >>> with styled():
    ...     matplotlib.rcParams["pdf.fonttype"], matplotlib.rcParams["savefig.dpi"]
    (42, 300.0)
    """
    import matplotlib

    named: dict[Any, Any] = {key.replace("_", ".", 1): value for key, value in more.items()}
    return matplotlib.rc_context({**_settings(), **named})
