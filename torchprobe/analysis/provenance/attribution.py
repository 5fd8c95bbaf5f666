"""Which part of the residual stream writes a feature: the sum over branches, with the scale of every LayerNorm outside of them held.

h_f = Σ_k ⟨∂h_f/∂c_k, c_k⟩ + biases after the stream. The c_k are what the branches add, and what comes before the first block. The gradient
runs along the stream only: branches are cut off where they read it. It is taken with the standard deviation of each LayerNorm outside the
blocks as a constant, and with the gates of ReLUs as they are; centering is part of it. With these held, h is linear in each c_k, so the
sum is exact. It is checked for every image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.analysis.provenance.calls import inputs_changed, outputs_changed
from torchprobe.analysis.provenance.norms import lengths_held, norm_of
from torchprobe.analysis.provenance.stream import Branch, Stream, UnknownStructure

TOLERANCE = 1e-9
"""The largest error of the sum, as a share of the largest |h_f|. In float64, 1e-12 is usual."""

NOT_FINITE = "the network has nan or inf for some images, so their features have no parts: leave these images out"


@dataclass
class Sums:
    """Sums over images for one feature.

    Attributes:
        parts: float64 (images, components), what each component adds to h_f; first the stem if there is one, then the branches.
        constants: what each bias after the stream adds to h_f, the same for every image.
        gradients: Σ over images of ±∂h_f/∂θ for parameters outside the blocks, by name.
        rows: by branch, Σ ± over images and positions of what each feature of the stream adds, float64 (features of the stream,).
        slopes: by branch, Σ ± over images and positions of ∂h_f/∂c, float64 (features of the stream,).
    """

    parts: list[Tensor] = field(default_factory=list)
    constants: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    slopes: dict[tuple[str, int], Tensor] = field(default_factory=dict)


class Attribution:
    """Attributes features of the representation to the branches of a stream, batch by batch.

    Args:
        model: in float64 and eval mode. Its parameters are frozen, except those outside the blocks.
        stream: see :func:`find_stream`.
        features: to attribute.

    Attributes:
        h: float64 (images, d), batch by batch.
        sums: by feature.
        stem: whether something from before the first block reaches the end along the stream.
        before: the names of the parameters before the first block that reach it.
    """

    def __init__(self, model: nn.Module, stream: Stream, features: Sequence[int]) -> None:
        self.model, self.stream, self.features = model, stream, tuple(features)
        self.h: list[Tensor] = []
        self.sums = {feature: Sums() for feature in self.features}
        self.stem = not stream.cut
        self.before: set[str] = set()
        inside = tuple(f"{block}." for block in stream.blocks)
        self.outside = {name: p for name, p in model.named_parameters() if not name.startswith(inside)}
        chosen = self.outside.values()
        for p in model.parameters():
            p.requires_grad_(False)
        for p in chosen:
            p.requires_grad_(p.is_floating_point())
        outer = ((name, norm_of(module)) for name, module in model.named_modules() if not f"{name}.".startswith(inside))
        self._norms = [(name, norm) for name, norm in outer if norm is not None]

    def add(self, inputs: Tensor) -> None:
        """Attributes one batch, and adds it to the sums.

        Raises:
            UnknownStructure: the representation is not linear in the stream, so the parts do not sum to it.
            ValueError: the encoder does not return (N, d), or a feature is nan or inf.
        """
        leaves: dict[tuple[str, int], Tensor] = {}
        read: list[Tensor] = []

        def stem(x: Tensor) -> Tensor:
            x = x if self.stem and x.requires_grad else x.detach().requires_grad_()
            read.append(x)
            return x.clone()  # the block may change it in place

        def leaf(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                leaves[key] = output.detach().requires_grad_()
                return leaves[key].clone()

            return change

        starts = {name: Tensor.detach for branch in self.stream.branches for name in branch.starts}
        ends = {branch.key: leaf(branch.key) for branch in self.stream.branches}
        with (
            torch.enable_grad(),
            inputs_changed(self.model, starts),
            inputs_changed(self.model, {self.stream.blocks[0]: stem}),
            outputs_changed(self.model, ends),
            lengths_held(self.model, self._norms, UnknownStructure, NOT_FINITE),
        ):
            h = self.model(inputs)
        if not isinstance(h, Tensor) or h.dim() != 2:
            raise UnknownStructure(f"the encoder returned {type(h).__name__}; expected one vector for each image, (N, d)")
        if not bool(h[:, list(self.features)].isfinite().all()):
            raise UnknownStructure(NOT_FINITE)
        components = [*read[:1], *(leaves[branch.key] for branch in self.stream.branches)]
        if not self.before and self.stem and components[0].grad_fn is not None:
            found = torch.autograd.grad(components[0].sum(), self._thawed(), retain_graph=True, allow_unused=True)
            self.before = {name for name, g in zip(self._thawed_names(), found, strict=True) if g is not None}
        for feature in self.features:
            self._feature(h, feature, components)
        self.h.append(h.detach())

    def _feature(self, h: Tensor, feature: int, components: Sequence[Tensor]) -> None:
        sums, value = self.sums[feature], h[:, feature]
        sign = torch.where(value.detach() < 0, -1.0, 1.0).to(value)
        found = torch.autograd.grad((value * sign).sum(), [*components, *self._thawed()], retain_graph=True, allow_unused=True)
        gradients, of_parameters = found[: len(components)], found[len(components) :]
        parts = []
        for i, (component, gradient) in enumerate(zip(components, gradients, strict=True)):
            product = torch.zeros_like(component) if gradient is None else gradient * component.detach()
            parts.append(product.reshape(len(value), -1).sum(1) * sign)  # some blocks flatten images and positions
            if i:
                branch = self.stream.branches[i - 1]
                slope = torch.zeros_like(component) if gradient is None else gradient
                _add(sums.rows, branch.key, over_positions(product, branch.features))
                _add(sums.slopes, branch.key, over_positions(slope, branch.features))
        for name, gradient in zip(self._thawed_names(), of_parameters, strict=True):
            if gradient is not None:
                _add(sums.gradients, name, gradient)
        if not self.h:
            self._constants(sums, value)
        sums.parts.append(torch.stack(parts, 1))
        self._check(value.detach(), sums.parts[-1].sum(1) + sum(sums.constants.values()))

    def _constants(self, sums: Sums, value: Tensor) -> None:
        """What the biases after the stream add. It is the same for all images, so the first one is enough; the check is over all."""
        names = [name for name in sums.gradients if name not in self.before and is_bias(name)]
        biases = [self.outside[name] for name in names]
        found = torch.autograd.grad(value[0], biases, retain_graph=True, allow_unused=True) if biases else ()
        sums.constants = {
            name: float((gradient * bias.detach()).sum())
            for name, bias, gradient in zip(names, biases, found, strict=True)
            if gradient is not None
        }

    def _check(self, value: Tensor, total: Tensor) -> None:
        off = (total - value).abs()
        if not bool((off <= TOLERANCE * value.abs().max()).all()):
            worst = int(off.nan_to_num(nan=float("inf")).argmax())
            raise UnknownStructure(
                f"the parts of the stream sum to {float(total[worst]):.6g}, but the feature is {float(value[worst]):.6g}. So what "
                f"follows {self.stream.blocks[-1]!r} is not linear when the scale of its LayerNorm is held: a pooling by attention, an "
                "activation or a normalization. No part can be attributed exactly"
            )

    def _thawed_names(self) -> list[str]:
        return [name for name, p in self.outside.items() if p.requires_grad]

    def _thawed(self) -> list[Tensor]:
        return [p for p in self.outside.values() if p.requires_grad]


def is_bias(name: str) -> bool:
    """Whether a parameter after the stream is added to it."""
    return name.rpartition(".")[2].endswith("bias")


def over_positions(x: Tensor, features: int) -> Tensor:
    """The sum over images and positions: (features,)."""
    moved = x.movedim(features, -1)
    return moved.reshape(-1, moved.shape[-1]).sum(0)


def _add(sums: dict[Any, Tensor], key: object, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value.clone()


__all__ = ["Attribution", "Branch", "Sums", "is_bias", "over_positions"]
