"""Old public names keep working for one version, with a warning that says the new one."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=type)


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module in which public names were renamed or moved.

    Args:
        module: ``__name__`` of the module.
        names: old name → new name in the same module, or "package.module:name" for one that moved.

    >>> __getattr__ = renamed("torchprobe.common.files", {"dumps": "to_json"})
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     f = __getattr__("dumps")
    >>> f.__name__, str(caught[0].message)
    ('to_json', 'torchprobe.common.files.dumps is deprecated, use torchprobe.common.files.to_json')
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(":")
        home = home or module
        warnings.warn(f"{module}.{name} is deprecated, use {home}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new)

    return __getattr__


class RenamedAttribute:
    """An attribute or method of a class that was renamed: ``old = RenamedAttribute("new")`` in the body of the class.

    >>> class Result:
    ...     labeled = 3
    ...     labelled = RenamedAttribute("labeled")
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     value = Result().labelled
    >>> value, str(caught[0].message)
    (3, 'Result.labelled is deprecated, use labeled')
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        warnings.warn(f"{self.old} is deprecated, use {self.new}", DeprecationWarning, stacklevel=2)
        return getattr(instance, self.new)


def renamed_arguments(**names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Keyword arguments that were renamed: ``@renamed_arguments(old="new")``.

    Raises:
        TypeError: both the old and the new name were given.

    >>> @renamed_arguments(images="rows")
    ... def f(rows=None):
    ...     return rows
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     value = f(images=3)
    >>> value, str(caught[0].message)
    (3, "f: the argument 'images' is deprecated, use 'rows'")
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            name = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__init__")
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{name}: {old!r} is the old name of {new!r}; give {new!r} alone")
                warnings.warn(f"{name}: the argument {old!r} is deprecated, use {new!r}", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_fields(**names: str) -> Callable[[Kind], Kind]:
    """Fields of a dataclass that were renamed, as keyword arguments: ``@renamed_fields(old="new")`` above ``@dataclass``.

    >>> import dataclasses
    >>> @renamed_fields(made="provenance")
    ... @dataclasses.dataclass
    ... class Result:
    ...     provenance: str
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     result = Result(made="here")
    >>> result.provenance, str(caught[0].message)
    ('here', "Result: the argument 'made' is deprecated, use 'provenance'")
    """

    def decorate(kind: Kind) -> Kind:
        method = "__init__"
        setattr(kind, method, renamed_arguments(**names)(getattr(kind, method)))
        return kind

    return decorate
