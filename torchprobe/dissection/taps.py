"""What the layers of a model give for a batch of images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.dissection.bases import check_basis, project
from torchprobe.dissection.maps import as_maps
from torchprobe.ops.positions import vectors_of
from torchprobe.recording.layers import Layer, Selection, default_feature_dim, select_layers
from torchprobe.recording.tensors import first_tensor

POSITIONS = ("patch", "class", "all")


@dataclass(frozen=True, eq=False)
class Site:
    """How to read the activation of one layer.

    ``dims`` of the activation; which of them holds the images (``batch_dim``) and the features (``feature_dim``); ``grid``: rows and
    columns of the patches among tokens; ``basis`` (k, features) or None for the units themselves.
    """

    layer: str
    dims: int
    batch_dim: int
    feature_dim: int
    features: int
    grid: tuple[int, int] | None = None
    positions: str = "patch"
    basis: Tensor | None = None

    @property
    def units(self) -> int:
        """Units or directions."""
        return self.features if self.basis is None else len(self.basis)

    @property
    def has_map(self) -> bool:
        """Whether there are positions on a plane: not for pooled vectors, nor for the class token."""
        return self.dims == 4 or (self.dims == 3 and self.positions == "patch")

    def read(self, x: Tensor, images: int) -> Tensor:
        """The activation as (images, units, h, w), or (images, units) or (images, units, positions) if it has no plane.

        Raises:
            ValueError: it is of another kind than for the first image.
        """
        if x.dim() != self.dims or x.shape[self.feature_dim] != self.features or x.shape[self.batch_dim] != images:
            expected = f"{self.dims} dimensions, {images} images and {self.features} features"
            raise ValueError(f"layer {self.layer!r} gave shape {tuple(x.shape)}, where {expected} were expected as before")
        x = x.movedim((self.batch_dim, self.feature_dim), (0, -1)).movedim(-1, 1)  # images, features, the rest in order
        if self.dims == 3 and self.positions != "all":
            tokens = x.movedim(1, -1)
            x = vectors_of(tokens, "class", -1)[:, 0] if self.positions == "class" else self._maps(tokens)
        return x if self.basis is None else project(x, self.basis)

    def _maps(self, tokens: Tensor) -> Tensor:
        try:
            return as_maps(tokens, self.grid)
        except ValueError as error:
            raise ValueError(f'layer {self.layer!r}: {error}, or score all of them by average precision (positions="all")') from error


class Taps:
    """Forward hooks on some layers of a model, removed at the end of the block. In it the model is in eval mode and runs eagerly.

    A layer that a forward pass calls several times counts with its last call.

    Args:
        model: any module.
        layers: see :func:`torchprobe.record`.
        feature_dim: see :func:`torchprobe.record`.

    Raises:
        ValueError: a layer that the model does not have, or that takes no hooks.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    >>> with Taps(model, ["0", "1"]) as taps:
    ...     shapes = {name: tuple(x.shape) for name, x in taps.run(torch.zeros(2, 3, 8, 8)).items()}
    >>> shapes
    {'0': (2, 4, 8, 8), '1': (2, 4, 8, 8)}
    """

    def __init__(self, model: nn.Module, layers: Selection, feature_dim: int | Mapping[str, int] | None = None) -> None:
        self.model = model
        self.layers = {layer.name: layer for layer in select_layers(model, layers, feature_dim)}
        if scripted := [name for name, layer in self.layers.items() if isinstance(layer.module, torch.jit.ScriptModule)]:
            raise ValueError(f"layer {scripted[0]!r} is a scripted module, which takes no hooks: dissect the model before torch.jit.script")
        self.found: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Taps:
        with ExitStack() as stack:
            for layer in self.layers.values():
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
        self.found.clear()
        self._stack.close()

    def _hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if (x := first_tensor(output)) is not None:
                self.found[layer.name] = x

        return hook

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """One forward pass: the activation of each layer, detached.

        Raises:
            ValueError: a layer did not run, or gave no tensor.
        """
        self.found.clear()
        try:
            self.model(images)
            if missing := [name for name in self.layers if name not in self.found]:
                model = type(self.model).__name__
                raise ValueError(f"layer {missing[0]!r} is not called by the forward pass of {model}, or gives no tensor")
            return {name: self.found[name].detach() for name in self.layers}
        finally:
            self.found.clear()

    def sites(self, image: Tensor, positions: str = "patch", basis: Mapping[str, Tensor] | None = None) -> dict[str, Site]:
        """How to read each layer, found out with one image (1, …): then the dimension of the images is plain to see.

        The grid of tokens is that of the patch embedding: of the convolutions' outputs, the largest that fits into the tokens.
        """
        grids: list[tuple[int, int]] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                grids.append((output.shape[2], output.shape[3]))

        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, nn.Conv2d):
                    stack.callback(module.register_forward_hook(note).remove)
            activations = self.run(image)
        return {name: self._site(self.layers[name], x, grids, positions, basis or {}) for name, x in activations.items()}

    def _site(self, layer: Layer, x: Tensor, grids: list[tuple[int, int]], positions: str, basis: Mapping[str, Tensor]) -> Site:
        if x.dim() not in (2, 3, 4):
            raise ValueError(f"layer {layer.name!r} gives shape {tuple(x.shape)}: neither maps, nor tokens, nor one vector for each image")
        feature_dim = layer.feature_dim if layer.feature_dim is not None else default_feature_dim(layer, x.dim())
        feature_dim %= x.dim()
        # Some transformers have (tokens, images, features).
        batch_dim = 1 if x.dim() == 3 and feature_dim == 2 and x.shape[0] != 1 and x.shape[1] == 1 else 0
        if x.shape[batch_dim] != 1 or feature_dim == batch_dim:
            raise ValueError(f"layer {layer.name!r} gives shape {tuple(x.shape)} for one image, whose first dimension is not the images")
        grid = None
        if x.dim() == 3 and positions == "patch":
            tokens = x.shape[1 - batch_dim] if feature_dim == 2 else x.shape[2]
            fitting = [(h, w) for h, w in grids if h * w <= tokens < h * w + max(64, h * w // 4)]
            grid = max(fitting, key=lambda size: size[0] * size[1], default=None)
        features = x.shape[feature_dim]
        own = basis.get(layer.name)
        own = None if own is None else check_basis(own, features, layer.name)
        return Site(layer.name, x.dim(), batch_dim, feature_dim, features, grid, positions, own)
