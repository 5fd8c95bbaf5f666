"""The Gram matrix of each layer of a model, batch by batch: what linear CKA needs of a layer's activations, and all it keeps of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprobe.recording.layers import Layer, default_feature_dim, matches_glob
from torchprobe.recording.tensors import first_tensor

Pooling = Literal["flatten", "mean"]
Features = Iterable[int] | Mapping[str, Iterable[int]]

_BLOCK = 2**18
"""Numbers that are centred and multiplied at a time on the CPU: about what its caches hold."""


def gram(x: Tensor) -> Tensor:
    """Gram matrix X Xᵀ of features (n, d) without their mean over the n, the diagonal zero: (n, n), float64 for float64, else float32.

    HSIC₁ does not depend on the mean, but rounding does. The first row is subtracted before the mean: what is constant becomes
    exactly 0.

    >>> gram(torch.tensor([[1000.0], [1001.0], [1002.0]])).tolist()
    [[0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]
    """
    n, d = x.shape
    x = x if x.dtype == torch.float64 else x.float()
    product = x.new_zeros(n, n)
    for block in x.split(max(1, _BLOCK // n) if x.device.type == "cpu" else d, 1):
        centred = block - block[0]
        centred -= centred.mean(0)
        product.addmm_(centred, centred.T)
    return product.fill_diagonal_(0)


class Grams:
    """Forward hooks on some layers of a model, removed at the end of the block. In it the model is in eval mode and runs eagerly.

    A layer that a forward pass calls several times counts with its last call.

    Args:
        model: any module.
        layers: of it, from :func:`torchprobe.recording.select_layers`.
        pooling: "flatten": every position of a map or a sequence is a feature of its own; "mean": the mean over positions.
        drop: indices of features to leave out of every layer, or {name or glob: indices}.

    Raises:
        ValueError: a layer that takes no hooks, or a name in ``drop`` that is none of the layers.

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
        if scripted := [layer.name for layer in layers if isinstance(layer.module, torch.jit.ScriptModule)]:
            raise ValueError(f"layer {scripted[0]!r} is a scripted module, which takes no hooks: give the model before torch.jit.script")
        self.model = model
        self.layers = list(layers)
        self.pooling = pooling
        self.names: list[str] = []  # in the order in which they run; known after the first run
        self._dropped = _dropped(self.layers, drop)
        self._batch_dim: dict[str, int] = {}
        self._unclear = False
        self._rows: dict[str, Tensor] = {}
        self._images = 0  # in the running forward pass; 0: it is none of ours
        self._indices: dict[tuple[str, torch.device], Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Grams:
        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.module.register_forward_hook(self._hook(layer)).remove)
            for module, training in [(module, module.training) for module in self.model.modules()]:
                stack.callback(setattr, module, "training", training)
            self.model.eval()
            if "torch._dynamo" in sys.modules:  # something may be compiled, in graphs that know nothing of these hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.clear()
        self._stack.close()

    def run(self, images: Tensor) -> Tensor:
        """One forward pass over n images: for each layer, in the order of ``names``, its Gram matrix, the sums of its rows, and their sum.

        Returns:
            float64 (float32 where a device has none), shape (layers, n² + n + 1), on the device of the first layer.

        Raises:
            ValueError: a layer did not run, gave no tensor, or one in which the images cannot be told apart.
        """
        self._forward(images, self._read)
        if not self.names and self._unclear:
            before = dict(self._batch_dim)
            self._forward(images[:1], self._look)
            if self._batch_dim != before:
                self._forward(images, self._read)
        self.names = self.names or list(self._rows)
        device = self._rows[self.names[0]].device
        try:
            return torch.stack([self._rows[name].to(device) for name in self.names])
        finally:
            self._rows.clear()

    def _forward(self, images: Tensor, visit: Callable[[Layer, Tensor], None]) -> None:
        self._images, self._visit, seen = len(images), visit, set[str]()
        self._visited = seen
        try:
            self.model(images)
        finally:
            self._images = 0
        if missing := [layer.name for layer in self.layers if layer.name not in seen]:
            model = type(self.model).__name__
            raise ValueError(f"layer {missing[0]!r} is not called by the forward pass of {model}, or gives no tensor: leave it out")

    def _hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._images and (x := first_tensor(output)) is not None:
                self._visited.add(layer.name)
                self._visit(layer, x.detach())

        return hook

    def _look(self, layer: Layer, x: Tensor) -> None:
        """With one image it is plain to see which dimension is that of the images: some transformers have (tokens, images, features)."""
        if x.dim() > 2 and _feature_dim(layer, x) != 1 and (x.shape[0] == 1) != (x.shape[1] == 1):
            self._batch_dim[layer.name] = 0 if x.shape[0] == 1 else 1

    def _read(self, layer: Layer, x: Tensor) -> None:
        x = self._vectors(layer, x)
        with exact_products(x.device.type):
            k = gram(x)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        row = torch.empty(k.numel() + len(k) + 1, dtype=wide, device=k.device)
        row[: k.numel()] = k.flatten()
        sums = row[k.numel() : -1]
        torch.sum(row[: k.numel()].view_as(k), 1, out=sums)
        row[-1] = sums.sum()
        self._rows[layer.name] = row

    def _vectors(self, layer: Layer, x: Tensor) -> Tensor:
        """The activation as one vector for each image, (n, d)."""
        name = layer.name
        if x.is_nested or x.dim() < 2:
            given = "a nested tensor" if x.is_nested else f"shape {tuple(x.shape)}"
            raise ValueError(f"layer {name!r} gives {given}, where vectors, tokens or maps of each image were expected")
        feature_dim = _feature_dim(layer, x)
        if name not in self._batch_dim:
            fitting = [i for i in range(2) if x.shape[i] == self._images and i != feature_dim]
            self._batch_dim[name] = fitting[0] if fitting else 0
            self._unclear |= len(fitting) > 1 or fitting == [1]
        batch_dim = self._batch_dim[name]
        if x.shape[batch_dim] != self._images:
            raise ValueError(f"layer {name!r} gives shape {tuple(x.shape)} for {self._images} images, in which they cannot be told apart")
        if name in self._dropped:
            x = x.index_select(feature_dim, self._kept(name, x.shape[feature_dim], x.device))
        if self.pooling == "mean" and x.dim() > 2:
            positions = [i for i in range(x.dim()) if i not in (batch_dim, feature_dim)]
            x = (x if x.dtype == torch.float64 else x.float()).mean(positions)
            batch_dim = 0 if batch_dim < feature_dim else 1
        return x.movedim(batch_dim, 0).flatten(1)

    def _kept(self, name: str, width: int, device: torch.device) -> Tensor:
        dropped = self._dropped[name]
        if wrong := sorted(i for i in dropped if not 0 <= i < width):
            raise ValueError(f"layer {name!r} has the features 0 to {width - 1}; {wrong[0]} cannot be left out")
        if len(dropped) == width:
            raise ValueError(f"layer {name!r} has no features but those that are to be left out")
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.tensor([i for i in range(width) if i not in dropped], device=device)
        return self._indices[name, device]


def _feature_dim(layer: Layer, x: Tensor) -> int:
    dim = default_feature_dim(layer, x.dim()) if layer.feature_dim is None else layer.feature_dim
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"layer {layer.name!r} gives {x.dim()} dimensions, and feature_dim={dim} is none of them")
    return dim % x.dim()


def _dropped(layers: Sequence[Layer], drop: Features | None) -> dict[str, frozenset[int]]:
    """Layer → the features to leave out."""
    if drop is None:
        return {}
    by_pattern = drop if isinstance(drop, Mapping) else {"**": drop}
    dropped: dict[str, frozenset[int]] = {}
    for pattern, features in by_pattern.items():
        matched = [layer.name for layer in layers if any(name == pattern or matches_glob(pattern, name) for name in layer.names)]
        if not matched:
            raise ValueError(f"drop: {pattern!r} is none of the layers {', '.join(repr(layer.name) for layer in layers)}")
        indices = frozenset(int(i) for i in features)
        dropped |= {name: dropped.get(name, frozenset()) | indices for name in matched if indices}
    return dropped


@contextlib.contextmanager
def exact_products(device: str) -> Iterator[None]:
    """Products of float32 matrices in float32, whatever autocast, TF32 or bfloat16 the model is run with."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
