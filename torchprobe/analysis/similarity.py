"""The similarity of the layers of two models: linear CKA, unbiased, accumulated over mini-batches, all pairs in one pass.

    CKA(X, Y) = Σ HSIC₁(K, L) / √(Σ HSIC₁(K, K) · Σ HSIC₁(L, L)),  sums over batches

    HSIC₁(K, L) = [ tr(KL) + (1ᵀK1)(1ᵀL1) / ((n−1)(n−2)) − 2 · 1ᵀKL1 / (n−2) ] / (n(n−3))

with K = X Xᵀ and L = Y Yᵀ of n images, with zero diagonals (Nguyen, Raghu and Kornblith 2021, https://arxiv.org/abs/2010.15327, after Song
et al. 2012). It is 1 for features that are equal up to rotation, scale and a constant. Independent features give 0 on average.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from torchprobe.analysis.grams import Features, Grams, Pooling
from torchprobe.common.runs import CountCallback
from torchprobe.recording.layers import Layer, Selection, select_layers
from torchprobe.rendering.heatmap import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | tuple[Tensor, Tensor] | list[Tensor]
FeatureDim = int | Mapping[str, int] | None
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MIN_BATCH = 4
"""The smallest number of images in a batch: HSIC₁ divides by n − 3."""


@dataclass(frozen=True, eq=False)
class Similarity:
    """CKA of all pairs of layers.

    Attributes:
        values: float64 on the CPU, shape (layers_a, layers_b). nan for a layer that is constant over the images of every batch, or that
            has nan or infinity.
        layers_a, layers_b: the names of the rows and of the columns.
        images, batches: the numbers of images and batches that were used.
        left_out: the number of images in batches of fewer than four, which have no HSIC₁.
        pooling: how maps and tokens were turned into vectors.
    """

    values: Tensor
    layers_a: list[str]
    layers_b: list[str]
    images: int
    batches: int
    left_out: int
    pooling: Pooling

    def rows(self) -> list[dict[str, Any]]:
        """One row per pair: ``layer_a``, ``layer_b``, ``cka``."""
        pairs = itertools.product(self.layers_a, self.layers_b)
        return [{"layer_a": a, "layer_b": b, "cka": value} for (a, b), value in zip(pairs, self.values.flatten().tolist(), strict=True)]

    def heat_map(self, *, name_a: str = "", name_b: str = "", width: float = 9.0) -> Figure:
        """A figure with the layers of the first model from top to bottom and those of the second from left to right; needs matplotlib."""
        a, b = self.layers_a, self.layers_b
        return heat_map(self.values, a, b, "CKA", row_label=name_a, column_label=name_b, limits=(0.0, 1.0), width=width)


def similarity(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable[Batch],
    layers_a: Selection | None = None,
    layers_b: Selection | None = None,
    *,
    pooling: Pooling = "flatten",
    drop_a: Features | None = None,
    drop_b: Features | None = None,
    feature_dim_a: FeatureDim = None,
    feature_dim_b: FeatureDim = None,
    device: torch.device | str | None = None,
    progress: CountCallback | None = None,
) -> Similarity:
    """Linear CKA (unbiased, mini-batch) between every layer of one model and every layer of another, from one pass.

    Args:
        model_a, model_b: any modules, which may be the same one. They run in eval mode without gradients; their modes are restored.
        batches: of at least four images each. A batch is one input (n, …) for both models, or a pair of inputs of the same images if the
            models preprocess differently. Every batch has the same weight, so use batches of equal size. A batch of fewer than four
            images, such as a short last one, is left out with a warning.
        layers_a, layers_b: as for :func:`torchprobe.record`, its default if None. Rows and columns are in the order of a list, otherwise in
            the order in which the layers run. A layer that runs several times in a forward pass counts with its last call.
        pooling: the features of a map or a sequence: "flatten", each position has its own features (as in the paper); "mean", the mean over
            positions.
        drop_a, drop_b: features to leave out of every layer, such as outlier features, or {name or glob: features}. The coordinates of
            large variance dominate linear CKA.
        feature_dim_a, feature_dim_b: see :func:`torchprobe.record`; used by ``pooling="mean"`` and by ``drop``.
        device: the models are moved there; None: they stay where they are. Sums are kept there. The host waits for them once, at the end.
        progress: called with (batches done, batches in all) after every batch.

    Raises:
        ValueError: no batch of at least four images; a pair with different numbers of images; a layer that a model does not have or that
            did not run; or an output whose shape does not tell the images apart.
        TypeError: a batch that is neither a tensor nor a pair of tensors, or that looks like images with their labels.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> similarity(model, model, [torch.randn(32, 8)], ["0", "2"], "1").rows()[1]["layer_a"]
    '2'
    """
    if device is not None:
        model_a.to(device)
        model_b.to(device)
    chosen_a, chosen_b = select_layers(model_a, layers_a, feature_dim_a), select_layers(model_b, layers_b, feature_dim_b)
    inputs = _Inputs(batches)
    # One forward pass is enough for one model with one input, unless its layers are read in two ways.
    once = model_a is model_b and not inputs.pairs and (drop_a, feature_dim_a) == (drop_b, feature_dim_b)
    sums: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        grams_a = stack.enter_context(Grams(model_a, _union(chosen_a, chosen_b) if once else chosen_a, pooling, drop_a))
        grams_b = grams_a if once else stack.enter_context(Grams(model_b, chosen_b, pooling, drop_b))
        place_a, place_b = _device(model_a), _device(model_b)
        for images_a, images_b in inputs:
            n = len(images_a)
            a = grams_a.run(_on(images_a, place_a))
            b = a if once else grams_b.run(_on(images_b, place_b)).to(a.device)
            parts = [_hsic(a, b, n), _hsic(a, None, n), _hsic(b, None, n)]
            sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
            if progress is not None:
                progress(inputs.batches, inputs.total)
    if inputs.batches == 0:
        given = f"{inputs.left_out} images were given, in smaller batches" if inputs.left_out else "no batch was given"
        raise ValueError(f"CKA needs batches of at least {MIN_BATCH} images; {given}")
    if inputs.left_out:
        warnings.warn(f"{inputs.left_out} images were left out, in batches of fewer than {MIN_BATCH}", stacklevel=2)
    names_a = _ordered(model_a, layers_a, chosen_a, grams_a.fired)
    names_b = _ordered(model_b, layers_b, chosen_b, grams_b.fired)
    ab, aa, bb = sums
    values = (ab / (aa.sqrt()[:, None] * bb.sqrt())).cpu().double()
    picked = values[[grams_a.names.index(name) for name in names_a]][:, [grams_b.names.index(name) for name in names_b]]
    return Similarity(picked, names_a, names_b, inputs.images, inputs.batches, inputs.left_out, pooling)


def _same_arguments(function: Callable[Arguments, object]) -> Callable[[Callable[..., Result]], Callable[Arguments, Result]]:
    """Decorates a function that takes the arguments of another one."""

    def decorate(decorated: Callable[..., Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(function).replace(return_annotation=inspect.signature(decorated).return_annotation)
        decorated.__dict__["__signature__"] = signature
        return decorated

    return decorate


@_same_arguments(similarity)
def cka(*args: Any, **kwargs: Any) -> Tensor:
    """The values of :func:`similarity`, which documents the arguments.

    Returns:
        float64 on the CPU, shape (layers_a, layers_b). nan for a layer that is constant or has nan or infinity. float32 activations should
        lie between about 1e-17 and 1e17, so that their squares are finite and not 0.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> cka(model, model, [torch.randn(32, 8)], "*", "*").diagonal().round(decimals=9)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    return similarity(*args, **kwargs).values


