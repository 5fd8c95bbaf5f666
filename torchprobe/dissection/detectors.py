"""Which units of a dissection are shown for which concepts, and how far each of them held in the data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from torchprobe.common.messages import did_you_mean, listing
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.summaries import THRESHOLD

MOST = 20
"""Units that are shown, if none are named."""

ALPHA = 0.05


class NoDetectorError(ValueError):
    """No unit of a layer is a detector, and none was named."""


@dataclass(frozen=True)
class Detector:
    """A unit, and a label of the data set that it overlaps.

    Attributes:
        unit: index within the layer.
        label, category: of the data set; "" for a unit that overlaps nothing.
        iou: of both.
        precision: share of the active pixels of the unit that have the label; recall: share of the pixels of the label where the unit is
            active. Over all images that count; nan if there are no such pixels. ``mode="netdissect"`` counts a pixel once for each plane
            that gives it the label; where that leads beyond 1, precision is nan.
        average_precision: of the unit for the label, or None.
        p_value: of the IoU, corrected for all pairs; None if it was not tested.
        threshold: the level that active values exceed.
        caveat: what speaks against the name, or "".
    """

    unit: int
    label: str
    category: str
    iou: float
    precision: float
    recall: float
    average_precision: float | None
    p_value: float | None
    threshold: float
    caveat: str = ""

    @property
    def concept(self) -> str:
        """The label with its category: two categories may have one word."""
        return f"{self.label} ({self.category})" if self.label else "no concept"


def choose_detectors(
    dissection: LayerScores, units: Iterable[int] | None = None, concepts: Iterable[str] | None = None, most: int = MOST
) -> list[Detector]:
    """The units to show: those named, those of some concepts, or the best ones.

    Args:
        dissection: with IoU.
        units: indices, with their best labels; in this order.
        concepts: names of labels, or their synonyms; for each of them up to ``most`` units with an IoU of 0.04 or more, and the best one if
            there is none. The highest IoU comes first.
        most: how many.

    Raises:
        NoDetectorError: none was named, and no unit has an IoU of 0.04.
        ValueError: no thresholds, or an unknown unit or concept.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    if dissection.thresholds is None or dissection.counts is None:
        raise ValueError(f"layer {dissection.layer!r} was dissected without IoU, so its units have no thresholds: use the score iou")
    iou = dissection.table("iou").nan_to_num(nan=0.0)
    value, best = iou.max(1) if iou.shape[1] else (torch.zeros(len(iou), dtype=torch.float64), torch.zeros(len(iou), dtype=torch.int64))
    pairs: list[tuple[int, int]] = []
    for unit in units or ():
        if not 0 <= unit < dissection.units:
            raise ValueError(f"layer {dissection.layer!r} has the units 0 to {dissection.units - 1}, got {unit}")
        pairs.append((unit, int(best[unit]) if value[unit] > 0 else -1))
    found: list[tuple[int, int]] = []
    for name in concepts or ():
        for label in _columns(dissection, name):
            order = iou[:, label].argsort(descending=True, stable=True).tolist()
            reaching = [unit for unit in order if iou[unit, label] >= THRESHOLD]
            found += [(unit, label) for unit in (reaching or order)[: most if reaching else 1]]
    pairs += sorted(found, key=lambda pair: -float(iou[pair]))
    if units is None and concepts is None:
        order = value.argsort(descending=True, stable=True).tolist()
        pairs = [(unit, int(best[unit])) for unit in order if value[unit] >= THRESHOLD][:most]
    if not pairs:
        raise NoDetectorError(
            f"no unit of layer {dissection.layer!r} has an IoU of {THRESHOLD:g} or more: name units or concepts to draw them"
        )
    return [_detector(dissection, *pair) for pair in dict.fromkeys(pairs)]


def caution(dissection: LayerScores) -> str:
    """What holds for all units of a dissection when their names are used for new pictures."""
    if dissection.metadata.get("shuffle_labels") is not None:
        return "A null: the labels of the data set were shuffled, so all names are chance."
    text = (
        "A name says what a unit overlapped in the data set. It does not say that the concept is here, or that an unmarked part has none."
    )
    if dissection.iou_null is None:
        text += " No IoU was compared with chance (dissect with IoU permutations)."
    return text


def _columns(dissection: LayerScores, name: str) -> list[int]:
    """The labels of a name, in all categories."""
    wanted = name.strip().lower()
    names = [{text.lower() for text in (label.name, label.title, *label.synonyms)} for label in dissection.labels]
    found = [i for i, own in enumerate(names) if wanted in own]
    exact = [i for i in found if wanted == dissection.labels[i].name.lower()]
    if not found:
        known = [label.name for label in dissection.labels]
        hint = did_you_mean(name, known) or f"; it has {listing(known)}"
        raise ValueError(f"the dissection of layer {dissection.layer!r} has no concept {name!r}{hint}")
    return exact or found


def _detector(dissection: LayerScores, unit: int, label: int) -> Detector:
    counts, thresholds, ap, null = dissection.counts, dissection.thresholds, dissection.average_precision, dissection.iou_null
    assert counts is not None and thresholds is not None
    threshold = float(thresholds[unit])
    never = dissection.never_active
    caveats = ["never active over the data set"] if never is not None and bool(never[unit]) else []
    if label < 0:
        return Detector(unit, "", "", 0.0, float("nan"), float("nan"), None, None, threshold, "; ".join([*caveats, "overlaps no concept"]))
    common, active = float(counts.intersection[unit, label]), float(counts.activation[unit, label])
    truth = float(counts.truth[label])
    iou = float(dissection.table("iou")[unit, label].nan_to_num(nan=0.0))
    p = None if null is None or bool(null.adjusted[unit, label].isnan()) else float(null.adjusted[unit, label])
    if iou < THRESHOLD:
        caveats.append(f"an IoU below {THRESHOLD:g} does not count as detection")
    if null is not None and p is None:
        caveats.append("too few images show the concept to compare with chance")
    if p is not None and p > ALPHA:
        caveats.append(f"not beyond chance at {ALPHA:g}")
    precise = None if ap is None or bool(ap[unit, label].isnan()) else float(ap[unit, label])
    described = dissection.labels[label]
    category = dissection.categories[int(dissection.category[label])]
    shares = (common / active if active and common <= active else float("nan"), common / truth if truth else float("nan"))
    return Detector(unit, described.name, category, iou, *shares, precise, p, threshold, "; ".join(caveats))
