"""A long run in stages: each writes what it found, and a resumed run reads it instead of computing it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchprobe.common.files import replacing, to_json

Plain = dict[str, Any]
"""What JSON can hold: numbers (nan and inf as None), text, lists, dicts."""


class Stages:
    """The stages of one run in ``folder/stages``, one JSON file each.

    Args:
        folder: of the run.
        resume: read what an earlier run left; otherwise every stage is computed.

    A stage is used again only if it was made from the same facts; those of the stages it builds on belong among them.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Stages(folder).run("sum", {"of": [1, 2]}, lambda: {"sum": 3})
    {'sum': 3}
    >>> Stages(folder, resume=True).run("sum", {"of": [1, 2]}, lambda: {"sum": "not computed again"})
    {'sum': 3}
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.folder = folder / "stages"
        self.resume = resume

    def run(self, name: str, facts: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Plain:
        """What the stage found: read where it was found from the same facts, else computed and written."""
        if (before := self.known(name, facts)) is not None:
            return before
        found: Plain = json.loads(to_json(compute()))  # through JSON, so that a fresh and a resumed run see the same
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(name)) as temporary:
            temporary.write_text(to_json({"facts": facts, "found": found}), encoding="utf-8")
        return found

    def known(self, name: str, facts: Mapping[str, Any]) -> Plain | None:
        """What the stage found from the same facts in a run that is resumed; None if there is nothing of use."""
        saved = _read(self._path(name)) if self.resume else None
        return dict(saved["found"]) if saved is not None and saved["facts"] == json.loads(to_json(facts)) else None

    def forget(self, name: str) -> None:
        """Deletes what the stage found."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _read(path: Path) -> Plain | None:
    """What a stage wrote, or None where there is nothing of use."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) and saved.keys() == {"facts", "found"} and isinstance(saved["found"], dict) else None
