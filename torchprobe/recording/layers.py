"""Canonical names of layers, their selection, and the dimension of their features.

A *canonical name* is a name of ``model.named_modules()`` without the components that wrappers add (``_orig_mod``, ``module``,
``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``). So compiled, parallel and plain models have the same names. The model itself is
``""``.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Selection = str | Iterable[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]

OUTPUT = "(output)"
"""What tables call the model itself, whose name is ``""``. It is accepted as a name."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MODULE_WRAPPERS = ("DataParallel", "DistributedDataParallel", "AveragedModel")  # classes that wrap `self.module`
_KINDS = "names, globs, a compiled regular expression or a predicate(name, module)"


class Layer:
    """One module with all its canonical names; the first name is shown. It does not keep the module alive."""

    def __init__(self, module: nn.Module, names: list[str], parent: nn.Module | None = None) -> None:
        self.names = names
        self.kind = leaf_type(module).__name__
        self.feature_dim: int | None = None  # None: by `default_feature_dim`
        self._module = weakref.ref(module)
        self._parent = None if parent is None else weakref.ref(parent)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module of layer {self.name!r} no longer exists")
        return module

    @property
    def parent(self) -> nn.Module | None:
        return self._parent() if self._parent is not None else None


# -- names -----------------------------------------------------------------------------------------------------------------


def named_layers(model: nn.Module) -> dict[str, Layer]:
    """Every module of ``model`` by canonical name, in the order of ``named_modules``.

    A module with two names is one :class:`Layer`. A wrapper and the module it wraps share a name, which means the wrapped module.

    >>> from torch import nn
    >>> list(named_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    ['', '0', '1']
    """
    named: dict[str, Layer] = {}
    layers: dict[int, Layer] = {}  # by id(module)

    def walk(module: nn.Module, name: str, prefix: str, parent: nn.Module | None, path: frozenset[int]) -> None:
        module = innermost(module)
        if id(module) in path:
            return  # a module that contains itself
        while name in named:
            name += ".module"  # nested wrappers of an unknown kind
        layer = layers.setdefault(id(module), Layer(module, [], parent))
        layer.names.append(name)
        named[name] = layer
        for key, child in module._modules.items():
            if child is not None:
                child_name = prefix + key
                # A module whose only child is called "module" is a wrapper of an unknown kind. It may change the output, so both
                # are layers, but the names of the modules below leave it out.
                transparent = key == "module" and len(module._modules) == 1
                walk(child, child_name, prefix if transparent else child_name + ".", module, path | {id(module)})

    walk(model, "", "", None, frozenset())
    return named


