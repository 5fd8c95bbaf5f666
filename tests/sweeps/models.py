"""All cases, by library."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterator

from .case import Case, installed

LIBRARIES = {
    "odd": ("torch", "odd_models"),
    "own": ("torch", "own_models"),
    "timm": ("timm", "timm_models"),
    "torchvision": ("torchvision", "torchvision_models"),
    "transformers": ("transformers", "transformers_models"),
    "diffusers": ("diffusers", "diffusers_models"),
    "open_clip": ("open_clip", "open_clip_models"),
}
"""Library → the package it needs, and the file with its cases."""


def cases(library: str, pattern: str = "*") -> Iterator[Case]:
    """The cases of a library whose names match one of the shell patterns, which commas separate. Nothing is built yet."""
    _, file = LIBRARIES[library]
    for case in importlib.import_module(f".{file}", __package__).cases():
        if any(fnmatch.fnmatchcase(case.name, part) for part in pattern.split(",")):
            yield case


def missing(library: str) -> str:
    """The package that a library needs and that is not installed; empty if nothing is missing."""
    package, _ = LIBRARIES[library]
    return "" if installed(package) else package
