"""A dissection as a safetensors file, and what such a file must hold to be believed."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchprobe.common import storage
from torchprobe.datasets.broden import Label
from torchprobe.dissection.activity import Level
from torchprobe.dissection.average_precision import NEGATIVES, SIGNS, Support
from torchprobe.dissection.iou_null import IoUNull
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.ranking import Ranking
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.sparse import read_density

_KIND = "torchprobe.dissection"
_LABEL: dict[str, type | tuple[type, ...]] = {
    "number": int,
    "name": str,
    "category": str,
    "categories": list,
    "frequency": int,
    "coverage": (int, float),
    "synonyms": list,
}

_MOST = 1 << 53
"""Counts are below it, so that float64 holds them exactly."""
_FARTHEST = 1 << 24
"""Edges of boxes are nearer than this, in pictures."""

Scores = TypeVar("Scores", bound=LayerScores)


def save_dissection(dissection: LayerScores, path: str | os.PathLike[str]) -> None:
    """See :meth:`Dissection.save`."""
    tensors = {"category": dissection.category, "images": dissection.images}
    for name in ("thresholds", "outside", "average_precision", "p_values", "scores"):
        if (part := getattr(dissection, name)) is not None:
            tensors[name] = part
    for prefix, group in (
        ("counts", dissection.counts),
        ("support", dissection.support),
        ("level", dissection.level),
        ("iou_null", dissection.iou_null),
    ):
        if group is not None:
            tensors |= {f"{prefix}/{name}": part for name, part in group._asdict().items()}
    if dissection.top is not None:
        tensors["top/ids"], tensors["top/scores"] = dissection.top
    if dissection.top_maps is not None:
        tensors["top/maps"], tensors["top/boxes"] = dissection.top_maps
    if dissection.density is not None:
        tensors |= dissection.density.tensors()
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


def load_dissection(path: str | os.PathLike[str], kind: type[Scores]) -> Scores:
    """Reads a file of :func:`save_dissection`. ``kind``: the class of the result."""
    file = storage.File(path, _KIND)
    labels = tuple(_label(file, record) for record in file.value("labels", list))
    categories = tuple(file.value("categories", list))
    units, count = file.value("units", int), len(labels)
    if not all(isinstance(name, str) for name in categories):
        raise file.error("categories", "names are text")
    if isinstance(units, bool) or not 1 <= units <= os.stat(path).st_size:  # every unit takes some bytes
        raise file.error("units", f"expected a number of units that a file of {os.stat(path).st_size} bytes can hold, got {units}")
    if len({label.number for label in labels}) < count:
        raise file.error("labels", "two have the same number")
    category = file.tensor("category", torch.int64, (count,))
    images = file.tensor("images", torch.int64, (None,))
    if images.numel() and (int(images.amin()) < 0 or len(images.unique()) < len(images)):
        raise file.error("images", "expected rows of a data set, each once")
    if count and not 0 <= int(category.amin()) <= int(category.amax()) < len(categories):
        raise file.error("category", f"expected numbers from 0 to {len(categories) - 1}")
    dissection = kind(file.value("layer", str), labels, categories, category, units, images, metadata=file.value("metadata", dict))
    pairs = (units, count)
    dissection.thresholds = _maybe(file, "thresholds", torch.float32, (units,))
    for name in ("average_precision", "p_values"):
        setattr(dissection, name, _shares(file, name, pairs) if name in file.keys else None)
    dissection.scores = _maybe(file, "scores", torch.float32, (units, len(images)))
    if "outside" in file.keys:
        dissection.outside = _counts(file, "outside", (count,))
    if "counts/truth" in file.keys:
        shapes = {"intersection": pairs, "activation": pairs, "truth": (count,)}
        dissection.counts = Counts(*(_counts(file, f"counts/{name}", shape) for name, shape in shapes.items()))
        _check_overlap(file, dissection.counts, dissection.metadata.get("mode"))
    if "level/values" in file.keys:
        above, equal = (_shares(file, f"level/{name}", (units,)) for name in ("above", "equal"))
        dissection.level = Level(_counts(file, "level/values", (units,)), above, equal)
    if "iou_null/chance" in file.keys:
        chance, p, adjusted = (_shares(file, f"iou_null/{name}", pairs) for name in ("chance", "p", "adjusted"))
        scale, largest = file.tensor("iou_null/scale", torch.float64, (count,)), file.tensor("iou_null/largest", torch.float64, (None,))
        if bool((scale < 0).any()) or not len(largest) or not bool((largest >= 0).all()):
            raise file.error("iou_null/largest", "scales and excesses are at least 0, and there is at least one permutation")
        dissection.iou_null = IoUNull(chance, p, adjusted, scale, largest)
    if dissection.average_precision is not None:
        if dissection.p_values is None:
            raise file.error("p_values", "missing")
        dissection.support = Support(*(_counts(file, f"support/{name}", (count,)) for name in Support._fields))
        if bool((dissection.support.positives > dissection.support.images).any()):
            raise file.error("support/positives", "more images show a label than were ranked")
    if "top/ids" in file.keys:
        ids = file.tensor("top/ids", torch.int64, (units, None))
        top_scores = file.tensor("top/scores", torch.float32, (units, ids.shape[1]))
        if not bool(torch.isin(ids[ids != -1], images).all()):
            raise file.error("top/ids", "holds images that were not read")
        if bool(top_scores.isnan().any()):
            raise file.error("top/scores", "holds nan")
        dissection.top = ids, top_scores
        if "top/maps" in file.keys:
            maps = file.tensor("top/maps", torch.float32, (*ids.shape, None, None))
            dissection.top_maps = maps, _boxes(file, (*ids.shape, 4))
    dissection.density = read_density(file, units)
    _check_metadata(file, dissection.metadata)
    if dissection.scores is not None:
        if bool(dissection.scores.isnan().any()):
            raise file.error("scores", "holds nan")
        dissection.ranking = _ranking(file, category, len(categories), len(images))
    return dissection


def _label(file: storage.File, record: object) -> Label:
    if not (
        isinstance(record, dict) and record.keys() == _LABEL.keys() and all(isinstance(record[name], kind) for name, kind in _LABEL.items())
    ):
        raise file.error("labels", f"each label has {', '.join(_LABEL)}; got {str(record)[:200]}")
    for name in ("categories", "synonyms"):
        if not all(isinstance(text, str) for text in record[name]):
            raise file.error("labels", f"{name} are text; got {str(record[name])[:200]}")
    number, frequency, coverage = record["number"], record["frequency"], record["coverage"]
    if not (0 < number < 1 << 31 and 0 <= frequency < _MOST and 0 <= coverage < float("inf")):
        raise file.error("labels", f"numbers are positive, frequency and coverage at least 0; got {str(record)[:200]}")
    return Label(**{**record, "categories": tuple(record["categories"]), "synonyms": tuple(record["synonyms"])})


def _maybe(file: storage.File, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    return file.tensor(key, dtype, shape) if key in file.keys else None


def _shares(file: storage.File, key: str, shape: tuple[int | None, ...]) -> Tensor:
    shares = file.tensor(key, torch.float64, shape)
    if bool(((shares < 0) | (shares > 1)).any()):
        raise file.error(key, "expected numbers from 0 to 1")
    return shares


def _counts(file: storage.File, key: str, shape: tuple[int | None, ...]) -> Tensor:
    counts = file.tensor(key, torch.int64, shape)
    if bool(((counts < 0) | (counts >= _MOST)).any()):
        raise file.error(key, "holds negative counts, or larger ones than any data set gives")
    return counts


def _check_overlap(file: storage.File, counts: Counts, mode: Any) -> None:
    """A label cannot share more pixels with a unit than it has, nor than the unit has. In the mode of the original, which counts a pixel
    once for each plane, it may share more than the unit has."""
    if bool((counts.intersection > counts.truth).any()) or (mode != "netdissect" and bool((counts.intersection > counts.activation).any())):
        raise file.error("counts/intersection", "a unit shares more pixels with a label than there are")


def _boxes(file: storage.File, shape: tuple[int, ...]) -> Tensor:
    boxes = file.tensor("top/boxes", torch.float64, shape)
    top, left, bottom, right = boxes.unbind(-1)
    known = ~boxes.isnan().all(-1)
    if not bool(((top < bottom) & (left < right) & (boxes.abs() <= _FARTHEST).all(-1))[known].all()):
        raise file.error("top/boxes", "expected top < bottom and left < right, or nan")
    return boxes


def _check_metadata(file: storage.File, metadata: dict[str, Any]) -> None:
    """What is computed with must be of its kind."""
    quantile, seed = str(metadata.get("quantile", "0.005")), metadata.get("seed", 0)
    if not re.fullmatch(r"\d{1,20}/\d{1,20}|\d{0,20}\.?\d{1,40}(e-\d{1,3})?", quantile):
        raise file.error("metadata", f"quantile: expected a share between 0 and 1, got {quantile[:80]!r}")
    if not isinstance(seed, int) or not abs(seed) < 1 << 63:
        raise file.error("metadata", f"seed: expected a whole number, got {str(seed)[:80]!r}")


def _ranking(file: storage.File, category: Tensor, categories: int, images: int) -> Ranking:
    crow = _counts(file, "ranking/crow", (images + 1,))
    column = _counts(file, "ranking/column", (None,))
    annotated = file.tensor("ranking/annotated", torch.bool, (images, None))
    rules = file.value("ranking", dict)
    sound = bool((crow.diff() >= 0).all()) and int(crow[0]) == 0 and int(crow[-1]) == len(column)
    if not sound or bool((column >= len(category)).any()) or annotated.shape[1] > categories:
        raise file.error("ranking/crow", "expected the rows of a matrix of images and labels")
    if rules.get("sign") not in SIGNS or rules.get("negatives") not in NEGATIVES:
        raise file.error("ranking", f"unknown sign or negatives: {str(rules)[:200]}")
    return Ranking(crow, column, annotated, category, rules["sign"], rules["negatives"])
