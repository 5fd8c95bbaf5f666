"""Between two models of one architecture, weight by weight: θ = (1 − α) θ_a + α θ_b.

With a zero-shot model as one end and its fine-tuned twin as the other this is WiSE-FT (Wortsman et al. 2022,
https://arxiv.org/abs/2109.01903), whose models often are accurate on ImageNet and robust at once; any measure can be taken along the way.
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
    """The models between ``a`` and ``b``, one after the other; each is a new copy, and neither ``a`` nor ``b`` is changed.

    Parameters and buffers of floating point are interpolated in float64 and rounded to their dtype; where ``a`` and ``b`` are
    equal they stay exactly that. α = 0 gives ``a`` and α = 1 gives ``b``, bit by bit. Integer and boolean buffers are those of
    ``a`` unless α = 1, and what is no number, such as activation functions, preprocessing, mode and device, is always that of
    ``a``. Tied weights stay tied.

    A head is a part like any other: interpolate the module that holds both, ``nn.ModuleDict({"encoder": …, "head": …})``. The
    head and the text tower that an :class:`~torchprobe.encoders.Encoder` keeps beside its layers are interpolated where both
    have one; else the result has none.

    Args:
        a, b: of one architecture: the same names, shapes and dtypes.
        alphas: any numbers, in the order wanted.
        recalibrate: batches of images, or of tuples that begin with images, in a list or a loader. The statistics of every batch
            norm are computed anew from them, since those of a mixture are not the mixture of the statistics; not at α = 0 and 1,
            where they are those of ``a`` and ``b``. See :func:`recalibrate_batch_norms`.

    Raises:
        ValueError: names, shapes or dtypes that differ, all of them named; weights that are tied in ``a`` and differ in ``b``; no α,
            or one that is not finite; batches that can be run through only once, for several α.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = a.weight.data.fill_(2), b.weight.data.fill_(4)
    >>> [(alpha, model.weight.item()) for alpha, model in interpolate(a, b, [0, 0.25, 1])]
    [(0.0, 2.0), (0.25, 2.5), (1.0, 4.0)]
    """
    steps = [float(alpha) for alpha in alphas]
    if not steps or not all(map(math.isfinite, steps)):
        raise ValueError(f"alphas are finite numbers, at least one; got {steps}")
    _check(a, b)
    if recalibrate is not None and iter(recalibrate) is recalibrate and sum(alpha not in (0, 1) for alpha in steps) > 1:
        raise ValueError("recalibrate= is an iterator, which can be run through once only: give a list of batches, or a loader")
    return _models(a, b, steps, recalibrate)


def _models(a: Model, b: nn.Module, alphas: list[float], recalibrate: Iterable[Any] | None) -> Iterator[tuple[float, Model]]:
    for alpha in alphas:
        model = copy.deepcopy(a)
        _mix(model, b, alpha)
        if recalibrate is not None and alpha not in (0, 1):
            recalibrate_batch_norms(model, recalibrate)
        yield alpha, model
        del model  # the next copy need not stand beside one that nobody keeps


@torch.no_grad()
def _mix(model: nn.Module, b: nn.Module, alpha: float) -> None:
    """Turns a copy of ``a`` into the mixture."""
    for encoder, other in _encoders(model, b).values():
        for part in encoder.companions:
            if getattr(other, part, None) is None:
                setattr(encoder, part, None)
    if alpha == 0:
        return
    mine, theirs = _tensors(model, b)
    for name, x in {id(x): (name, x) for name, x in mine.items()}.values():  # each once, however many names it has
        y = theirs[name].to(x.device)
        if alpha == 1:
            x.copy_(y)
        elif x.is_floating_point() or x.is_complex():
            wide = torch.promote_types(x.dtype, torch.float32 if x.device.type == "mps" else torch.float64)
            mixed = (1 - alpha) * x.to(wide) + alpha * y.to(wide)
            x.copy_(torch.where(x == y, x, mixed.to(x.dtype)))  # of equal infinities, as masks have them, the mixture is nan


def recalibrate_batch_norms(model: nn.Module, batches: Iterable[Any]) -> int:
    """Computes the running statistics of every batch norm anew, as the average over batches; returns how many there are.

    Everything but the batch norms is in eval mode meanwhile, so dropout is off; modes and momenta are as before afterwards. Every
    batch counts the same, so let them be equally large. Without batch norms that keep statistics nothing is run.

    Args:
        model: changed in place. If it has no forward, as ``nn.ModuleDict``, those of its parts that hold batch norms are called.
        batches: of images, or of tuples that begin with images; they are moved to the device of the model.

    Raises:
        ValueError: there are no batches.

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
    return len(norms)


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]


# -- what is interpolated ------------------------------------------------------------------------------------------------


def _encoders(a: nn.Module, b: nn.Module) -> dict[str, tuple[Encoder, nn.Module | None]]:
    """The encoders in ``a``, and what ``b`` has in their places."""
    others = dict(b.named_modules())
    return {name: (module, others.get(name)) for name, module in a.named_modules() if isinstance(module, Encoder)}


def _parts(a: nn.Module, b: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """The two models, and what both have beside their layers, with the prefix of their names."""
    parts = [("", a, b)]
    for name, (encoder, other) in _encoders(a, b).items():
        for part in encoder.companions:
            mine, theirs = getattr(encoder, part), getattr(other, part, None)
            if mine is not None and theirs is not None:
                parts.append((f"{name}.{part}." if name else f"{part}.", mine, theirs))
    return parts


def _tensors(a: nn.Module, b: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every parameter and buffer of each, under every name it has."""
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
        "heads of which one normalises": heads,
    }
    if any(wrong.values()):
        parts = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"the two models cannot be interpolated; {parts}")
    names: dict[int, str] = {}
    for name, x in mine.items():
        first = names.setdefault(id(x), name)
        if theirs[first] is not theirs[name] and not torch.equal(theirs[first], theirs[name]):
            raise ValueError(f"{first} and {name} are one tensor in the first model and two different ones in the second")
