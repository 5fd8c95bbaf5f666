"""Outlier features of hidden states: which features, in which layers, and at which positions they live."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.long_tokens import long_tokens
from torchprobe.analysis.outlier_rule import beyond_chance, outside_bulk
from torchprobe.analysis.outliers import FREQUENCY, MASSIVE, SIGMA, massive_activations, registers
from torchprobe.analysis.positions import special_tokens
from torchprobe.encoders import Encoder
from torchprobe.recording.layers import Layer
from torchprobe.recording.reader import LayerReader, Layout, map_sizes

INT8_MAGNITUDE, INT8_LAYERS, INT8_POSITIONS = 6.0, 0.25, 0.06
"""The rule of LLM.int8(): a size, a share of the layers, a share of the positions."""

_FEW = 3  # inputs that show how the layers are laid out


@dataclass(frozen=True)
class LayerOutliers:
    """The outlier features of one layer.

    Attributes:
        layer: its name.
        features: its width.
        where: kind of position → the outlier features there by the robust rule, the most frequent first. The kinds of images are
            "class token", "registers" and "patches"; of texts "first token" and "other tokens"; of maps "positions"; of pooled layers
            "vector". Kinds without vectors are missing.
        vectors: kind of position → number of finite vectors to which the robust rule was applied.
        massive: feature → the number of its massive activations, the most frequent first.
        massive_where: the kinds of positions that have one.
        long: kind of position → number of tokens that are long among the tokens of their input, see
            :func:`torchprobe.analysis.long_tokens.long_tokens`. Maps and pooled layers have no tokens.
        long_ratio: how long these are compared with the median token of their input, median over them; nan without any.
        registers: kind of position → number of tokens with a norm above 150, see :func:`torchprobe.analysis.outliers.registers`.
    """

    layer: str
    features: int
    where: dict[str, list[int]]
    vectors: dict[str, int]
    massive: dict[int, int]
    massive_where: list[str]
    long: dict[str, int] = field(default_factory=dict)
    long_ratio: float = math.nan
    registers: dict[str, int] = field(default_factory=dict)

    @property
    def indices(self) -> list[int]:
        """The outlier features at any kind of position, each once."""
        return list(dict.fromkeys(feature for found in self.where.values() for feature in found))

    @property
    def long_in_words(self) -> str:
        """The long tokens in words: how many, how long, and where; empty if there are none."""
        ratio = f"{self.long_ratio:.{0 if self.long_ratio >= 10 else 1}f} ×"
        return f"{sum(self.long.values())}, {ratio} ({', '.join(self.long)})" if self.long else ""


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
    2022) asks for |x| ≥ 6 somewhere in 25 % of the layers, and at 6 % of all positions. Long tokens, such as registers, are outliers among
    the tokens of an input rather than among features. Padding counts nowhere.

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
    with HiddenStates(encoder, layers) as states:
        for batch in batches:
            with states.following(batch):
                encoder(batch)
    for problem in states.problems.values():
        raise ValueError(problem)
    return states.result()


class HiddenStates:
    """:func:`hidden_outliers` while somebody else runs the encoder, so that no pass is needed but a short one at the start.

    A layer that cannot be read ends nothing: it is left out, with its reason in ``problems``.

    Args:
        encoder, layers: as for :func:`hidden_outliers`.
        map_positions: apply the robust rule to so many random positions of the map of each image only; None: to all. Massive activations
            and the rule of LLM.int8() read every position.

    >>> from torch import nn
    >>> from torchprobe.recording import select_layers
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3, 64)), features=64, preprocess=lambda image: image)
    >>> with HiddenStates(encoder, select_layers(encoder, "visual.1")) as states:
    ...     inputs = torch.rand(5, 3, 1, 1)
    ...     with states.following(inputs):
    ...         h = encoder(inputs)
    >>> states.result().layers[0].vectors
    {'vector': 5}
    """

    def __init__(self, encoder: Encoder, layers: Sequence[Layer], map_positions: int | None = None) -> None:
        self.encoder, self.map_positions, self.inputs = encoder, map_positions, 0
        self.problems: dict[str, str] = {}
        self._reader = LayerReader(encoder, layers)
        self._counts: dict[str, _Counts] = {}
        self._maps: set[int] | None = None  # the sizes of maps; None: no input was seen yet
        self._mask: Tensor | None = None

    def __enter__(self) -> HiddenStates:
        self._reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    @contextlib.contextmanager
    def following(self, inputs: Tensor, most: int | None = None) -> Iterator[None]:
        """During the block, a forward pass of the encoder over ``inputs`` is read; of the first ``most`` inputs only, or all."""
        if self._maps is None:
            with map_sizes(self.encoder.network) as sizes:
                self.problems |= self._reader.prepare(inputs[:_FEW])
            self._maps = {rows * columns for rows, columns in sizes}
        used = inputs if most is None else inputs[:most]
        self._mask = self.encoder.mask(used)
        with self._reader.following(len(inputs), partial(self._visit, len(used))) as problems:
            yield
        self.inputs += len(used)
        self.problems |= {name: problem for name, problem in problems.items() if name not in self.problems}

    def _visit(self, count: int, layer: Layer, x: Tensor, layout: Layout) -> None:
        rows = layout.images_first(x)[:count]
        is_map = rows.dim() > 3
        rows = rows.flatten(2).transpose(1, 2) if rows.dim() > 2 else rows[:, None]
        special = special_tokens(self.encoder, rows.shape[1], is_map, self._maps or set())
        kinds = _kinds(self.encoder, rows.shape[1], x.dim() > 2, is_map, special)
        valid = torch.ones(rows.shape[:2], dtype=torch.bool, device=x.device)
        if self._mask is not None and self._mask.shape == valid.shape:
            valid = self._mask.to(x.device)
        counts = self._counts.setdefault(layer.name, _Counts(rows.shape[2]))
        for kind, at in kinds.items():
            vectors = rows[:, at][valid[:, at]]
            counts.add_values(kind, vectors)
            counts.add(kind, vectors if not is_map or self.map_positions is None else _some(rows, self.map_positions))
        if x.dim() > 2 and not is_map:
            counts.add_tokens(kinds, rows, valid)

    def result(self) -> HiddenOutliers:
        """What the inputs so far show.

        Raises:
            ValueError: no layer could be read, or there were no inputs.
        """
        names = [name for name in self._reader.layers if name in self._counts and name not in self.problems]
        if not names:
            raise ValueError(next(iter(self.problems.values()), "there are no inputs: give at least one batch"))
        rows = [self._counts[name].result(name) for name in names]
        return HiddenOutliers(rows, self.inputs, *_llm_int8([self._counts[name] for name in names]))


@dataclass
class _Counts:
    """What the vectors of one layer show so far."""

    features: int
    outside: dict[str, Tensor] = field(default_factory=dict)
    vectors: Counter[str] = field(default_factory=Counter)
    varying: Counter[str] = field(default_factory=Counter)
    massive: Counter[int] = field(default_factory=Counter)
    massive_where: dict[str, None] = field(default_factory=dict)
    long: Counter[str] = field(default_factory=Counter)
    registers: Counter[str] = field(default_factory=Counter)
    ratios: list[Tensor] = field(default_factory=list)
    large: Any = 0
    positions: int = 0

    def add_values(self, kind: str, rows: Tensor) -> None:
        """Vectors (n, features) of one kind of position: their large values."""
        size = rows.abs()
        self.large = self.large + (size >= INT8_MAGNITUDE).sum(0).cpu()
        self.positions += len(rows)
        massive = massive_activations(rows[(size > MASSIVE).any(-1)].cpu()).features.tolist()  # few vectors, so few medians
        self.massive.update(massive)
        if massive:
            self.massive_where[kind] = None

    def add(self, kind: str, rows: Tensor) -> None:
        """Vectors (n, features) of one kind of position: their outliers."""
        rows = rows.double().cpu()
        finite = rows[rows.isfinite().all(-1)]
        self.outside[kind] = self.outside.get(kind, 0) + outside_bulk(finite, SIGMA).sum(0)
        self.vectors[kind] += len(finite)
        self.varying[kind] += int((finite != finite[:, :1]).any(-1).sum())

    def add_tokens(self, kinds: dict[str, slice], rows: Tensor, valid: Tensor) -> None:
        """Tokens (n, positions, features), and which of them count."""
        long, ratio = long_tokens(rows, valid)
        beyond = registers(rows) & valid
        for kind, at in kinds.items():
            self.long[kind] += int(long[:, at].sum())
            self.registers[kind] += int(beyond[:, at].sum())
        self.ratios.append(ratio[long].cpu())

    def result(self, layer: str) -> LayerOutliers:
        where = {}
        for kind, outside in self.outside.items():
            n = self.varying[kind]
            passed = beyond_chance(outside, n) & (outside >= FREQUENCY["robust"] * max(1, n))
            where[kind] = [i for i in outside.argsort(descending=True, stable=True).tolist() if passed[i]]
        seen = {kind: n for kind, n in self.vectors.items() if n}
        massive = dict(self.massive.most_common())
        ratios = torch.cat([torch.zeros(0, dtype=torch.float64), *self.ratios])
        return LayerOutliers(
            layer,
            self.features,
            where={kind: where[kind] for kind in seen},
            vectors=seen,
            massive=massive,
            massive_where=list(self.massive_where),
            long={kind: n for kind, n in self.long.items() if n},
            long_ratio=float(ratios.quantile(0.5)) if len(ratios) else math.nan,
            registers={kind: n for kind, n in self.registers.items() if n},
        )


def _some(rows: Tensor, most: int) -> Tensor:
    """Of vectors (n, positions, d), those of ``most`` random positions of each image, (·, d); the same ones in every run."""
    n, positions, _ = rows.shape
    chosen = torch.rand(n, positions, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :most].to(rows.device)
    return rows[torch.arange(n, device=rows.device)[:, None], chosen].flatten(0, 1)


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
