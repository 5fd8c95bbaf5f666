"""Outlier features: the features that are far above the rest, by our rule and by published definitions under the names of their authors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import reduce
from torch import Tensor, nn

from torchprobe.analysis.inputs import Vectors, blocks, representations
from torchprobe.analysis.outlier_rule import ALPHA, beyond_chance, outside_bulk
from torchprobe.rendering.tables import Column
from torchprobe.statistics import Moments
from torchprobe.statistics.moments import OUTLIER_SHARE

SIGMA = 6.0
"""An outlier lies more than so many standard deviations from the mean of its vector (we chose the number)."""

MASSIVE = 100.0
"""Massive activations are larger than this in size (Sun et al. 2024)."""

Rule = Literal["robust", "classical"]
"""Whose mean and standard deviation: of the bulk of the vector, without its outliers, or of the whole vector."""

FREQUENCY: dict[Rule, float] = {"robust": 0.25, "classical": OUTLIER_SHARE}
"""Rule → share of the vectors in which an outlier feature must be an outlier (we chose the numbers)."""


def feature_columns(sigma: float = SIGMA) -> tuple[Column, ...]:
    """The columns of a table of features whose outliers lie ``sigma`` standard deviations from the mean."""
    return (
        Column("feature", "feature", "index within the representation", "index"),
        Column("outlier_share", "outlier share", f"share of the vectors with |h_i − mean h| > {sigma:g} std of that vector", "share"),
        Column("relative_size", "relative size", "mean |h_i| over images, divided by its average over features"),
        Column("energy_share", "energy share", "Σ h_i² as a share of the sum over all features", "share"),
        Column("extreme_share", "extreme share", "share of the images in which |h_i| is the largest of all features", "share"),
        Column("mean", "mean", "mean of h_i over images"),
        Column("std", "std", "standard deviation of h_i over images"),
    )


FEATURE_COLUMNS = feature_columns()

ROBUST = Column("robust_share", "robust share", "share of the vectors in which h_i lies outside the bulk of the vector", "share")

PEAK = Column("peak", "max|h_i| / mean|h|", "the largest |h_i| of any image, in units of the mean |h| of that image")


@dataclass(frozen=True)
class OutlierFeatures:
    """The features that are outliers in enough vectors, and a table of all features.

    Attributes:
        indices: int64 (k,), the outlier features, most frequent first.
        table: one row for each of the d features, most frequent outlier first; see ``columns``.
        sigma: standard deviations from the mean that make an outlier.
        frequency: share of the vectors in which an outlier feature is at least an outlier.
        vectors: number of vectors counted.
        constant_vectors: number left out of the shares of outliers only, because their variance is 0.
        invalid_vectors: number left out of everything because of nan or inf.
        rule: "robust" or "classical".
        classical: int64 (k,), the features by the classical rule, in half of the vectors, for comparison.
    """

    indices: Tensor
    table: tuple[dict[str, Any], ...]
    sigma: float
    frequency: float
    vectors: int
    constant_vectors: int
    invalid_vectors: int
    rule: Rule
    classical: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def features(self) -> int:
        """The number d of all features."""
        return len(self.table)

    @property
    def energy_share(self) -> float:
        """Σ h_i² over the outlier features, as a share of the sum over all features."""
        return math.fsum(row["energy_share"] for row in self.table[: len(self)])

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the table, with their help."""
        return outlier_columns(self.sigma)

    def rows(self) -> list[dict[str, Any]]:
        """The table as a list; its first ``len(indices)`` rows are the outlier features."""
        return list(self.table)


def outlier_columns(sigma: float = SIGMA) -> tuple[Column, ...]:
    """The columns of :attr:`OutlierFeatures.table`: the share by either rule, then the size of the feature."""
    index, *others = feature_columns(sigma)
    return (index, ROBUST, *others, PEAK)


