"""Where the features of every layer are, without asking torchprobe.

Three witnesses, each from the library alone:

* *declared*: the output of an nn.Conv2d has ``out_channels`` features in dimension 1, of an nn.Linear ``out_features`` in the last one,
  and so on for the layers of ``torch.nn`` (exact classes; a subclass may do something else);
* *published*: the library says how wide a layer is (timm's ``feature_info``, hidden sizes in configurations), and one dimension of the
  output is as wide, in both geometries;
* *geometry*: the model runs for two sizes of inputs that differ in everything but the features, and one dimension stays.

A layer is judged only where a witness is certain and none contradicts: layers that are called for several widths, whose output has two such
dimensions, or none, or attention weights (whose heads stay), are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .case import BATCH, Built, quiet, seed_everything
from .check import floats

Shape = tuple[int, ...]
Calls = list[list[Shape]]  # for each call the shapes of the tensors in the output


@dataclass(frozen=True)
class Truth:
    """The feature dimension (counted from the front) and its size, for a tensor of ``dims`` dimensions."""

    dim: int
    size: int
    dims: int
    witness: str


def watch(built: Built, batch: int) -> dict[str, Calls]:
    """The shapes of what every module returns in one forward."""
    seen: dict[str, Calls] = {}
    handles = []
    for name, module in built.model.named_modules():

        def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            shapes = [tuple(x.shape) for x in floats(output) if x.numel() > 1 and not x.is_nested and not x.is_complex()]
            seen.setdefault(name, []).append(shapes)

        handles.append(module.register_forward_hook(look))
    try:
        built.model.eval()
        seed_everything(1)
        args, kwargs = built.inputs(batch)
        with quiet(), torch.no_grad():
            built.model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# -- witnesses -------------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = {getattr(nn, f"{kind}{n}d"): n for n in (1, 2, 3) for kind in ("Conv", "ConvTranspose")}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def declared(module: nn.Module, shape: Shape) -> tuple[int, int] | None:
    """Dimension and size by the definition of a layer of torch.nn."""
    kind, dims = type(module), len(shape)
    found: tuple[int, int] | None = None
    if kind in _CONVOLUTIONS:
        found = dims - 1 - _CONVOLUTIONS[kind], module.out_channels  # type: ignore[assignment]
    elif kind in _NORMS and dims > 1:
        found = 1, getattr(module, "num_features", None) or module.num_channels  # type: ignore[assignment]
    elif kind in (nn.Linear, nn.Bilinear):
        found = dims - 1, module.out_features  # type: ignore[assignment]
    elif kind in (nn.LayerNorm, nn.RMSNorm) and len(module.normalized_shape) == 1:  # type: ignore[arg-type]
        found = dims - 1, module.normalized_shape[0]  # type: ignore[index]
    elif kind is nn.Embedding:
        found = dims - 1, module.embedding_dim  # type: ignore[assignment]
    elif kind is nn.MultiheadAttention:
        found = dims - 1, module.embed_dim  # type: ignore[assignment]
    return found if found is not None and found[0] >= 0 and shape[found[0]] == found[1] else None


def stays(a: Shape, b: Shape) -> list[int]:
    """The dimensions of equal size in both geometries, of at least two."""
    return [i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m == n and m > 1]


def is_attention(module: nn.Module, parents: list[nn.Module], a: Shape, b: Shape, dim: int) -> bool:
    """Whether a tensor looks like attention weights: (…, heads, queries, keys)."""
    if isinstance(module, nn.Softmax):
        return True
    if len(a) < 3 or dim >= len(a) - 1:
        return False
    if a[-1] == a[-2] and b[-1] == b[-2]:
        return True
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "h", "num_key_value_heads")
    bare = not any(True for _ in module.parameters())
    return bare and any(getattr(parent, name, None) == a[dim] for parent in (module, *parents) for name in names)


@dataclass
class Layer:
    """One layer: what the witnesses say about the tensors of its output."""

    name: str
    module: str
    truths: list[Truth]
    multiple: bool  # several tensors
    left_out: str = ""


def derive(
    model: nn.Module, first: Mapping[str, Calls], second: Mapping[str, Calls] | None, published: Mapping[str, set[int]]
) -> list[Layer]:
    """The truth about each layer that ran. ``published`` gives the widths of layers, by name."""
    modules = dict(model.named_modules())
    layers = []
    for name, calls in first.items():
        module = modules[name]
        layer = Layer(name, type(module).__name__, [], len(calls[0]) > 1)
        layers.append(layer)
        others = None if second is None else second.get(name)
        if not calls[0]:
            layer.left_out = "no tensor"
        elif re.search("rotary|rope", layer.module, re.IGNORECASE):
            layer.left_out = "a table of positions"
        elif _is_bare(module) and _named_after_attention(name):
            layer.left_out = "attention weights"
        elif any([len(s) for s in call] != [len(s) for s in calls[0]] for call in [*calls, *(others or [])]):
            layer.left_out = "calls differ"
        else:
            found = [_truth(module, _parents(modules, name), calls, others, i, published.get(name, set())) for i in range(len(calls[0]))]
            reasons = [truth for truth in found if isinstance(truth, str)]
            layer.truths = [truth for truth in found if isinstance(truth, Truth)]
            if reasons:
                layer.left_out = reasons[0]
            elif _is_bare(module) and _contested(modules, name, first, layer.truths):
                layer.left_out = "its neighbors are declared otherwise"
    return layers


def _is_bare(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and not any(True for _ in module.parameters())


def _contested(modules: Mapping[str, nn.Module], name: str, calls: Mapping[str, Calls], truths: Sequence[Truth]) -> bool:
    """Whether a layer of torch.nn beside an activation function works along another dimension of the same shape, as token mixers do."""
    parent, _, own = name.rpartition(".")
    for key in modules[parent]._modules:
        beside = f"{parent}.{key}" if parent else key
        if key == own or beside not in modules or beside not in calls:
            continue
        for call in calls[beside]:
            said = [(declared(modules[beside], shape), shape) for shape in call]
            shapes = [[tuple(s) for s in c] for c in calls[name]]
            if any(d is not None and [s] in shapes and d[0] != truths[0].dim for d, s in said):
                return True
    return False


def _named_after_attention(name: str) -> bool:
    return name.rpartition(".")[2] in ("attn_drop", "attn_dropout", "attention_dropout", "attend", "softmax", "att_drop")


def _parents(modules: Mapping[str, nn.Module], name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [modules[".".join(parts[:i])] for i in range(len(parts)) if ".".join(parts[:i]) in modules]


def _truth(module: nn.Module, parents: list[nn.Module], calls: Calls, others: Calls | None, index: int, widths: set[int]) -> Truth | str:
    shapes = [call[index] for call in calls]
    shape = shapes[0]
    said = {declared(module, s) for s in shapes}
    if len(said) == 1 and (one := next(iter(said))) is not None:
        return Truth(one[0], one[1], len(shape), "declared")
    dims = [i for i in range(len(shape)) if all(s[i] == shape[i] and s[i] > 1 for s in shapes)]
    if others is not None:
        pairs = zip(shapes, [call[index] for call in others], strict=False)
        same = [set(stays(a, b)) for a, b in pairs]
        dims = [i for i in dims if all(i in s for s in same)]
    fitting = [i for i in dims if shape[i] in widths]
    if len(fitting) == 1:
        return Truth(fitting[0], shape[fitting[0]], len(shape), "published")
    if widths:
        return "no single dimension of a published width"
    if others is None:
        return "one geometry"
    if len(dims) != 1:
        return f"{len(dims) or 'no'} dimensions stay"
    if is_attention(module, parents, shape, others[0][index], dims[0]):
        return "attention weights"
    return Truth(dims[0], shape[dims[0]], len(shape), "geometry")


def truths_of(case_build: Any, published: Any) -> tuple[Built, list[Layer]]:
    """A model in the first geometry, and the truth about its layers."""
    built = case_build(0)
    first = watch(built, BATCH[0])
    if built.axes is not None:
        return built, [_constructed(built, name, dim, first[name]) for name, dim in built.axes.items() if name in first]
    second = None
    try:
        other = case_build(1)
        second = watch(other, BATCH[1])
        del other
    except Exception:  # a model of one size
        second = None
    return built, derive(built.model, first, second, published(built))


def _constructed(built: Built, name: str, dim: int, calls: Calls) -> Layer:
    """The truth about a layer whose feature dimension is known by construction."""
    shapes = dict.fromkeys(shape for call in calls for shape in call if len(shape) > dim)
    truths = [Truth(dim, shape[dim], len(shape), "published") for shape in shapes]
    return Layer(name, type(built.model.get_submodule(name)).__name__, truths, len(calls[0]) > 1)
