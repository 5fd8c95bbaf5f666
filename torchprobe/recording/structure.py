"""Finds tensors in what a module gives: tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in tuples, lists, mappings and dataclasses, depth first; None without one.

    A single number does not count, such as a loss that comes before the logits.
    """
    if isinstance(value, Tensor):
        return value if _is_read(value) else None
    for item in _items(value):
        tensor = first_tensor(item)
        if tensor is not None:
            return tensor
    return None


def named_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """The floating-point tensors side by side in a structure, each with its place: the position in a tuple or list, the key in a mapping.

    Deeper structures count only if the structure itself holds no tensor. Then it is the first of them that does.

    >>> import torch
    >>> text, image = torch.zeros(2, 7, 8), torch.zeros(2, 9, 8)
    >>> [name for name, _ in named_tensors((text, image))], [name for name, _ in named_tensors((None, (image,)))]
    (['0', '1'], ['1'])
    >>> [name for name, _ in named_tensors({"loss": text.sum(), "hidden": text})]
    ['hidden']
    """
    if isinstance(value, Tensor):
        return [("", value)] if _is_read(value) else []
    places = _places(value)
    found = [(name, item) for name, item in places if isinstance(item, Tensor) and _is_read(item)]
    if found:
        return found
    for name, item in places:
        tensor = first_tensor(item)
        if tensor is not None:
            return [(name, tensor)]
    return []


def _is_read(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() > 0


def _places(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    return [(str(index), item) for index, item in enumerate(_items(value))]


def has_places(value: Any) -> bool:
    """Whether the parts of a structure are known by position, and not by name."""
    return isinstance(value, (tuple, list))


def is_symbolic(value: Any) -> bool:
    """Whether a model is being traced by ``torch.fx``, so that there are no numbers."""
    return isinstance(value, Proxy) or any(is_symbolic(item) for item in _items(value))


def holds(value: Any, tensor: Tensor) -> bool:
    """Whether ``tensor`` itself is part of the structure."""
    return value is tensor or any(holds(item, tensor) for item in _items(value))


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """``value`` with ``new`` in place of ``old``. The containers around it are new ones of the same classes."""
    if value is old:
        return new
    if not _items(value):
        return value
    if isinstance(value, Mapping):
        return _remade(value, {key: replaced(item, old, new) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[replaced(item, old, new) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)([replaced(item, old, new) for item in value])
    names = [field.name for field in dataclasses.fields(value)]
    return type(value)(**{name: replaced(getattr(value, name), old, new) for name in names})


def mapped(value: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any]) -> Any:
    """``value`` with ``tensor(x)`` in place of every tensor, and ``other(x)`` in place of every other object that is not a container,
    number, text or None. Containers are new ones of the same classes.

    >>> import torch
    >>> mapped({"a": (torch.ones(1), 2)}, lambda x: x + 1, lambda x: x)
    {'a': (tensor([2.]), 2)}
    """
    if isinstance(value, Tensor):
        return tensor(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, Mapping):
        return _remade(value, {key: mapped(item, tensor, other) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[mapped(item, tensor, other) for item in value])
    if type(value) in (tuple, list):
        return type(value)([mapped(item, tensor, other) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return type(value)(**{name: mapped(getattr(value, name), tensor, other) for name in names})
    return other(value)


def _remade(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same class that holds other items."""
    make: Any = type(value)
    if make in (dict, OrderedDict, MappingProxyType):
        return make(items)
    if isinstance(value, MutableMapping) and not dataclasses.is_dataclass(value) and not torch.compiler.is_dynamo_compiling():
        new: Any = copy.copy(value)  # its constructor may take anything, as that of what a tokenizer gives
        new.update(items)
        return new
    return make(**items)


def _items(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value)
    if isinstance(value, Mapping):
        return tuple(value.values())
    if value is None or isinstance(value, (int, float, str)):
        return ()  # checked first, since the compiler cannot check whether None is a dataclass
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return ()


def writes(x: Tensor) -> int | None:
    """How often the memory of a tensor was written to in place, by itself or by a view; None for tensors that do not count it.

    >>> import torch
    >>> x = torch.zeros(2)
    >>> before = writes(x)
    >>> _ = x[:1].add_(1)
    >>> writes(x) - before
    1
    """
    count: int | None = None if x.is_inference() else getattr(x, "_version", None)
    return count
