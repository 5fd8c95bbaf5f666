"""Files of other data sets that belong together: an image, and its masks, by name."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from torchprobe.datasets.broden.image_files import locate, unsafe
from torchprobe.datasets.images import DatasetError, image_files
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.pictures import FileError


def inside(folder: Path, name: object, what: str) -> tuple[str, Path]:
    """The cleaned name and the path of a file that another file names, such as ``file_name`` in JSON.

    ``what``: the kind of file, for messages. Backslashes become /, since files written on Windows have them.

    Raises:
        Unusable: it is no name, or it leaves the folder, also by a link.
    """
    if not isinstance(name, str) or not name:
        raise Unusable(f"no file name of the {what}")
    clean = name.replace("\\", "/").removeprefix("./")
    try:
        clean.encode()
        if unsafe(clean):
            raise FileError("not a relative path")
        return clean, Path(locate(str(folder), clean))
    except (FileError, UnicodeEncodeError):
        raise Unusable(f"the name of the {what} leaves the folder, or is no relative path", repr(name)[:100]) from None


def by_stem(folder: Path, what: str, report: ImportReport, suffix: str = "") -> dict[str, Path]:
    """The image files in a folder and its subfolders, by their path without ``suffix`` and without the ending of the file.

    Files that do not end in ``suffix`` are left out. Links that leave the folder, and files that differ in nothing but their ending, are
    reported as dropped; ``what`` names the kind of file, in the plural.

    Raises:
        DatasetError: it is not a folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "a_mask.png").touch()
    >>> list(by_stem(folder, "masks", ImportReport("masks", folder), "_mask"))
    ['a']
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected a folder with {what}")
    found: dict[str, list[Path]] = {}
    root = folder.resolve()
    for path in image_files(folder)[0]:
        name = path.relative_to(folder).as_posix()
        stem = posixpath.splitext(name)[0]
        if not stem.endswith(suffix):
            continue
        if path.resolve().is_relative_to(root):
            found.setdefault(stem.removesuffix(suffix), []).append(path)
        else:
            report.drop(what, "a link that leaves the folder", name)
    for paths in found.values():
        if len(paths) > 1:
            names = " and ".join(path.relative_to(folder).as_posix() for path in paths)
            report.drop(what, "names that differ only in their ending; which is meant is unknown", names, len(paths))
    return {stem: paths[0] for stem, paths in found.items() if len(paths) == 1}


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name, without hidden ones.

    Raises:
        DatasetError: it is not a folder.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected a folder")
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
