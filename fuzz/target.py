"""What is fuzzed: how to make a valid file, how to read it, and which errors its reader documents."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: on the command line.
        files: the files that are changed, relative to the folder → their structure, a name in :data:`fuzz.mutation.MUTATORS`.
        make: writes valid files into an empty folder.
        read: reads them, uses what it got, and returns something that :func:`fuzz.run.digest` can compare.
        errors: the exceptions that the reader documents. Subclasses count, except those of :data:`fuzz.run.NEVER`.
        guarded: the files with checksums. A changed one must give an error or the same result.
        restore: the reader writes to the folder, so that it must be made anew after each case.
        weight: cases for each case of a fast reader.
    """

    name: str
    files: Mapping[str, str]
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    errors: tuple[type[BaseException], ...]
    guarded: tuple[str, ...] = ()
    restore: bool = False
    weight: float = 1.0


def resealed(target: Target) -> Target:
    """The same reader of files whose checksums fit their changes, so that the checks behind the checksums are reached."""
    structures = {"safetensors": "resealed", "json": "resealed-json", "lines": "resealed-lines"}
    files = {name: structures[kind] for name, kind in target.files.items() if name in target.guarded and kind in structures}
    return replace(target, name=f"{target.name}-resealed", files=files, guarded=())


def has_checksums(path: Path) -> bool:
    """Whether a file names its checksums at all. Without, it is as an earlier version or another library wrote it, and is rightly read."""
    return b"checksums" in path.read_bytes()


def targets() -> dict[str, Target]:
    """All targets by name, in alphabetical order."""
    found: dict[str, Target] = {}
    package = importlib.import_module("fuzz.targets")
    for module in pkgutil.iter_modules(package.__path__):
        for target in importlib.import_module(f"fuzz.targets.{module.name}").TARGETS:
            if target.name in found:
                raise ValueError(f"two targets are called {target.name!r}")
            found[target.name] = target
    return dict(sorted(found.items()))