def outlier_features(
    h: Vectors, sigma: float = SIGMA, frequency: float | None = None, rule: Rule = "robust", alpha: float = ALPHA
) -> OutlierFeatures:
    """The features that lie far outside the other features of their vector in many vectors.

    The robust rule asks for three things. In a vector, an outlier lies more than ``sigma`` standard deviations from the mean, both of the
    bulk of the vector, without its outliers (``outlier_rule.outside_bulk``). A feature is one in a quarter of the vectors or more. And
    chance does not explain it (``outlier_rule.beyond_chance``), so that a few vectors with heavy tails have no outlier features; one vector
    never has. Up to a tenth of the features can be outliers of a vector; fewer than ten features have none.

    The classical rule takes mean and standard deviation of the whole vector, and half of the vectors. There outliers hide each other: more
    than d/37 equal ones are not found, and with (d − 1)/√d ≤ ``sigma``, that is d ≤ 37, none ever is; its shares are then nan. We chose the
    6 σ and the shares; docs/interpreting.md has the errors of both rules.

    Args:
        h: (n, d), or embeddings.
        sigma: standard deviations from the mean.
        frequency: share of the vectors in which a feature must be an outlier; None: that of the rule, :data:`FREQUENCY`. With 0, once is
            enough.
        rule: "robust" or "classical".
        alpha: of the robust rule, see :data:`torchprobe.analysis.outlier_rule.ALPHA`; 1: not tested.

    Raises:
        ValueError: h is not (n, d), ``sigma`` or ``alpha`` is not positive, ``frequency`` is not in [0, 1], or the rule is another.

    >>> h = torch.randn(200, 64)
    >>> h[:, 5:7] = 40
    >>> found = outlier_features(h)
    >>> found.indices.sort().values, found.classical
    (tensor([5, 6]), tensor([], dtype=torch.int64))
    """
    h = representations(h)
    if rule not in get_args(Rule):
        raise ValueError(f"rule is one of {', '.join(map(repr, get_args(Rule)))}, got {rule!r}")
    if frequency is None:
        frequency = FREQUENCY[rule]
    if not 0 <= frequency <= 1:
        raise ValueError(f"frequency is a share of the vectors, in [0, 1], got {frequency}")
    if not alpha > 0:
        raise ValueError(f"alpha is a probability above 0, got {alpha}")
    d = h.shape[1]
    moments = Moments(d, h.device, outlier_sigma=sigma)
    outside = torch.zeros(d, dtype=torch.int64, device=h.device)
    extreme = torch.zeros_like(outside)
    peak = torch.zeros(d, dtype=torch.float64, device=h.device)
    invalid = 0
    for block in blocks(h):
        finite = block[block.isfinite().all(-1)]
        invalid += len(block) - len(finite)
        moments.update(finite)
        outside += outside_bulk(finite, sigma).sum(0)
        size = finite.abs()
        extreme += torch.bincount(size.argmax(-1), minlength=d)
        relative = (size / size.mean(-1, keepdim=True)).nan_to_num(nan=0.0)  # a vector of zeros has no peak
        if len(relative):
            peak = torch.maximum(peak, relative.amax(0))
    seen = len(h) - invalid
    varying = seen - moments.constant_vectors
    passed = beyond_chance(outside, varying, alpha).tolist()
    share = (outside.double() / varying).tolist()
    table = feature_rows(moments, extreme, seen)
    for row in table:
        row[PEAK.key] = float(peak[row["feature"]]) if seen else math.nan
        row[ROBUST.key] = share[row["feature"]]
    chosen = classical = _frequent(table, "outlier_share", frequency if rule == "classical" else FREQUENCY["classical"])
    if rule == "robust":
        table.sort(key=lambda row: -_or_zero(row[ROBUST.key]))
        chosen = [i for i in _frequent(table, ROBUST.key, frequency) if passed[i]]
    index, by_classical = (torch.tensor(each, dtype=torch.int64) for each in (chosen, classical))
    counts = seen, moments.constant_vectors, invalid
    return OutlierFeatures(index, tuple(table), float(sigma), float(frequency), *counts, rule, by_classical)


def _frequent(table: Sequence[dict[str, Any]], key: str, frequency: float) -> list[int]:
    """The features that are an outlier at all, and in so many of the vectors."""
    return [row["feature"] for row in table if row[key] > 0 and row[key] >= frequency]


def feature_rows(moments: Moments, extreme: Tensor, vectors: int) -> list[dict[str, Any]]:
    """One row per feature, with the keys of :data:`FEATURE_COLUMNS`; most frequent outlier first, then the largest.

    Args:
        moments: of the representation.
        extreme: int (d,), for each feature the number of vectors in which |h_i| is the largest of all.
        vectors: number of vectors.
    """
    energy = moments.count * (moments.variance + moments.mean**2)
    parts = {
        "outlier_share": moments.outlier_frequency,
        "relative_size": moments.mean_abs / moments.mean_abs.nanmean(),
        "energy_share": energy / energy.nansum(),
        "extreme_share": extreme / max(1, vectors),
        "mean": moments.mean,
        "std": moments.std,
    }
    columns = {key: part.cpu().tolist() for key, part in parts.items()}
    rows = [{"feature": i} | {key: column[i] for key, column in columns.items()} for i in range(moments.features)]
    return sorted(rows, key=lambda row: [-_or_zero(row["outlier_share"]), -_or_zero(row["relative_size"])])


