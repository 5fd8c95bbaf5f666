"""How much of a unit's values its threshold leaves active, and the units that it leaves never active."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor

from torchprobe.common.messages import counted
from torchprobe.dissection.overlap import Counts


class Level(NamedTuple):
    """Where the threshold of each unit lies among its values, over all positions of all images.

    ``values`` int64 (U,): how many there are. ``above``, ``equal`` float64 (U,): the shares above the threshold, which are active, and
    equal to it, which are not. nan: unknown.
    """

    values: Tensor
    above: Tensor
    equal: Tensor


def never_active(counts: Counts) -> Tensor:
    """The units without an active pixel in any image that counts, bool (U,). They have an IoU of 0 with every label.

    >>> import torch
    >>> never_active(Counts(torch.tensor([[2], [0]]), torch.tensor([[4], [0]]), torch.tensor([6])))
    tensor([False,  True])
    """
    return (counts.activation == 0).all(1)


CAUSES = ("too few values", "constant", "clipped", "elsewhere")
"""Why a unit is never active, see :func:`causes`."""


def causes(never: Tensor, level: Level | None, quantile: Fraction) -> list[str]:
    """Why each unit is never active; "" for a unit that is.

    "too few values": the share ``quantile`` of them is less than one value. "constant": all values are equal. "clipped": more than the
    share ``quantile`` of the values equals the largest one, as where an activation function ends; nothing exceeds it. "elsewhere": some
    values are above the threshold, but not in images that count, or it is unknown.

    Args:
        never: see :func:`never_active`.
        level: None if the thresholds were given.
        quantile: the share of values above a threshold.

    >>> import torch
    >>> level = Level(torch.tensor([1000, 1000]), torch.tensor([0.0, 0.005]), torch.tensor([0.2, 0.001]))
    >>> causes(torch.tensor([True, False]), level, Fraction(5, 1000))
    ['clipped', '']
    """
    found = []
    for unit, silent in enumerate(never.tolist()):
        if not silent:
            found.append("")
        elif level is None or float(level.above[unit]) != 0:
            found.append("elsewhere")
        elif float(level.equal[unit]) == 1:
            found.append("constant")
        else:
            found.append("too few values" if quantile * int(level.values[unit]) < 1 else "clipped")
    return found


def explanation(layer: str, causes: Sequence[str], quantile: Fraction) -> str:
    """A message about the units that are never active, or "".

    >>> explanation("features.0", ["constant", "", "constant"], Fraction(5, 1000))
    "layer 'features.0': 2 of 3 units are never active, so they overlap nothing. 2 units are constant"
    """
    number = {cause: sum(c == cause for c in causes) for cause in CAUSES}
    total, share = sum(number.values()), float(quantile)
    if not total:
        return ""
    parts = []
    if n := number["clipped"]:
        have = f"{counted(n, 'unit')} {'has' if n == 1 else 'have'}"
        parts.append(f"{have} a share of more than {share:g} of the values at the largest value, as where an activation function clips")
    if n := number["constant"]:
        parts.append(f"{counted(n, 'unit')} {'is' if n == 1 else 'are'} constant")
    if n := number["too few values"]:
        parts.append(f"{counted(n, 'unit')} {'has' if n == 1 else 'have'} fewer than {1 / share:.0f} values: use more images")
    if n := number["elsewhere"]:
        parts.append(f"{counted(n, 'unit')} {'does' if n == 1 else 'do'} not exceed the threshold in any image that counts")
    return f"layer {layer!r}: {total} of {len(causes)} units are never active, so they overlap nothing. {'; '.join(parts)}"


def held_back(level: Level, never: Tensor, quantile: Fraction) -> Tensor:
    """The units that are active, but on less than half of the share ``quantile``, because many values equal their threshold; bool (U,).

    >>> import torch
    >>> level = Level(torch.tensor([1000, 1000]), torch.tensor([0.001, 0.005]), torch.tensor([0.2, 0.001]))
    >>> held_back(level, torch.tensor([False, False]), Fraction(5, 1000))
    tensor([ True, False])
    """
    return (level.above < float(quantile) / 2) & (level.above + level.equal > float(quantile)) & ~never
