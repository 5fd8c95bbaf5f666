"""Outlier features of hidden states: which features, in which layers, and at which positions they live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.outlier_rule import beyond_chance, outside_bulk
from torchprobe.analysis.outliers import FREQUENCY, SIGMA, massive_activations
from torchprobe.analysis.positions import special_tokens
from torchprobe.encoders import Encoder
from torchprobe.recording.layers import Layer
from torchprobe.recording.reader import LayerReader, Layout, map_sizes

INT8_MAGNITUDE, INT8_LAYERS, INT8_POSITIONS = 6.0, 0.25, 0.06
"""The rule of LLM.int8(): a size, a share of the layers, a share of the positions."""


@dataclass(frozen=True)
class LayerOutliers:
    """The outlier features of one layer.

    Attributes:
        layer: its name.
        features: its width.
        where: kind of position → the outlier features there by the robust rule, the most frequent first. The kinds of images are
            "class token", "registers" and "patches"; of texts "first token" and "other tokens"; of maps "positions"; of pooled layers
            "vector". Kinds without vectors are missing.
        vectors: kind of position → number of finite vectors.
        massive: feature → the number of its massive activations, the most frequent first.
        massive_where: the kinds of positions that have one.
    """

    layer: str
    features: int
    where: dict[str, list[int]]
    vectors: dict[str, int]
    massive: dict[int, int]
    massive_where: list[str]

    @property
    def indices(self) -> list[int]:
        """The outlier features at any kind of position, each once."""
        return list(dict.fromkeys(feature for found in self.where.values() for feature in found))


@dataclass(frozen=True)
class HiddenOutliers:
    """The result of :func:`hidden_outliers`: the layers in their order, and the outlier features of LLM.int8().

    LLM.int8() asks for the same feature in several layers, so ``llm_int8`` is about the layers with ``llm_int8_features`` features, the
    most common width. None if no two layers share one.
    """

    layers: list[LayerOutliers]
    inputs: int
    llm_int8: list[int] | None = None
    llm_int8_features: int | None = None


def hidden_outliers(encoder: Encoder, batches: Sequence[Tensor], layers: Sequence[Layer]) -> HiddenOutliers:
    """The outlier features of layers by index, and the kinds of positions at which they live, for images and texts alike.

    In each kind of position the robust rule of :func:`torchprobe.analysis.outlier_features` is applied: more than 6 standard deviations of
    the bulk from its mean, in a quarter of the vectors, beyond chance. Vectors of one input are taken as independent there. Massive
    activations are those of Sun et al. 2024, see :func:`torchprobe.analysis.outliers.massive_activations`. LLM.int8() (Dettmers et al.
    2022) asks for |x| ≥ 6 somewhere in 25 % of the layers, and at 6 % of all positions. Padding counts nowhere.

    Args:
        encoder: of images or texts. It runs in eval mode.
        batches: inputs as the encoder takes them.
        layers: of ``encoder``, from :func:`torchprobe.recording.select_layers`.

    Raises:
        ValueError: no inputs, or a layer that cannot be read.

    >>> from torch import nn
    >>> from torchprobe.recording import select_layers
    >>> layer = nn.Linear(3, 64)
    >>> layer.bias.data[5] = 500
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), layer), features=64, preprocess=lambda image: image)
    >>> found = hidden_outliers(encoder, [torch.rand(40, 3, 1, 1)], select_layers(encoder, "visual.1"))
    >>> found.layers[0].where
    {'vector': [5]}
    """
    if not sum(map(len, batches)):
        raise ValueError("there are no inputs: give at least one batch")
    found: dict[str, _Counts] = {}
    maps: list[tuple[int, int]] = []
    mask: Tensor | None = None

    def visit(layer: Layer, x: Tensor, layout: Layout) -> None:
        rows = layout.images_first(x)
        is_map = rows.dim() > 3
        rows = rows.flatten(2).transpose(1, 2) if rows.dim() > 2 else rows[:, None]
        special = special_tokens(encoder, rows.shape[1], is_map, {a * b for a, b in maps})
        kinds = _kinds(encoder, rows.shape[1], x.dim() > 2, is_map, special)
        valid = torch.ones(rows.shape[:2], dtype=torch.bool, device=x.device)
        if mask is not None and mask.shape == valid.shape:
            valid = mask.to(x.device)
        counts = found.setdefault(layer.name, _Counts(rows.shape[2]))
        for kind, at in kinds.items():
            counts.add(kind, rows[:, at][valid[:, at]].double().cpu())

    with LayerReader(encoder, layers) as reader:
        with map_sizes(encoder.network) as sizes:
            reader.read(batches[0][:3], lambda layer, x, layout: None)  # the first pass may be repeated
        maps = list(sizes)
        for batch in batches:
            mask = encoder.mask(batch)
            reader.read(batch, visit)
    names = [layer.name for layer in layers]
    rows = [found[name].result(name) for name in names]
    return HiddenOutliers(rows, sum(map(len, batches)), *_llm_int8([found[name] for name in names]))


@dataclass
class _Counts:
    """What the vectors of one layer show so far."""

    features: int
    outside: dict[str, Tensor] = field(default_factory=dict)
    vectors: Counter[str] = field(default_factory=Counter)
    varying: Counter[str] = field(default_factory=Counter)
    massive: Counter[int] = field(default_factory=Counter)
    massive_where: dict[str, None] = field(default_factory=dict)
    large: Any = 0
    positions: int = 0

    def add(self, kind: str, rows: Tensor) -> None:
        """Float64 vectors (n, features) of one kind of position."""
        self.large = self.large + (rows.abs() >= INT8_MAGNITUDE).sum(0)
        self.positions += len(rows)
        massive = massive_activations(rows).features.tolist()
        self.massive.update(massive)
        if massive:
            self.massive_where[kind] = None
        finite = rows[rows.isfinite().all(-1)]
        self.outside[kind] = self.outside.get(kind, 0) + outside_bulk(finite, SIGMA).sum(0)
        self.vectors[kind] += len(finite)
        self.varying[kind] += int((finite != finite[:, :1]).any(-1).sum())

    def result(self, layer: str) -> LayerOutliers:
        where = {}
        for kind, outside in self.outside.items():
            n = self.varying[kind]
            passed = beyond_chance(outside, n) & (outside >= FREQUENCY["robust"] * max(1, n))
            where[kind] = [i for i in outside.argsort(descending=True, stable=True).tolist() if passed[i]]
        seen = {kind: n for kind, n in self.vectors.items() if n}
        massive = dict(self.massive.most_common())
        return LayerOutliers(layer, self.features, {kind: where[kind] for kind in seen}, seen, massive, list(self.massive_where))


def _kinds(encoder: Encoder, positions: int, several: bool, is_map: bool, special: int) -> dict[str, slice]:
    if not several:
        return {"vector": slice(None)}
    if is_map:
        return {"positions": slice(None)}
    if encoder.inputs == "text":
        return {"first token": slice(1), "other tokens": slice(1, None)}
    kinds = {"class token": slice(1), "registers": slice(1, special), "patches": slice(special, None)} if special else {}
    return {kind: at for kind, at in kinds.items() if len(range(positions)[at])} or {"patches": slice(None)}


def _llm_int8(layers: Sequence[_Counts]) -> tuple[list[int] | None, int | None]:
    widths = Counter(one.features for one in layers)
    if not widths or widths.most_common(1)[0][1] < 2:
        return None, None
    width = widths.most_common(1)[0][0]
    same = [one for one in layers if one.features == width]
    large = torch.stack([one.large for one in same])
    in_layers = (large > 0).double().mean(0)
    at_positions = large.sum(0).double() / max(1, sum(one.positions for one in same))
    return ((in_layers >= INT8_LAYERS) & (at_positions >= INT8_POSITIONS)).nonzero().flatten().tolist(), width