def _hsic(a: Tensor, b: Tensor | None, n: int) -> Tensor:
    """HSIC₁ of all pairs of rows of :meth:`Grams.run`, or of each row with itself if ``b`` is None.

    tr(KL), 1ᵀKL1 and (1ᵀK1)(1ᵀL1) are products of the matrices, of the sums of their rows, and of the sums of these. So each of the three
    is one matrix product for all pairs of layers.
    """

    def products(start: int, stop: int | None) -> Tensor:
        x = a[:, start:stop]
        product: Tensor = torch.linalg.vector_norm(x, dim=1).square() if b is None else x @ b[:, start:stop].T
        return product

    trace = 2 * products(0, n * n)  # the rows hold only what is above the diagonal
    rows, total = products(n * n, n * n + n), products(n * n + n, None)
    return (trace - rows * (2 / (n - 2)) + total / ((n - 1) * (n - 2))) / (n * (n - 3))


class _Inputs:
    """The batches as pairs of inputs, checked and counted. Batches that are too small are left out."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Tensor):
            raise TypeError("batches must be a list or an iterator of batches, not one tensor: give [x] for one batch")
        self.total = operator.length_hint(batches)
        self.images = self.batches = self.left_out = 0
        iterator = iter(batches)
        first = next(iterator, None)
        self.pairs = isinstance(first, (tuple, list))
        self._rest = iterator if first is None else itertools.chain([first], iterator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._rest):
            if isinstance(batch, (tuple, list)) != self.pairs:
                raise TypeError(f"batch {number} is {'not a' if self.pairs else 'a'} pair, unlike the first")
            pair = tuple(batch) if self.pairs else (batch, batch)
            if len(pair) != 2 or not all(isinstance(images, Tensor) and images.dim() for images in pair):
                kinds = ", ".join(type(part).__name__ for part in pair) if self.pairs else type(batch).__name__
                raise TypeError(f"batch {number} is neither a tensor nor a pair of tensors of images, one for each model: {kinds}")
            a, b = pair
            if self.pairs and b.dim() == 1 and not b.is_floating_point():
                raise TypeError(
                    f"batch {number} looks like images and their labels; a pair holds the input of each model, so leave the labels out"
                )
            if len(a) != len(b):
                raise ValueError(
                    f"batch {number} has {len(a)} images for the first model and {len(b)} for the second: both see the same images"
                )
            if len(a) < MIN_BATCH:
                self.left_out += len(a)
                continue
            self.batches += 1
            self.images += len(a)
            yield a, b


def _union(a: list[Layer], b: list[Layer]) -> list[Layer]:
    names = {layer.name for layer in a}
    return [*a, *(layer for layer in b if layer.name not in names)]


def _ordered(model: nn.Module, layers: Selection | None, chosen: list[Layer], fired: list[str]) -> list[str]:
    """The chosen names in the order of a list, otherwise in the order in which the layers ran."""
    groups = [select_layers(model, [pattern]) for pattern in layers] if isinstance(layers, (list, tuple)) else [chosen]
    ordered = [name for group in groups for name in sorted((layer.name for layer in group), key=fired.index)]
    return list(dict.fromkeys(ordered))


def _device(model: nn.Module) -> torch.device | None:
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def _on(images: Tensor, device: torch.device | None) -> Tensor:
    return images if device is None else images.to(device, non_blocking=True)
