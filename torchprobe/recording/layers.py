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

from torchprobe.recording.leaves import leaf_type

Exclusion = str | type[nn.Module] | Iterable[str | type[nn.Module]]
Selection = str | Iterable[str] | re.Pattern[str] | Callable[[str, nn.Module], bool]

OUTPUT = "(output)"
"""What tables call the model itself, whose name is ``""``. It is accepted as a name."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_MODULE_WRAPPERS = ("DataParallel", "DistributedDataParallel", "AveragedModel")  # classes that wrap `self.module`
_KINDS = "names, globs, a compiled regular expression or a predicate(name, module)"


class Layer:
    """One module with all its canonical names; the first name is shown. It does not keep the module alive."""

    def __init__(self, module: nn.Module, names: list[str], parent: Layer | None = None) -> None:
        self.names = names
        self.kind = leaf_type(module).__name__
        self.feature_dim: int | None = None  # None: by what the model says, see torchprobe.recording.axes
        self.explicit = False  # whether the user wrote out its name
        self._module = weakref.ref(module)
        self._parent = parent

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module of layer {self.name!r} no longer exists: it was replaced or deleted")
        return module

    @property
    def alive(self) -> nn.Module | None:
        """The module, or None if it no longer exists."""
        return self._module()

    @property
    def parent(self) -> nn.Module | None:
        return None if self._parent is None else self._parent.alive

    def around(self) -> list[nn.Module]:
        """The modules that contain it, the nearest first."""
        found, layer = [], self._parent
        while layer is not None:
            if (module := layer.alive) is not None:
                found.append(module)
            layer = layer._parent
        return found


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

    def walk(module: nn.Module, name: str, prefix: str, parent: Layer | None, path: frozenset[int]) -> None:
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
                walk(child, child_name, prefix if transparent else child_name + ".", layer, path | {id(module)})

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


def meant(layer: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown layer: the one that was probably meant.

    "model", which trackers call the model itself, is not taken for it: many models have a layer of that name.

    >>> meant("blocks.00", ["", "blocks.0"]), meant("model", ["", "blocks.0"])
    ("; did you mean 'blocks.0'?", "; did you mean '(output)', the model itself?")
    """
    names = list(known)
    if layer == "model" and "" in names:
        return f"; did you mean {OUTPUT!r}, the model itself?"
    near = difflib.get_close_matches(layer, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# -- selection -------------------------------------------------------------------------------------------------------------


def select_layers(
    model: nn.Module,
    layers: Selection | None = None,
    feature_dim: int | Mapping[str, int] | None = None,
    exclude: Exclusion | None = None,
) -> list[Layer]:
    """The layers that ``layers`` selects, in the order of the model, each once. The model is not changed.

    Patterns skip modules without a forward, such as ``nn.ModuleList``, since they are never called.

    Args:
        model: any module.
        layers: a name or glob (``*`` stands for one component of a name or a part of it, ``**`` for any number of
            components); several of them; a compiled regular expression, which must match a whole name;
            ``predicate(name, module) -> bool``. None: the children of every ``ModuleList``, ``ModuleDict`` or ``Sequential`` that
            holds at least two modules of one class (only the outermost ones), and the model itself.
        feature_dim: the dimension of the features, for all layers or as ``{name or glob: dim}`` for some.
        exclude: names, globs and classes of modules to leave out.

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
    if exclude is not None:
        selected = _without(selected, called, exclude)
    written = {layers} if isinstance(layers, str) else set(layers) if isinstance(layers, (list, tuple, set, frozenset)) else set()
    for layer in selected:
        layer.explicit = not written.isdisjoint((*layer.names, *(OUTPUT for name in layer.names if not name)))
    if feature_dim is not None:
        _override(selected, feature_dim)
    return selected


def _without(selected: list[Layer], called: Mapping[str, Layer], exclude: Exclusion) -> list[Layer]:
    """The selected layers without those that ``exclude`` names."""
    rules: list[Any] = [exclude] if isinstance(exclude, (str, type)) else list(exclude)
    out: set[int] = set()
    for rule in rules:
        if isinstance(rule, type) and issubclass(rule, nn.Module):
            out |= {id(layer) for layer in selected if isinstance(layer.module, rule)}
        elif isinstance(rule, str):
            spellings = {rule, canonical(rule)}
            hit = {id(layer) for name, layer in called.items() if name in spellings or any(matches_glob(one, name) for one in spellings)}
            if not hit and not any(character in rule for character in "*?["):
                raise ValueError(f"exclude: the model has no layer {rule!r}; {_nearest(rule, called)}")
            out |= hit
        else:
            raise TypeError(f"exclude= takes names, globs and classes of modules, not {rule!r}")
    kept = [layer for layer in selected if id(layer) not in out]
    if not kept:
        raise ValueError("exclude= leaves no layer to record")
    return kept


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
        if alike and isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            chosen.update(by_module[id(child)] for child in children if id(child) in by_module)
        else:
            for child in children:
                visit(child)

    visit(model)
    return chosen


# -- overrides -----------------------------------------------------------------------------------------------------------


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
