"""What a report says of the images: which they were, how the network was shown them, and which labels it was not shown."""

from __future__ import annotations

from typing import Any

from torchprobe.common.messages import counted
from torchprobe.dissection.scores import LayerScores
from torchprobe.rendering.tables import percent

MOST = 6
"""Concepts that are named."""

LONGEST = 400
"""Characters of the name of a transform."""


def images(d: LayerScores) -> list[str]:
    """The data set with its split and categories, and the preprocessing, one sentence each; what is unknown is left out."""
    lines = []
    if isinstance(data := d.metadata.get("dataset"), dict):
        parts = [counted(len(d.images), "image")]
        if "split" in data:
            parts.append("all splits" if data["split"] is None else f"split {_brief(data['split'])}")
        if isinstance(names := data.get("categories"), list):
            parts.append(f"{'category' if len(names) == 1 else 'categories'} {_brief(', '.join(map(str, names)))}")
        lines.append(f"Data set: {_brief(data.get('name') or 'unnamed')}; {'; '.join(parts)}.")
    if isinstance(made := d.metadata.get("preprocessing"), dict):
        shows = made.get("shows")
        lines.append(f"Preprocessing: {_brief(made.get('transform'))}" + (f"; shows {_brief(shows)}." if shows else "."))
    return lines


def outside(d: LayerScores) -> str:
    """How many label pixels the network was not shown, and of which concepts most; "" if it was shown all of them, or if it is unknown.

    The share of a concept is that of its pixels in label maps, as they are counted: outside / (outside + truth).
    """
    if d.outside is None or not bool(d.outside.any()):
        return ""
    lost = int(d.outside.sum())
    text = f"The network was shown a part of the pictures: {counted(lost, 'label pixel')}"
    if d.counts is None or bool((d.counts.truth < 0).any()):
        return f"{text} outside of it count nowhere."
    every = d.outside + d.counts.truth
    shares = d.outside.double() / every.clamp(min=1)
    worst = [i for i in shares.argsort(descending=True, stable=True).tolist()[:MOST] if shares[i] > 0]
    names = ", ".join(f"{_brief(d.labels[i].title)} ({percent(float(shares[i]), 2)})" for i in worst)
    return f"{text} ({percent(lost / int(every.sum()), 2)}) outside of it count nowhere. Most of all of {names}."


def caption(d: LayerScores) -> str:
    """The images in a few words, for the terminal: :func:`images` and :func:`outside`."""
    return " ".join(filter(None, [*images(d), outside(d)]))


def _brief(value: Any) -> str:
    """On one line, and not long. It is text from a file: the page escapes it."""
    line = " ".join(str(value).split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
