"""A :class:`Dissection` on disk: safetensors, which hold nothing but numbers and text. Everything is checked before it is believed."""

from __future__ import annotations

import os
from dataclasses import asdict

import torch
from torch import Tensor

from torchprobe.common import storage
from torchprobe.datasets.broden import Label
from torchprobe.dissection.average_precision import NEGATIVES, SIGNS, Support
from torchprobe.dissection.dissection import Dissection
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.ranking import Ranking

_KIND = "torchprobe.dissection"
_LABEL = {"number": int, "name": str, "category": str, "categories": list, "frequency": int, "coverage": (int, float), "synonyms": list}


def save(dissection: Dissection, path: str | os.PathLike[str]) -> None:
    """See :meth:`Dissection.save`."""
    tensors = {"category": dissection.category, "images": dissection.images}
    for name in ("thresholds", "average_precision", "p_values", "scores"):
        if (part := getattr(dissection, name)) is not None:
            tensors[name] = part
    for prefix, group in (("counts", dissection.counts), ("support", dissection.support)):
        if group is not None:
            tensors |= {f"{prefix}/{name}": part for name, part in group._asdict().items()}
    if dissection.top is not None:
        tensors["top/ids"], tensors["top/scores"] = dissection.top
    values = {
        "layer": dissection.layer,
        "units": dissection.units,
        "labels": [asdict(label) for label in dissection.labels],
        "categories": list(dissection.categories),
        "metadata": dissection.metadata,
    }
    if (ranking := dissection.ranking) is not None:
        tensors |= {f"ranking/{name}": getattr(ranking, name) for name in ("crow", "column", "annotated")}
        values["ranking"] = {"sign": ranking.sign, "negatives": ranking.negatives}
    storage.write(path, _KIND, tensors, values)


def load(path: str | os.PathLike[str]) -> Dissection:
    """See :meth:`Dissection.load`."""
    file = storage.File(path, _KIND)
    labels = tuple(_label(file, record) for record in file.value("labels", list))
    categories = tuple(file.value("categories", list))
    units, count = file.value("units", int), len(labels)
    if not all(isinstance(name, str) for name in categories) or units < 1:
        raise file.error("categories", "names are text, and there is at least one unit")
    category = file.tensor("category", torch.int64, (count,))
    images = file.tensor("images", torch.int64, (None,))
    if count and not 0 <= int(category.amin()) <= int(category.amax()) < len(categories):
        raise file.error("category", f"expected numbers from 0 to {len(categories) - 1}")
    dissection = Dissection(file.value("layer", str), labels, categories, category, units, images, metadata=file.value("metadata", dict))
    pairs = (units, count)
    dissection.thresholds = _maybe(file, "thresholds", torch.float32, (units,))
    dissection.average_precision = _maybe(file, "average_precision", torch.float64, pairs)
    dissection.p_values = _maybe(file, "p_values", torch.float64, pairs)
    dissection.scores = _maybe(file, "scores", torch.float32, (units, len(images)))
    for name in ("average_precision", "p_values"):
        part = getattr(dissection, name)
        if part is not None and bool(((part < 0) | (part > 1)).any()):
            raise file.error(name, "expected numbers from 0 to 1")
    if "counts/truth" in file.keys:
        shapes = {"intersection": pairs, "activation": pairs, "truth": (count,)}
        dissection.counts = Counts(*(_counts(file, f"counts/{name}", shape) for name, shape in shapes.items()))
    if dissection.average_precision is not None:
        if dissection.p_values is None:
            raise file.error("p_values", "missing")
        dissection.support = Support(*(_counts(file, f"support/{name}", (count,)) for name in Support._fields))
    if "top/ids" in file.keys:
        ids = file.tensor("top/ids", torch.int64, (units, None))
        dissection.top = ids, file.tensor("top/scores", torch.float32, (units, ids.shape[1]))
    if dissection.scores is not None:
        dissection.ranking = _ranking(file, category, len(categories), len(images))
    return dissection


def _label(file: storage.File, record: object) -> Label:
    if not isinstance(record, dict) or record.keys() != _LABEL.keys() or not all(isinstance(record[k], kind) for k, kind in _LABEL.items()):  # type: ignore[arg-type]
        raise file.error("labels", f"each label has {', '.join(_LABEL)}; got {str(record)[:200]}")
    for name in ("categories", "synonyms"):
        if not all(isinstance(text, str) for text in record[name]):
            raise file.error("labels", f"{name} are text; got {str(record[name])[:200]}")
    return Label(**{**record, "categories": tuple(record["categories"]), "synonyms": tuple(record["synonyms"])})


def _maybe(file: storage.File, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    return file.tensor(key, dtype, shape) if key in file.keys else None


def _counts(file: storage.File, key: str, shape: tuple[int, ...]) -> Tensor:
    counts = file.tensor(key, torch.int64, shape)
    if bool((counts < 0).any()):
        raise file.error(key, "holds negative counts")
    return counts


def _ranking(file: storage.File, category: Tensor, categories: int, images: int) -> Ranking:
    crow = _counts(file, "ranking/crow", (images + 1,))
    column = _counts(file, "ranking/column", (None,))  # type: ignore[arg-type]
    annotated = file.tensor("ranking/annotated", torch.bool, (images, None))
    rules = file.value("ranking", dict)
    sound = bool((crow.diff() >= 0).all()) and int(crow[0]) == 0 and int(crow[-1]) == len(column)
    if not sound or bool((column >= len(category)).any()) or annotated.shape[1] > categories:
        raise file.error("ranking/crow", "these are no rows of a matrix of images and labels")
    if rules.get("sign") not in SIGNS or rules.get("negatives") not in NEGATIVES:
        raise file.error("ranking", f"unknown sign or negatives: {str(rules)[:200]}")
    return Ranking(crow, column, annotated, category, rules["sign"], rules["negatives"])
