"""Old public names keep working for one version, with a warning that says the new one."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


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
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}: {old!r} is the old name of {new!r}; give {new!r} alone")
                warnings.warn(f"{function.__qualname__}: the argument {old!r} is deprecated, use {new!r}", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