class LLMInt8Outliers(NamedTuple):
    """The result of :func:`llm_int8_outliers`.

    Attributes:
        indices: int64 (k,), the outlier features.
        layer_share: float64 (d,), for every feature the share of the layers with a large value of it.
        position_share: float64 (d,), for every feature the share of the positions with a large value of it.
    """

    indices: Tensor
    layer_share: Tensor
    position_share: Tensor


def llm_int8_outliers(
    layers: Sequence[Tensor], magnitude: float = 6.0, layer_share: float = 0.25, position_share: float = 0.06
) -> LLMInt8Outliers:
    """The outlier features of LLM.int8(): |x_i| ≥ 6 somewhere in 25 % of the layers and at 6 % of all positions, for the same i.

    The rule is in absolute units, so it depends on the scale of the hidden states (Dettmers et al., NeurIPS 2022, arXiv 2208.07339).

    Args:
        layers: the hidden states of each layer, (positions, d), all of one width.
        magnitude: a value counts from this size on.
        layer_share: share of the layers that must have such a value of the feature.
        position_share: share of the positions of all layers together that must have one.

    Raises:
        ValueError: no layer, or layers of different widths.

    >>> quiet, loud = torch.zeros(10, 4), torch.zeros(10, 4)
    >>> loud[:3, 2] = -7
    >>> llm_int8_outliers([quiet, loud]).indices
    tensor([2])
    """
    if not layers:
        raise ValueError("no layer was given: give the hidden states of at least one layer")
    states = [representations(layer) for layer in layers]
    if len(widths := {layer.shape[1] for layer in states}) > 1:
        raise ValueError(f"an outlier is the same feature in several layers, so they must have one width; got {sorted(widths)}")
    large = [[(block.abs() >= magnitude).sum(0) for block in blocks(layer)] for layer in states]
    counts = torch.stack([reduce(of_layer, "blocks d -> d", "sum") for of_layer in large])
    in_layers = (counts > 0).double().mean(0)
    at_positions = counts.sum(0).double() / max(1, sum(map(len, states)))
    return LLMInt8Outliers(((in_layers >= layer_share) & (at_positions >= position_share)).nonzero().flatten(), in_layers, at_positions)


class MassiveActivations(NamedTuple):
    """The positions ``vectors`` and ``features``, int64 (k,), in row order, and the ``values``, float64 (k,)."""

    vectors: Tensor
    features: Tensor
    values: Tensor


def massive_activations(h: Tensor, magnitude: float = MASSIVE, ratio: float = 1000.0) -> MassiveActivations:
    """The values above 100 in size that are at least 1000 times the median size of their vector (Sun et al., COLM 2024, arXiv 2402.17762).

    Sun et al. say "hidden state" and "around 1,000". We take the median over the features of one vector, and for even d the mean of the
    middle two. Nan is not a massive activation.

    >>> h = torch.ones(2, 8)
    >>> h[1, 3] = -2000
    >>> massive_activations(h)
    MassiveActivations(vectors=tensor([1]), features=tensor([3]), values=tensor([-2000.], dtype=torch.float64))
    """
    found: list[Tensor] = []
    values: list[Tensor] = []
    start = 0
    for block in blocks(representations(h)):
        size = block.abs()
        middle = size.nanquantile(0.5, dim=-1, keepdim=True) if len(size) else size[:, :1]
        massive = (size > magnitude) & (size >= ratio * middle)
        at = massive.nonzero()
        values.append(block[massive])
        at[:, 0] += start
        found.append(at)
        start += len(block)
    vectors, features = torch.cat(found).unbind(1)
    return MassiveActivations(vectors, features, torch.cat(values))


def registers(tokens: Tensor, norm: float = 150.0) -> Tensor:
    """The tokens that are as long as registers: Euclidean norm above 150 (Darcet et al., ICLR 2024, arXiv 2309.16588).

    A register is an outlier among tokens, not among features. The threshold is that of DINOv2's ViT-g and depends on the model.

    tokens (…, d) → bool (…); False for a token with nan.

    >>> registers(torch.tensor([[100.0, 100.0], [200.0, 0.0]]))
    tensor([False,  True])
    """
    if tokens.dim() < 1 or not tokens.shape[-1]:
        raise ValueError(f"expected tokens (…, d), got a tensor of shape {tuple(tokens.shape)}")
    length: Tensor = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float64)
    return length > norm


