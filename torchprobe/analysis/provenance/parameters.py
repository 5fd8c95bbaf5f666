"""Which single parameters a feature hangs on: how much of it is due to each one's being unlike its peers.

h_f is linear in every parameter considered here, with everything else held as in :mod:`torchprobe.analysis.provenance.attribution`. So
(θ − θ') ∂h_f/∂θ is by how much the direct path would change with θ' in place of θ. θ' is the median of the peers of θ: the same parameter
of the other features. What multiplies is compared by its size, because its sign can be moved into the weights before it: a gain by its
absolute value, a row of weights by its length. θ' then has the sign or the direction of θ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprobe.analysis.provenance.attribution import TOLERANCE, Attribution, Sums, is_bias
from torchprobe.analysis.provenance.norms import norm_of
from torchprobe.analysis.provenance.stream import Branch

Kind = Literal["gain", "bias", "row"]


@dataclass(frozen=True)
class Peers:
    """A parameter as one entry for each feature of the stream or of the representation.

    Attributes:
        parameter: its full name.
        kind: "bias", which is added; "gain", which multiplies; "row", of a matrix.
        axis: the dimension of the entries. The others are positions of an embedding, or the inputs of a row.
        offset: what is added to a gain before it multiplies: 0, or 1 in the norms of Gemma.
    """

    parameter: str
    kind: Kind
    axis: int
    offset: float = 0.0

    def value(self, values: Tensor) -> Tensor:
        """The entries with the axis last: (…, entries); of a gain, the size of what multiplies; of a row, its length (entries,)."""
        moved = values.detach().double().movedim(self.axis, -1)
        if self.kind == "gain":
            return (moved + self.offset).abs()
        return moved.reshape(-1, moved.shape[-1]).norm(dim=0) if self.kind == "row" else moved

    def replaced(self, values: Tensor, index: int, how: str) -> Tensor:
        """A copy in which one entry has the median of its peers, or is 0.

        >>> Peers("ln.bias", "bias", -1).replaced(torch.tensor([1.0, -9.0, 2.0]), 1, "median")
        tensor([1., 1., 2.])
        >>> Peers("ln.weight", "gain", -1).replaced(torch.tensor([1.0, -9.0, 2.0]), 1, "median")
        tensor([ 1., -2.,  2.])
        >>> Peers("proj", "row", 0).replaced(torch.tensor([[1.0, 0.0], [0.0, 8.0], [2.0, 0.0]]), 1, "median")
        tensor([[1., 0.],
                [0., 2.],
                [2., 0.]])
        """
        changed, current = values.detach().clone(), self.value(values)
        entry = changed.movedim(self.axis, -1)
        if how == "zero":
            entry[..., index] = -self.offset
        elif self.kind == "row":
            entry[..., index] *= (current.median() / current[index].clamp_min(torch.finfo(torch.float64).tiny)).to(changed)
        else:
            median = current.median(-1).values.to(changed)
            gain = entry[..., index] + self.offset
            entry[..., index] = median * gain.sign() - self.offset if self.kind == "gain" else median
        return changed


@dataclass(frozen=True)
class Entry:
    """One entry of a parameter; see :class:`torchprobe.analysis.provenance.results.ParameterRow`."""

    peers: Peers
    index: int
    value: float
    median: float
    deviation: float
    contribution: float
    excess: float


def deviations(values: Tensor) -> Tensor:
    """How far each of some values is from their median, in robust standard deviations (1.4826 × the median absolute deviation).

    values (n,) → float64 (n,). If more than half are equal, the deviation of the others is infinite, with their sign.

    >>> deviations(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))[-1] > 50
    tensor(True)
    """
    wide = values.double()
    off = wide - wide.median()
    spread = 1.4826 * off.abs().median()
    return (off / spread).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def entries(model: nn.Module, found: Attribution, feature: int, most: int) -> list[Entry]:
    """The entries of all parameters on which a feature hangs most, first the one without whose excess it would be smallest.

    An excess beyond the feature itself is balanced by other parts; the median in its place would only turn the sign of the feature.
    """
    images, sums = sum(map(len, found.h)), found.sums[feature]
    size = float(torch.cat(found.h)[:, feature].abs().sum())
    rows = [row for branch in found.stream.branches for row in _of_branch(model, branch, sums)]
    rows += _outside(model, found, sums, stem_parts(model, found, feature) is not None)
    best: list[Entry] = []
    for peers, values, contribution, excess in rows:
        fall = (size - (size - excess).abs()).where(contribution != 0, -math.inf)  # most entries have nothing to do with the feature
        for index in fall.topk(min(most, len(fall))).indices.tolist():
            if float(contribution[index]) == 0:
                continue
            current = peers.value(values)
            current = current if current.dim() == 1 else _largest(current, index)
            entry = Entry(
                peers, index, float(current[index]), float(current.median()), float(deviations(current)[index]),
                float(contribution[index]) / images, float(excess[index]) / images,
            )  # fmt: skip
            best.append(entry)
    return sorted(best, key=lambda entry: abs(size / images - entry.excess))[:most]


_Row = tuple[Peers, Tensor, Tensor, Tensor]
"""A parameter with its values, and what each entry contributes and its excess, summed over images."""


def _of_branch(model: nn.Module, branch: Branch, sums: Sums) -> Iterator[_Row]:
    """The parameters that write a branch."""
    if branch.scale is not None:
        yield _gain(model, branch.scale, sums.rows[branch.key])
    writer = branch.writer
    if writer is None:
        return
    total, slope = sums.rows[branch.key], sums.slopes[branch.key]
    if writer.scale is not None:
        yield _gain(model, writer.scale, total)
        slope = slope * model.get_parameter(writer.scale).detach().flatten()
    rest = total
    if writer.bias is not None:
        bias = model.get_parameter(writer.bias).detach()
        part = slope * bias
        rest = rest - part
        yield Peers(writer.bias, "bias", -1), bias, part, slope * (bias - bias.median())
    if writer.gain is not None:
        yield _gain(model, writer.gain, rest, writer.offset)
    if writer.norm is not None:
        norm: Any = model.get_submodule(writer.norm)
        rest = rest + slope * norm.weight.detach() * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    if writer.weight is not None:
        yield _rows(Peers(writer.weight, "row", writer.axis), model.get_parameter(writer.weight).detach(), rest)


def stem_parts(model: nn.Module, found: Attribution, feature: int) -> dict[str, float] | None:
    """What each parameter before the blocks adds, mean over images; None if what comes before is not a sum of them."""
    sums, images = found.sums[feature], sum(map(len, found.h))
    added = {
        name: float((gradient * found.outside[name].detach()).sum()) / images
        for name, gradient in sums.gradients.items()
        if name in found.before and (peers := peers_of(model, name, gradient, True)) is not None and peers.kind != "gain"
    }
    value = torch.cat(found.h)[:, feature]
    whole = float((torch.cat(sums.parts)[:, 0] * torch.where(value < 0, -1.0, 1.0)).mean())
    size = float(value.abs().mean())
    return added if added and abs(sum(added.values()) - whole) <= TOLERANCE * max(size, abs(whole)) else None


def _outside(model: nn.Module, found: Attribution, sums: Sums, stem: bool) -> Iterator[_Row]:
    """The parameters after the last block, and with ``stem`` those before the first."""
    width = len(next(iter(sums.rows.values())))
    for name, gradient in sums.gradients.items():
        if name in found.before and not stem:
            continue
        values, product = found.outside[name].detach(), gradient * found.outside[name].detach()
        peers = peers_of(model, name, values, name in found.before)
        if peers is None or (name in found.before and values.shape[peers.axis] != width):
            continue
        if peers.kind == "row":
            moved = product.movedim(peers.axis, -1)
            yield _rows(peers, values, moved.reshape(-1, moved.shape[-1]).sum(0))
        elif peers.kind == "gain":
            yield _gain(model, name, (gradient * (values + peers.offset)).flatten(), peers.offset)
        else:
            unlike = gradient * (values - values.median(-1, keepdim=True).values)
            yield peers, values, product.reshape(-1, product.shape[-1]).sum(0), unlike.reshape(-1, unlike.shape[-1]).sum(0)


def peers_of(model: nn.Module, name: str, values: Tensor, before: bool) -> Peers | None:
    """How a parameter outside the blocks is divided into entries; None if that is not known."""
    owner = model.get_submodule(name.rpartition(".")[0])
    last = name.rpartition(".")[2]
    if norm := norm_of(owner):
        return Peers(name, "bias", -1) if last == "bias" else Peers(name, "gain", -1, norm.offset)
    if isinstance(owner, (nn.Linear, nn.Conv2d)):
        return Peers(name, "bias", -1) if values.dim() == 1 else Peers(name, "row", 0)
    if isinstance(owner, nn.Embedding):
        return Peers(name, "bias", -1)
    if before:
        return Peers(name, "bias", -1) if values.shape[-1] > 1 else None
    if values.dim() == 2:
        return Peers(name, "row", 1)  # a projection h = x @ P
    return Peers(name, "bias" if is_bias(name) else "gain", -1) if values.dim() == 1 else None


def _gain(model: nn.Module, name: str, total: Tensor, offset: float = 0.0) -> _Row:
    return _rows(Peers(name, "gain", -1, offset), model.get_parameter(name).detach().flatten(), total)


def _rows(peers: Peers, values: Tensor, total: Tensor) -> _Row:
    """Of what multiplies: ``total`` is what passes through each entry."""
    size = peers.value(values)
    excess = (total * (1 - size.median() / size)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return peers, values, total, excess


def _largest(values: Tensor, index: int) -> Tensor:
    """Of an embedding with several positions, the one where the entry is the furthest from its peers."""
    flat = values.reshape(-1, values.shape[-1])
    return flat[int((flat[:, index] - flat.median(-1).values).abs().argmax())]