def innermost(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def _wrapped(module: nn.Module) -> nn.Module | None:
    children = module._modules
    for key in _WRAPPERS:
        if key in children:
            return children[key]
    if "module" in children and any(base.__name__ in _MODULE_WRAPPERS for base in type(module).__mro__):
        return children["module"]
    return None


def canonical(name: str) -> str:
    """``name`` without the components that wrappers add, for a name copied from a wrapped model.

    >>> canonical("module._orig_mod.blocks.0")
    'blocks.0'
    """
    return "" if name == OUTPUT else ".".join(part for part in name.split(".") if part not in (*_WRAPPERS, "module"))


# -- selection -------------------------------------------------------------------------------------------------------------


def select_layers(
    model: nn.Module,
    layers: Selection | None = None,
    feature_dim: int | Mapping[str, int] | None = None,
) -> list[Layer]:
    """The layers that ``layers`` selects, in the order of the model, each once. The model is not changed.

    Patterns skip modules without a forward, such as ``nn.ModuleList``, since they are never called.

    Args:
        model: any module.
        layers: a name or glob (``*`` stands for one component of a name or a part of it, ``**`` for any number of
            components); several of them; a compiled regular expression, which must match a whole name;
            ``predicate(name, module) -> bool``. None: the children of every ``ModuleList`` or ``Sequential`` that holds at
            least two modules of one class (only the outermost ones), and the model itself.
        feature_dim: the dimension of the features, for all layers or as ``{name or glob: dim}`` for some.

    Raises:
        ValueError: the model does not have a name (the message suggests the nearest), or a pattern matches nothing.
        TypeError: ``layers`` is of another type.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> [layer.name for layer in select_layers(model)], [layer.name for layer in select_layers(model, "[02]")]
    (['', '0', '1', '2'], ['0', '2'])
    """
    named = named_layers(model)
    called = {name: layer for name, layer in named.items() if _is_called(layer.module)}
    chosen = _default_layers(model, called) if layers is None else _chosen(named, called, layers)
    selected = [layer for layer in {id(layer): layer for layer in named.values()}.values() if id(layer) in chosen]
    if feature_dim is not None:
        _override(selected, feature_dim)
    return selected


def _is_called(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _chosen(named: Mapping[str, Layer], called: Mapping[str, Layer], layers: Selection) -> set[int]:
    """The ``id()`` of the selected layers."""
    if isinstance(layers, str):
        return _match(named, called, layers)
    if isinstance(layers, re.Pattern):
        chosen = {id(layer) for name, layer in called.items() if layers.fullmatch(name)}
        if not chosen:
            raise ValueError(f"the regular expression {layers.pattern!r} matches no whole name; {_some_of(called)}")
        return chosen
    if isinstance(layers, nn.Module):
        raise TypeError(f"layers= takes {_KINDS}, not a module")
    if callable(layers):
        chosen = {id(layer) for name, layer in called.items() if layers(name, layer.module)}
        if not chosen:
            raise ValueError(f"the predicate selects no layer; {_some_of(called)}")
        return chosen
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers= takes {_KINDS}, not {type(layers).__name__}")
    patterns = list(layers)
    if not patterns:
        raise ValueError("layers= is empty; leave it out for the default selection")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a list of layers holds names and globs, not {type(pattern).__name__}")
    return set[int]().union(*(_match(named, called, pattern) for pattern in patterns))


def _match(named: Mapping[str, Layer], called: Mapping[str, Layer], pattern: str) -> set[int]:
    for spelling in (pattern, canonical(pattern)):
        if spelling in called:
            return {id(called[spelling])}
        if spelling in named:
            kind = type(named[spelling].module).__name__
            raise ValueError(f"layer {pattern!r} is a {kind}, which is never called; select its children, '{pattern}.*'")
        if chosen := {id(layer) for name, layer in called.items() if matches_glob(spelling, name)}:
            return chosen
    if any(character in pattern for character in "*?["):
        raise ValueError(f"{pattern!r} matches no layer; {_nearest_glob(pattern, called) or _some_of(called)}")
    raise ValueError(f"the model has no layer {pattern!r}; {_nearest(pattern, called)}")


def _nearest_glob(pattern: str, called: Mapping[str, Layer]) -> str:
    """Suggests the glob with each misspelled component replaced by the nearest one; empty if that matches nothing either."""
    inside = {name[: -len(end)] for name in called for end in _endings(name) if matches_glob(pattern, end)}
    if len(inside) == 1:
        return f"did you mean {inside.pop() + pattern!r}?"
    components = {component for name in called for component in name.split(".")}
    parts = pattern.split(".")
    fixed = ".".join(part if set(part) & set("*?[") else (difflib.get_close_matches(part, components, 1) or [part])[0] for part in parts)
    return f"did you mean {fixed!r}?" if any(matches_glob(fixed, name) for name in called) else ""


def matches_glob(pattern: str, name: str) -> bool:
    """Whether a glob matches. ``*``, ``?`` and ``[…]`` stay within one component of a name; ``**`` is any number of components, also 0.

    >>> [matches_glob("blocks.**", name) for name in ("blocks", "blocks.0.attn", "head")]
    [True, True, False]
    >>> [matches_glob("*.layer*", name) for name in ("net.layer1", "net.layer1.conv")]
    [True, False]
    """
    return _matches(pattern.split("."), name.split(".") if name else [])


def _matches(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_matches(rest, name[start:]) for start in range(len(name) + 1))
    return bool(name) and fnmatch.fnmatchcase(name[0], first) and _matches(rest, name[1:])


def _endings(name: str) -> list[str]:
    """What remains of a name without its first components."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _nearest(name: str, named: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, named, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else _some_of(named)


def _some_of(named: Iterable[str]) -> str:
    names = [name for name in named if name]
    shown = ", ".join(map(repr, names[:6])) + (f" … ({len(names)} in total)" if len(names) > 6 else "")
    return f"the layers are {shown}" if names else "the only layer is the model itself, whose name is ''"


def _default_layers(model: nn.Module, called: Mapping[str, Layer]) -> set[int]:
    by_module = {id(layer.module): id(layer) for layer in called.values()}
    chosen = {id(called[""])} if "" in called else set()

    def visit(module: nn.Module) -> None:
        module = innermost(module)
        children = [innermost(child) for child in module._modules.values() if child is not None]
        alike = len({type(child) for child in children}) < len(children)
        if alike and isinstance(module, (nn.ModuleList, nn.Sequential)):
            chosen.update(by_module[id(child)] for child in children if id(child) in by_module)
        else:
            for child in children:
                visit(child)

    visit(model)
    return chosen


# -- the dimension that holds the features -----------------------------------------------------------------------------------

_MAPS = {  # exact leaf type → spatial dimensions of its output; the channels come before them
    getattr(nn, f"{kind}{n}d"): n
    for n in (1, 2, 3)
    for kind in ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "InstanceNorm")
}
_SECOND = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm)
_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
)


def default_feature_dim(layer: Layer, dims: int) -> int:
    """The dimension of the features in an activation of ``dims`` dimensions.

    The exact type of a leaf decides first: 1 for convolutions, poolings, batch, group and instance norms (0 for a convolution without a
    batch dimension); the last for linear layers, layer norms, attention and embeddings. For other layers it is the last of two or three
    dimensions.

    Of four or more dimensions it is 1 if a convolution or batch norm is among the descendants, or if the class is named "…2d" or "…3d";
    otherwise the last. An ``nn.Sequential`` follows its last child. A leaf without parameters, such as an activation function or
    dropout, follows its parent.
    """
    return _feature_dim(layer.module, layer.parent, dims)


def _feature_dim(module: nn.Module, parent: nn.Module | None, dims: int) -> int:
    kind = leaf_type(module)
    if kind in _MAPS:
        return max(dims - 1 - _MAPS[kind], 0)
    if kind in _SECOND:
        return 1
    if kind in _LAST or dims < 4:
        return -1
    if kind.__name__.endswith(("2d", "3d")):
        return 1
    if kind is nn.Sequential and len(module._modules):
        return _feature_dim(innermost(list(module.children())[-1]), module, dims)
    bare = not len(module._modules) and not any(True for _ in module.parameters())
    family = parent if bare and parent is not None else module
    return 1 if any(isinstance(m, (_ConvNd, _BatchNorm)) for m in family.modules()) else -1


def leaf_type(module: nn.Module) -> type[nn.Module]:
    """The class in the source code. FSDP2 and parametrizations replace it by a subclass at run time."""
    kind = type(module)
    swapped = hasattr(module, "parametrizations") or any(base.__name__ == "FSDPModule" for base in kind.__mro__)
    if not swapped:
        return kind
    return next(base for base in kind.__mro__[1:] if base.__name__ != "FSDPModule")


def _override(selected: list[Layer], feature_dim: int | Mapping[str, int]) -> None:
    overrides: Mapping[str, Any] = feature_dim if isinstance(feature_dim, Mapping) else {"**": feature_dim}
    for pattern, dim in overrides.items():
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"feature_dim must be an int or {{name or glob: int}}, got {dim!r} for {pattern!r}")
        matched = False
        for layer in selected:
            if any(name in (pattern, canonical(pattern)) or matches_glob(pattern, name) for name in layer.names):
                layer.feature_dim, matched = dim, True
        if not matched:
            names = [name for layer in selected for name in layer.names]
            raise ValueError(f"feature_dim: {pattern!r} is not one of the selected layers; {_nearest(pattern, names)}")
