"""Optional packages: found when they are needed, with the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str, what: str, pip: str | None = None) -> Any:
    """The module of a package.

    Args:
        name: of the module.
        what: needs it, for the message.
        pip: what to install, if it is called otherwise.

    Raises:
        ModuleNotFoundError: it is not installed; the message has the command.

    >>> require("no_such_package", "to_nowhere()", pip="no-such-package")
    Traceback (most recent call last):
    ModuleNotFoundError: to_nowhere() needs no_such_package: pip install no-such-package
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or name.partition(".")[0] != error.name.partition(".")[0]:
            raise  # it is there, and something that it needs is not
        raise ModuleNotFoundError(f"{what} needs {name}: pip install {pip or name}", name=name) from error


def base_class(attribute: str, *modules: str) -> Any:
    """A class of the first of these modules that is installed; ``object`` if none is, so that a module with a subclass can be imported.

    Its constructor calls :func:`require`.

    >>> base_class("Callback", "no_such_package")
    <class 'object'>
    """
    for name in modules:
        found = _attribute(name, attribute)
        if found is not None:
            return found
    return object


def _attribute(name: str, attribute: str) -> Any:
    try:
        return getattr(require(name, attribute), attribute)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