def rms_kurtosis(h: Vectors) -> float:
    """Kurtosis of the root mean squares of the features: mean_j(s_j²) / (mean_j s_j)² with s_j = mean_n h_nj² (He et al., NeurIPS 2024).

    It lies between 1, when all features have the same size, and d, when all but one are 0 ("Understanding and Minimising Outlier Features
    in Transformer Training", arXiv 2405.19279). It compares features over all images; vector kurtosis compares them in each image.

    Args:
        h: (n, d), or embeddings. Vectors with nan or inf are left out.

    Returns:
        The kurtosis; nan if no vector is left, or all are 0.

    >>> rms_kurtosis(torch.tensor([[1.0, -1.0], [-2.0, 2.0]])), rms_kurtosis(torch.tensor([[1.0, 0.0]]))
    (1.0, 2.0)
    """
    h = representations(h)
    scale = max(float(block[block.isfinite()].abs().max()) if bool(block.isfinite().any()) else 0.0 for block in blocks(h))
    if not scale:
        return math.nan
    s = torch.zeros(h.shape[1], dtype=torch.float64, device=h.device)
    for block in blocks(h):
        s += (block[block.isfinite().all(-1)] / scale).square().sum(0)  # the number of vectors cancels
    s /= s.amax()
    return float(s.square().mean() / s.mean().square())


@dataclass(frozen=True)
class LayerNormOutliers:
    """The features that are outliers among the parameters of the LayerNorms.

    Attributes:
        indices: int64 (k,), the features whose γ, or whose β, is an outlier in at least half of the LayerNorms.
        gain_share: float64 (d,), the share of the LayerNorms in which γ of a feature is an outlier.
        bias_share: float64 (d,), the share of the LayerNorms with a bias in which β is an outlier; nan if none has a bias.
        names: the names of the LayerNorms.
    """

    indices: Tensor
    gain_share: Tensor
    bias_share: Tensor
    names: tuple[str, ...]


def layer_norm_outliers(model: nn.Module, features: int | None = None, sigma: float = 3.0, share: float = 0.5) -> LayerNormOutliers:
    """Outlier features by the weights alone: LayerNorm gains or biases beyond 3σ of their layer in at least half of the LayerNorms.

    Kovaleva et al. ("BERT Busters", Findings of ACL 2021, arXiv 2105.06990) and Puccetti et al. (Findings of EMNLP 2022, arXiv 2205.11380).
    They use the LayerNorms at the output of a layer; we use all LayerNorms of one width.

    Args:
        model: any module. Every ``nn.LayerNorm`` over one dimension in it counts, subclasses too.
        features: their width; may be left out if all have the same.
        sigma: standard deviations (population) from the mean of γ, or of β, that make an outlier.
        share: share of the LayerNorms in which an outlier feature must be an outlier.

    Raises:
        ValueError: no LayerNorm with parameters, none of that width, or several widths to choose from.

    >>> norms = nn.Sequential(nn.LayerNorm(32), nn.LayerNorm(32))
    >>> for norm in norms:
    ...     _ = norm.weight.data[7].fill_(9.0)
    >>> layer_norm_outliers(norms).indices
    tensor([7])
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine and len(module.normalized_shape) == 1
    }
    widths: dict[int, int] = {}
    for module in norms.values():
        widths[module.normalized_shape[0]] = widths.get(module.normalized_shape[0], 0) + 1
    found = ", ".join(f"{count} of width {width}" for width, count in sorted(widths.items())) or "none"
    if features is None and len(widths) == 1:
        (features,) = widths
    if features not in widths:
        wanted = "features= must say which width" if features is None else f"none has width {features}"
        raise ValueError(f"LayerNorms with parameters in this model: {found}; {wanted}")
    chosen = {name: module for name, module in norms.items() if module.normalized_shape[0] == features}
    gain = _beyond([module.weight for module in chosen.values()], features, sigma)
    bias = _beyond([module.bias for module in chosen.values() if module.bias is not None], features, sigma)
    return LayerNormOutliers(((gain >= share) | (bias >= share)).nonzero().flatten(), gain, bias, tuple(chosen))


def _beyond(parameters: Sequence[Tensor], features: int, sigma: float) -> Tensor:
    """For each element, the share of the vectors in which it is more than ``sigma`` standard deviations from the mean of the vector."""
    if not parameters:
        return torch.full((features,), math.nan, dtype=torch.float64)
    rows = torch.stack([parameter.detach().double().cpu() for parameter in parameters])
    deviation = (rows - rows.mean(-1, keepdim=True)).abs()
    return (deviation > sigma * rows.std(-1, correction=0, keepdim=True)).double().mean(0)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
