"""The images and categories that the JSON files of COCO list."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers.coco_masks import Mask
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import different, identifier, label_name, report_renamed
from torchprobe.datasets.pictures import size_problem


class CocoImage(NamedTuple):
    """``size``: (height, width) in the file; None: not given. ``partial``: only annotated for some labels."""

    id: Hashable
    file_name: Any
    size: tuple[int, int] | None
    partial: bool


def read_image(value: Mapping[str, Any]) -> CocoImage:
    """An element of ``images``. Without ``file_name``, it is the end of ``coco_url``.

    Raises:
        Unusable: no id, or an impossible size.
    """
    name, url = value.get("file_name"), value.get("coco_url")
    if name is None and isinstance(url, str):
        name = "/".join(url.split("/")[-2:])  # LVIS: images of two folders, train2017/ and val2017/
    key = identifier(value.get("id"), "id")
    height, width = value.get("height"), value.get("width")
    size = None
    if height is not None and width is not None:
        if type(height) is not int or type(width) is not int or size_problem(height, width):
            raise Unusable("an impossible height or width", f"{name}: {height!r:.20} × {width!r:.20}")
        size = height, width
    return CocoImage(key, name, size, "neg_category_ids" in value or "not_exhaustive_category_ids" in value)


class Categories:
    """The categories of a file. ``labels``: their names, in the order of the file; label n is ``labels[n - 1]``.

    >>> categories = Categories({18: "dog", 3: "car"}, {18: "animal", 3: "vehicle"})
    >>> categories.number(3)
    2
    """

    def __init__(self, names: Mapping[Hashable, str], above: Mapping[Hashable, str]) -> None:
        self.names, self.above = names, above
        self.renamed = different(names)
        self.labels = list(self.renamed.values())
        self._numbers = {key: number for number, key in enumerate(names, 1)}
        self._groups: dict[str, list[int]] = {}

    def number(self, key: Any) -> int:
        """The label of a category id.

        Raises:
            Unusable: there is no such category.
        """
        try:
            return self._numbers[identifier(key, "category_id")]
        except (KeyError, Unusable):
            raise Unusable("a category that the file does not list", f"category_id {key!r:.50}") from None

    def supercategories(self, report: ImportReport) -> list[str]:
        """The names of the supercategories. One that has the name of a label, and holds more than it, gets the end "(all)"; one that holds
        nothing else is left out."""
        members: dict[str, list[Hashable]] = {}
        for key, name in self.above.items():
            members.setdefault(name, []).append(key)
        self._groups = {}
        for name, keys in members.items():
            if [self.names[key] for key in keys] == [name]:
                report.drop("supercategories", "the same as its only category", name)
                continue
            self._groups[f"{name} (all)" if name in self.labels else name] = [self._numbers[key] for key in keys]
        if not self._groups:
            raise DatasetError("the file has no supercategories")
        return list(self._groups)

    def united(self, masks: Mapping[int, Mask]) -> dict[int, Mask]:
        """The masks of the supercategories, from those of the labels."""
        result: dict[int, Mask] = {}
        for number, members in enumerate(self._groups.values(), 1):
            for member in members:
                if member in masks:
                    result[number] = result[number] | masks[member] if number in result else masks[member]
        return result


def read_categories(values: Sequence[Any], where: str) -> Categories:
    """The elements of ``categories``; the same element twice is one.

    Raises:
        DatasetError: one has no id or no name, or two differ but share an id.
    """
    names: dict[Hashable, str] = {}
    above: dict[Hashable, str] = {}
    for value in values:
        if not isinstance(value, Mapping):
            raise DatasetError(f"{where}: {value!r:.100} is no category")
        try:
            key = identifier(value.get("id"), "id")
        except Unusable as error:
            raise DatasetError(f"{where}: a category has {error}") from None
        name = label_name(value.get("name"), f"{where}, category {key}")
        if names.setdefault(key, name) != name:
            raise DatasetError(f"{where}: category {key} is both {names[key]!r} and {name!r}")
        if value.get("supercategory"):
            above[key] = label_name(value["supercategory"], f"{where}, supercategory of {key}")
    return Categories(names, above)


def report_names(categories: Categories, report: ImportReport) -> None:
    """Says which labels got another name."""
    report_renamed(report, categories.names, categories.renamed)
