"""The Gram matrix of each layer of a model, batch by batch. Linear CKA needs and keeps nothing else of the activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from torchprobe.common.precision import full_products, in_full
from torchprobe.recording.layers import Layer, matches_glob
from torchprobe.recording.reader import LayerReader, Layout

Pooling = Literal["flatten", "mean"]
Features = Iterable[int] | Mapping[str, Iterable[int]]

_BLOCK = 2**18
"""Numbers that are shifted and multiplied at a time on the CPU: about the size of its caches."""

_ROWS = 64
"""Rows of a product at a time on the CPU, from the diagonal on, because half of a symmetric matrix need not be computed."""

_NEAR = 8
"""The number of rows whose mean is subtracted."""


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The Gram matrix X Xᵀ of shifted features (n, d) above its diagonal, otherwise 0: (n, n), float64 (float32 on MPS).

    The same vector is subtracted from every row. HSIC₁ does not depend on it, but rounding does. It is the mean of the shortest rows, which
    one very long row does not move. It is computed in float64, so that constant features become exactly 0. Products are in float32 (float64
    for float64 features), and sums over blocks of features in float64.

    >>> gram(torch.tensor([[1000.0], [1003.0]])).tolist()
    [[0.0, -2.25], [0.0, 0.0]]
    """
    n, d = x.shape
    x = x if x.dtype == torch.float64 else x.float()
    width, height = (max(1, _BLOCK // n), _ROWS) if x.device.type == "cpu" else (max(1, d), n)
    near = torch.linalg.vector_norm(x[:, :width], dim=1).topk(min(n, _NEAR), largest=False, sorted=False).indices
    total = torch.empty(n, n, dtype=_wide(x.device), device=x.device) if out is None else out
    product, shifted = x.new_zeros(n, n), x.new_empty(n, min(width, d))
    for start in range(0, d, width):
        block = x[:, start : start + width]
        y = shifted[:, : block.shape[1]]
        torch.sub(block, block.index_select(0, near).mean(0, dtype=total.dtype).to(x.dtype), out=y)
        for i in range(0, n, height):
            torch.mm(y[i : i + height], y[i:].T, out=product[i : i + height, i:])
        if start:
            total += product
        else:
            total.copy_(product)
    for i in range(0, n, height):
        total[i : i + height, i : i + height].triu_(1)  # nothing was written below the diagonal
    return total


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class Grams:
    """The Gram matrices of some layers of a model; see :class:`torchprobe.recording.reader.LayerReader` for how they are read.

    A layer that a forward pass calls several times counts with its last call.

    Args:
        model: any module.
        layers: of it, from :func:`torchprobe.recording.select_layers`.
        pooling: "flatten": every position of a map or a sequence has its own features; "mean": the mean over positions.
        drop: indices of features to leave out of every layer, or {name or glob: indices}.

    Raises:
        ValueError: a layer that takes no hooks, or a name in ``drop`` that matches no layer.

    >>> from torchprobe.recording import select_layers
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with Grams(model, select_layers(model, "*")) as grams:
    ...     shape = grams.run(torch.zeros(5, 2)).shape
    >>> grams.names, shape == (2, 5 * 5 + 5 + 1)
    (['0', '1'], True)
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], pooling: Pooling = "flatten", drop: Features | None = None) -> None:
        if pooling not in ("flatten", "mean"):
            raise ValueError(f'pooling is "flatten" or "mean", got {pooling!r}')
        self._dropped = _dropped(layers, drop)
        self.reader = LayerReader(model, layers, features=pooling == "mean" or bool(self._dropped))
        self.pooling = pooling
        self.names = list(self.reader.layers)
        self._number = {name: i for i, name in enumerate(self.names)}
        self._rows = torch.empty(0, 0)
        self._indices: dict[tuple[str, torch.device], Tensor] = {}

    def __enter__(self) -> Grams:
        self.reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._rows = torch.empty(0, 0)
        self.reader.__exit__(*error)

    @property
    def fired(self) -> list[str]:
        """The names in the order in which the layers run; known after the first run."""
        return self.reader.fired

    def run(self, images: Tensor) -> Tensor:
        """One forward pass over n images.

        Returns:
            float64 (float32 if a device does not have it), shape (layers, n² + n + 1), on the device of the first layer that runs. The rows
            are in the order of ``names``. The first n² numbers are the Gram matrix above its diagonal, otherwise 0. The next n are the sums
            of the rows of the whole matrix without its diagonal, and the last is their sum. The next run overwrites the result.

        Raises:
            ValueError: see :meth:`torchprobe.recording.reader.LayerReader.read`.
        """
        n = len(images)

        def put(layer: Layer, x: Tensor, layout: Layout) -> None:
            if self._rows.shape[1] != n * n + n + 1:
                self._rows = torch.empty(len(self.names), n * n + n + 1, dtype=_wide(x.device), device=x.device)
            row = self._rows[self._number[layer.name]]
            matrix, sums = row[: n * n].view(n, n), row[n * n : -1]
            with exact_products(x.device.type):
                k = gram(self._vectors(layer.name, x, layout), matrix if x.device == matrix.device else None)
            if k is not matrix:  # a model spread over several devices
                matrix.copy_(k)
            torch.sum(matrix, 1, out=sums)
            sums += matrix.sum(0)
            torch.sum(sums, 0, out=row[-1])

        self.reader.read(images, put)
        return self._rows

    def _vectors(self, name: str, x: Tensor, layout: Layout) -> Tensor:
        """The activation as one vector for each image, (n, d)."""
        _, batch_dim, feature_dim = layout
        if name in self._dropped:
            x = x.index_select(feature_dim, self._kept(name, x.shape[feature_dim], x.device))
        if self.pooling == "mean" and x.dim() > 2:
            positions = [i for i in range(x.dim()) if i not in (batch_dim, feature_dim)]
            x = (x if x.dtype == torch.float64 else x.float()).mean(positions)
            batch_dim = 0 if batch_dim < feature_dim else 1
        return rearrange(x.movedim(batch_dim, 0), "images ... -> images (...)")

    def _kept(self, name: str, width: int, device: torch.device) -> Tensor:
        dropped = self._dropped[name]
        if wrong := sorted(i for i in dropped if not 0 <= i < width):
            raise ValueError(f"layer {name!r} has the features 0 to {width - 1}; {wrong[0]} cannot be left out")
        if len(dropped) == width:
            raise ValueError(f"all {width} features of layer {name!r} would be left out")
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.tensor([i for i in range(width) if i not in dropped], device=device)
        return self._indices[name, device]


def _dropped(layers: Sequence[Layer], drop: Features | None) -> dict[str, frozenset[int]]:
    """Layer → the features to leave out."""
    if drop is None:
        return {}
    by_pattern = drop if isinstance(drop, Mapping) else {"**": drop}
    dropped: dict[str, frozenset[int]] = {}
    for pattern, features in by_pattern.items():
        matched = [layer.name for layer in layers if any(name == pattern or matches_glob(pattern, name) for name in layer.names)]
        if not matched:
            raise ValueError(f"drop: {pattern!r} matches none of the layers {', '.join(repr(layer.name) for layer in layers)}")
        indices = frozenset(int(i) for i in features)
        dropped |= {name: dropped.get(name, frozenset()) | indices for name in matched if indices}
    return dropped


def exact_products(device: str) -> contextlib.AbstractContextManager[object]:
    """Products of float32 matrices in float32, also if the model runs with autocast, TF32 or bfloat16."""
    return contextlib.nullcontext() if full_products() and not torch.is_autocast_enabled(device) else _in_full(device)


@contextlib.contextmanager
def _in_full(device: str) -> Iterator[None]:
    with in_full(), torch.autocast(device, enabled=False):
        yield
