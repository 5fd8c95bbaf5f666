"""Concepts that are words: a file of your own, or a built-in list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from torchprobe.common.messages import counted, listing
from torchprobe.common.reading import read_text
from torchprobe.datasets.images import DatasetError

MOST_CONCEPTS = 100_000
LONGEST = 200
"""Limits of a file: concepts, and characters of a concept."""

NOUN = ("a photo of a {}.", "a photo of {}.", "a close-up photo of a {}.", "a photo with a {} in it.", "{}")
"""Captions of a thing. No article fits every word; their mean does."""

PROPERTY = ("a photo of something {}.", "a {} thing.", "a photo of a {} surface.", "a {} object in a photo.", "{}")
"""Captions of an adjective, a color or a texture."""

ACTION = ("a photo of someone {}.", "a photo of people {}.", "a photo of an animal {}.", "{}")
PLACE = ("a photo of a {}.", "a photo taken in a {}.", "a photo of the {}.", "{}")
MATERIAL = ("a photo of {}.", "a thing made of {}.", "a surface of {}.", "{}")
PICTURE = ("a {}.", "this is a {}.", "{}")

TEMPLATES = {
    "adjective": PROPERTY,
    "color": PROPERTY,
    "texture": PROPERTY,
    "action": ACTION,
    "material": MATERIAL,
    "nature": PLACE,
    "room": PLACE,
    "kind of picture": PICTURE,
}
"""Kind → its captions; :data:`NOUN` for all other kinds."""


@dataclass(frozen=True)
class Concepts:
    """Words or short descriptions.

    Args:
        names: distinct.
        kinds: one for each name, such as "animal"; "" if unknown.
        remarks: what was left out when they were read.
        source: a file, "built-in" or "given".

    Raises:
        ValueError: there are none; two are the same; or the numbers of names and kinds differ.

    >>> Concepts(["cat", "red"]).kinds
    ('', '')
    """

    names: Sequence[str]
    kinds: Sequence[str] = ()
    remarks: Sequence[str] = field(default=(), compare=False)
    source: str = field(default="given", compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise ValueError(f"expected a list of concepts, got one string: [{self.names!r}]?")
        names = tuple(str(name) for name in self.names)
        kinds = tuple(self.kinds) or ("",) * len(names)
        if not names:
            raise ValueError("there are no concepts")
        if len(kinds) != len(names):
            raise ValueError(f"expected a kind for each concept, got {len(kinds)} kinds and {len(names)} concepts")
        seen: set[str] = set()
        for name in names:
            if not name.strip():
                raise ValueError("a concept is empty")
            if name in seen:
                raise ValueError(f"the concept {name!r} is listed twice")
            seen.add(name)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "kinds", kinds)

    def __len__(self) -> int:
        return len(self.names)

    def of_kinds(self, kinds: Sequence[str]) -> Concepts:
        """Only the concepts of these kinds.

        Raises:
            ValueError: a kind has no concepts.
        """
        if unknown := [kind for kind in kinds if kind not in self.kinds]:
            raise ValueError(f"there are no concepts of the kind {unknown[0]!r}; there are {listing(sorted(set(self.kinds)), 20)}")
        kept = [(name, kind) for name, kind in zip(self.names, self.kinds, strict=True) if kind in kinds]
        return Concepts([name for name, _ in kept], [kind for _, kind in kept], self.remarks, self.source)


def read_concepts(path: str | os.PathLike[str]) -> Concepts:
    """The concepts in a text file, one a line. Blank lines, and lines that begin with ``#``, are ignored. A line ``[kind]`` begins a kind.

    Concepts that differ only in case or spaces are the same: the first one is kept, and a remark names the others.

    Raises:
        DatasetError: the file cannot be read, is not UTF-8, has no concepts, or is larger than the limits of this module.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "concepts.txt")
    >>> _ = file.write_text("# mine\\n[animal]\\ncat\\nCat\\n\\n[color]\\nred\\n")
    >>> found = read_concepts(file)
    >>> found.names, found.kinds, found.remarks
    (('cat', 'red'), ('animal', 'color'), ('1 duplicate left out: Cat',))
    """
    path = Path(path)
    try:
        text = read_text(path, "text_bytes", "utf-8-sig")
    except OSError as error:
        raise DatasetError(f"the concepts cannot be read: {error}") from error
    except ValueError as error:
        raise DatasetError(f"{error}: save the list as UTF-8, one concept a line") from error
    return _parse(text, str(path))


def builtin_concepts() -> Concepts:
    """About 1,000 common nouns, adjectives, textures, colors and actions, by kind.

    >>> concepts = builtin_concepts()
    >>> concepts.kinds[concepts.names.index("striped")]
    'texture'
    """
    return _parse(resources.files(__package__).joinpath("concepts.txt").read_text(encoding="utf-8"), "built-in")


def find_concepts(concepts: Concepts | Sequence[str] | str | os.PathLike[str] | None) -> Concepts:
    """What the argument ``concepts`` stands for: a file, a list, or None for the built-in list."""
    if concepts is None:
        return builtin_concepts()
    if isinstance(concepts, Concepts):
        return concepts
    if isinstance(concepts, (str, os.PathLike)):
        return read_concepts(concepts)
    return Concepts(concepts)


def _parse(text: str, source: str) -> Concepts:
    found: dict[str, tuple[str, str]] = {}  # as compared → concept and kind
    duplicates: list[str] = []
    kind = ""
    for number, line in enumerate(text.splitlines(), 1):
        concept = " ".join(line.split())
        if not concept or concept.startswith("#"):
            continue
        if len(concept) > LONGEST or not concept.isprintable():
            what = "has characters that cannot be printed" if len(concept) <= LONGEST else f"is longer than {LONGEST} characters"
            raise DatasetError(f"{source}, line {number} {what}: expected one concept a line")
        if concept.startswith("[") and concept.endswith("]"):
            kind = concept[1:-1].strip()
        elif concept.casefold() in found:
            duplicates.append(concept)
        else:
            found[concept.casefold()] = concept, kind
            if len(found) > MOST_CONCEPTS:
                raise DatasetError(f"{source} has more than {MOST_CONCEPTS:,} concepts: split it")
    if not found:
        raise DatasetError(f"{source} has no concepts: expected one a line")
    remarks = [f"{counted(len(duplicates), 'duplicate')} left out: {listing(duplicates)}"] if duplicates else []
    names, kinds = zip(*found.values(), strict=True)
    return Concepts(names, kinds, tuple(remarks), source)
