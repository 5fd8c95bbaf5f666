"""Normalizations of a vector: LayerNorm, RMSNorm, and those that libraries wrote themselves, such as Llama's, Gemma's or OLMo's."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.analysis.provenance.calls import first_tensor, same

_IN_FLOAT32 = 1e-5
"""How far a norm of float64 may be off if its library computes it in float32."""

_USUAL_EPS = (1e-5, 1e-6, 1e-12)
"""Tried where a norm of a library does not say its ε."""


@dataclass(frozen=True)
class Norm:
    """(x − its mean, if ``centered``) / its length, times a gain, plus a bias: what a module does to a vector.

    Attributes:
        width: entries of the vector; None: any, as in NanoChat, whose norms have no parameters.
        eps: added to the mean square.
        centered: whether the mean is subtracted.
        offset: the gain is ``offset`` + weight: 0, or 1 in Gemma.
        own: whether a library wrote it itself. It may compute in float32, also of float64.
    """

    width: int | None
    eps: float
    centered: bool
    offset: float = 0.0
    own: bool = False

    def __call__(self, module: nn.Module, x: Tensor, dim: int = -1) -> Tensor:
        """What the module returns; the gradient takes the length as a constant."""
        centered = x - x.mean(dim, keepdim=True) if self.centered else x
        out = centered / (centered.square().mean(dim, keepdim=True) + self.eps).sqrt().detach()
        shape = [1] * x.dim()
        shape[dim] = -1
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None:
            out = out * (self.offset + weight).reshape(shape)
        return out if bias is None else out + bias.reshape(shape)


def norm_of(module: nn.Module) -> Norm | None:
    """What a module does, if it normalizes vectors; else None. It is asked by its output for a small input, not by its name.

    >>> norm_of(nn.LayerNorm(8)).centered, norm_of(nn.RMSNorm(8)).centered, norm_of(nn.Linear(8, 8))
    (True, False, None)
    """
    known = None
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if len(module.normalized_shape) != 1:
            return None
        eps = torch.finfo(torch.float64).eps if module.eps is None else module.eps
        known = Norm(module.normalized_shape[0], eps, isinstance(module, nn.LayerNorm))
        if type(module) in (nn.LayerNorm, nn.RMSNorm):
            return known
    found = _by_output(module)  # a subclass may do something else, such as Nemotron's, which adds 1 to the gain
    return known if found is None or known == replace(found, own=False) else found


def _by_output(module: nn.Module) -> Norm | None:
    parameters = dict(module.named_parameters())
    stated = [getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if isinstance(getattr(module, name, None), float)]
    shape: Sequence[int] = parameters["weight"].shape if "weight" in parameters else getattr(module, "normalized_shape", ())
    any_width = not parameters and not shape and bool(stated)
    shape = (8,) if any_width else shape
    if not {"weight", "bias"} >= parameters.keys() or len(shape) != 1 or any(p.shape != shape for p in parameters.values()):
        return None
    like = next(iter(parameters.values()), torch.empty(0, dtype=torch.float64))
    x = torch.linspace(-1.0, 2.0, 2 * shape[0], dtype=like.dtype, device=like.device).reshape(2, -1)
    x = torch.cat([x, 1e-3 * x])  # small ones tell ε
    kinds = itertools.product(stated or _USUAL_EPS, (False, True), (0.0, 1.0) if "weight" in parameters else (0.0,))
    norms = [Norm(None if any_width else shape[0], eps, centered, offset, own=True) for eps, centered, offset in kinds]
    for inputs in (x, x[..., None, None]):  # vectors, or maps of one position
        with contextlib.suppress(Exception), torch.no_grad():  # a module of another kind may refuse the input
            given = module.forward(inputs)  # without the hook that asks
            if given.shape == inputs.shape:
                for norm in norms:
                    if torch.allclose(given, norm(module, inputs, 1), rtol=_IN_FLOAT32, atol=_IN_FLOAT32):
                        return norm
    return None


@contextlib.contextmanager
def lengths_held(
    model: nn.Module, norms: Sequence[tuple[str, Norm]], refused: Callable[[str], Exception], not_finite: str
) -> Iterator[None]:
    """While the block lasts, these norms have the same output, but the gradient takes the length of the vector as a constant.

    Args:
        model: with the norms.
        norms: their names, and what they do.
        refused: makes the error for a norm that does something else in float64, or gives nan.
        not_finite: the message for nan or inf.
    """

    def hook_of(norm: Norm) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            x = first_tensor(args)
            assert x is not None
            if not bool(output.isfinite().all()):
                raise refused(not_finite)
            for dim in (-1, 1) if norm.width is not None else (-1,):
                if norm.width in (None, x.shape[dim]):
                    held = norm(module, x, dim)
                    off = (held.detach() - output.detach()).abs().max()
                    if same(held.detach(), output.detach()) or (norm.own and bool(off <= _IN_FLOAT32 * output.detach().abs().max())):
                        return held
            if norm.own:
                return None  # it does more than its vector told, as a GroupNorm over maps: whether the sum is exact is checked at the end
            raise refused(f"{type(module).__name__} is a LayerNorm by name, but its output is another one in float64")

        return hook

    with contextlib.ExitStack() as stack:
        for name, norm in norms:
            stack.callback(model.get_submodule(name).register_forward_hook(hook_of(norm)).remove)
        yield
