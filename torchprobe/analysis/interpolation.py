"""Models between two models of one architecture, weight by weight: θ = (1 − α) θ_a + α θ_b.

Between a zero-shot model and its fine-tuned twin this is WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903). Its models are
often both accurate on ImageNet and robust. Every measure can be computed along the way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torchprobe.encoders import Encoder, Head

Model = TypeVar("Model", bound=nn.Module)


def interpolate(a: Model, b: nn.Module, alphas: Iterable[float], recalibrate: Iterable[Any] | None = None) -> Iterator[tuple[float, Model]]:
    """The models between ``a`` and ``b``, one after the other. Each is a new copy; ``a`` and ``b`` are not changed.

    Floating point parameters and buffers are interpolated in float64 and rounded to their dtype. Equal values of ``a`` and ``b`` stay
    exactly the same. α = 0 gives ``a`` and α = 1 gives ``b``, bit by bit. Integer and boolean buffers are those of ``a`` unless α = 1.
    Everything that is not a tensor, such as activation functions, preprocessing, mode and device, is always that of ``a``. Tied weights
    stay tied.

    To interpolate a head too, interpolate a module that holds both, ``nn.ModuleDict({"encoder": …, "head": …})``. An
    :class:`~torchprobe.encoders.Encoder` may keep a head and a text tower. They are interpolated if both encoders have one; otherwise the
    result has none.

    Args:
        a, b: of one architecture: the same names, shapes and dtypes.
        alphas: any numbers, in any order.
        recalibrate: batches of images, or of tuples that begin with images, in a list or a loader. The statistics of every batch norm are
            recomputed from them, because the statistics of a mixture are not the mixture of the statistics. At α = 0 and 1 they stay
            those of ``a`` and ``b``. See :func:`recalibrate_batch_norms`.

    Raises:
        ValueError: names, shapes or dtypes differ (the message names all of them); weights are tied in ``a`` and differ in ``b``; no α, or
            an α that is not finite; an iterator of batches for several α.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = a.weight.data.fill_(2), b.weight.data.fill_(4)
    >>> [(alpha, model.weight.item()) for alpha, model in interpolate(a, b, [0, 0.25, 1])]
    [(0.0, 2.0), (0.25, 2.5), (1.0, 4.0)]
    """
    steps = [float(alpha) for alpha in alphas]
    if not steps or not all(map(math.isfinite, steps)):
        raise ValueError(f"alphas must be finite numbers, at least one; got {steps}")
    _check(a, b)
    if recalibrate is not None and iter(recalibrate) is recalibrate and sum(alpha not in (0, 1) for alpha in steps) > 1:
        raise ValueError("recalibrate= is an iterator, which can be used only once: give a list of batches, or a loader")
    return _models(a, b, steps, recalibrate)


def _models(a: Model, b: nn.Module, alphas: list[float], recalibrate: Iterable[Any] | None) -> Iterator[tuple[float, Model]]:
    for alpha in alphas:
        model = copy.deepcopy(a)
        _mix(model, b, alpha)
        if recalibrate is not None and alpha not in (0, 1):
            recalibrate_batch_norms(model, recalibrate)
        yield alpha, model
        del model  # so that the next copy does not need memory for two


@torch.no_grad()
def _mix(model: nn.Module, b: nn.Module, alpha: float) -> None:
    """Turns a copy of ``a`` into the mixture with ``b``."""
    for encoder, other in _encoders(model, b).values():
        for part in encoder.companions:
            if getattr(other, part, None) is None:
                setattr(encoder, part, None)
    if alpha == 0:
        return
    mine, theirs = _tensors(model, b)
    for name, x in {id(x): (name, x) for name, x in mine.items()}.values():  # each tensor once, also if it has several names
        y = theirs[name].to(x.device)
        if alpha == 1:
            x.copy_(y)
        elif x.is_floating_point() or x.is_complex():
            wide = torch.promote_types(x.dtype, torch.float32 if x.device.type == "mps" else torch.float64)
            mixed = (1 - alpha) * x.to(wide) + alpha * y.to(wide)
            x.copy_(torch.where(x == y, x, mixed.to(x.dtype)))  # the mixture of two infinities, as in masks, would be nan


def recalibrate_batch_norms(model: nn.Module, batches: Iterable[Any]) -> int:
    """Recomputes the running statistics of every batch norm as the average over batches. Returns the number of batch norms.

    During this, all other modules are in eval mode, so dropout is off. Modes and momenta are restored afterwards. Every batch has the same
    weight, so use batches of equal size. A model without batch norms that keep statistics is not run.

    Args:
        model: changed in place. If it has no forward, as ``nn.ModuleDict``, its parts with batch norms are called.
        batches: of images, or of tuples that begin with images. They are moved to the device of the model.

    Raises:
        ValueError: there are no batches, or the model runs its batch norms in eval mode whatever their mode is.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> recalibrate_batch_norms(model, [torch.tensor([[1.0], [3.0]])]), model[0].running_mean.item()
    (1, 2.0)
    """
    norms = _norms(model)
    if not norms:
        return 0
    called = [model] if type(model).forward is not nn.Module.forward else [child for child in model.children() if _norms(child)]
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average over all batches
            norm.train()
        with torch.no_grad():
            for batch in batches:
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                for part in called:
                    part(images.to(norms[0].running_mean.device))
                count += 1
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in momenta:
            norm.momentum = momentum
    if count == 0:
        raise ValueError("there are no batches to compute the statistics of the batch norms from")
    if all(norm.num_batches_tracked == 0 for norm in norms):
        raise ValueError(
            f"no batch norm of {type(model).__name__} took statistics: its forward puts them into eval mode, or leaves them out"
        )
    return len(norms)


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]


# -- what is interpolated ------------------------------------------------------------------------------------------------


def _encoders(a: nn.Module, b: nn.Module) -> dict[str, tuple[Encoder, nn.Module | None]]:
    """The encoders in ``a``, and the modules of ``b`` with the same names."""
    others = dict(b.named_modules())
    return {name: (module, others.get(name)) for name, module in a.named_modules() if isinstance(module, Encoder)}


def _parts(a: nn.Module, b: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """The two models, and the heads and text towers that both have, each with the prefix of its names."""
    parts = [("", a, b)]
    for name, (encoder, other) in _encoders(a, b).items():
        for part in encoder.companions:
            mine, theirs = getattr(encoder, part), getattr(other, part, None)
            if mine is not None and theirs is not None:
                parts.append((f"{name}.{part}." if name else f"{part}.", mine, theirs))
    return parts


def _tensors(a: nn.Module, b: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every parameter and buffer of both models, under each of its names."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for prefix, *modules in _parts(a, b):
        for tensors, module in zip(found, modules, strict=True):
            for named in (module.named_parameters, module.named_buffers):
                tensors.update({prefix + name: x for name, x in named(remove_duplicate=False)})
    return found


def _check(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = _tensors(a, b)
    only = [[name for name in one if name not in other] for one, other in ((mine, theirs), (theirs, mine))]
    both = [name for name in mine if name in theirs]
    shapes = [
        f"{name} {tuple(mine[name].shape)} and {tuple(theirs[name].shape)}" for name in both if mine[name].shape != theirs[name].shape
    ]
    dtypes = [f"{name} {mine[name].dtype} and {theirs[name].dtype}" for name in both if mine[name].dtype != theirs[name].dtype]
    heads = [
        f"{prefix}{name}".rstrip(".") or "the model"
        for prefix, one, other in _parts(a, b)
        for name, module in one.named_modules()
        if isinstance(module, Head) and getattr(dict(other.named_modules()).get(name), "normalize", module.normalize) != module.normalize
    ]
    wrong = {
        "only in the first": only[0],
        "only in the second": only[1],
        "of different shapes": shapes,
        "of different dtypes": dtypes,
        "heads of which only one normalizes": heads,
    }
    if any(wrong.values()):
        parts = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"the two models cannot be interpolated; {parts}")
    names: dict[int, str] = {}
    for name, x in mine.items():
        first = names.setdefault(id(x), name)
        if theirs[first] is not theirs[name] and not torch.equal(theirs[first], theirs[name]):
            raise ValueError(f"{first} and {name} are one tensor in the first model and two different ones in the second")
