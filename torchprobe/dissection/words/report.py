"""The page of units and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_words_report(dissection: Any, path: Any, images: Any = None, **options: Any) -> Path:
    raise NotImplementedError
