"""The operator library ``torchprobe``: registers the operators and loads their compiled kernels.

Without compiled kernels every operator runs its PyTorch reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from torchprobe.ops.memory import check_memory

Parameters = ParamSpec("Parameters")
Arguments = TypeVar("Arguments")
Result = TypeVar("Result")

_MODULES = {"cpu": "torchprobe._C", "cuda": "torchprobe._C_cuda"}
_REASONS = Path(__file__).parents[1] / "_build.json"  # setup.py writes it: device → why its module was not built
KERNELS_FROM = (2, 10)
"""The oldest torch whose stable interface the compiled kernels can use; ``setup.py`` has the same."""
loaded: dict[str, ModuleType] = {}
"""Device → the compiled module that serves it."""
status: dict[str, str] = {}
"""Device → what became of its module, in one line."""
warned: set[int] = set()
"""The GPUs for which :func:`warn_unavailable` has given its warning."""


def define(library: torch.library.Library, schema: str, reference: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
    """Registers an operator that is not differentiable, with everything except its native kernels.

    Args:
        schema: name, arguments and result, in the notation of PyTorch.
        reference: runs on every device without a native kernel.
        fake: the fake kernel; None: the operator cannot be traced.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, reference, "CompositeExplicitAutograd")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # skips autograd, which would only cost time
    resolve_views(library, name)
    if fake is not None:
        torch.library.register_fake(f"torchprobe::{name}", fake, lib=library)


def resolve_views(library: torch.library.Library, name: str) -> None:
    """Gives an operator tensors without the marks "negated" and "conjugated", which kernels do not know."""
    for key in ("Negative", "Conjugate"):
        library.impl(name, functools.partial(_resolved, name), key)


def _resolved(name: str, *given: Any, **named: Any) -> Any:
    """Runs an operator on what negated and conjugated views mean. What is written to cannot be one: the result would have nowhere to go.

    PyTorch's own way copies before anything is checked, and writes back after the call.
    """
    operator = getattr(torch.ops.torchprobe, name).default
    arguments: dict[str, Any] = dict(zip((argument.name for argument in operator._schema.arguments), given, strict=False)) | named
    for argument in operator._schema.arguments:
        value: Any = arguments.get(argument.name)
        parts: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        for tensor in parts:
            if not isinstance(tensor, Tensor) or not (tensor.is_neg() or tensor.is_conj()):
                continue
            if argument.is_write or tensor is not value:
                raise ValueError(f"{argument.name} is a negated or conjugated view: pass {argument.name}.resolve_neg().resolve_conj()")
            check_memory({}, {argument.name: tensor}, copied=True)
            arguments[argument.name] = tensor.resolve_neg().resolve_conj()
    return operator(**arguments)


def takes(
    arguments: Callable[Parameters, Arguments],
) -> Callable[[Callable[[Arguments], Result]], Callable[Parameters, Result]]:
    """Decorator: a function of one tuple of arguments becomes a function of the arguments, as the dispatcher calls it.

    >>> from typing import NamedTuple
    >>> class Pair(NamedTuple):
    ...     a: int
    ...     b: int = 1
    >>> @takes(Pair)
    ... def total(pair: Pair) -> int:
    ...     return pair.a + pair.b
    >>> total(2), total(2, b=3)
    (3, 5)
    """

    def decorate(function: Callable[[Arguments], Result]) -> Callable[Parameters, Result]:
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return function(arguments(*args, **kwargs))

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        return call

    return decorate


def load_kernels() -> None:
    """Loads every compiled module of this installation; the import of one registers its kernels with PyTorch's dispatcher.

    ``import torchprobe.ops`` does this once, without using a GPU. A module may be missing or fail to load: this is not an error and prints
    nothing, and :func:`kernels` gives the reason. ``TORCHPROBE_DISABLE_KERNELS=1`` skips all modules.
    """
    for device, module in _MODULES.items():
        if device not in status:
            status[device] = _load(device, module)
            logging.getLogger("torchprobe").info("%s kernels %s", device, status[device])


def kernels() -> dict[str, str]:
    """Which native kernels this process uses: device → one line, ``"loaded: …"`` or the reason why not.

    The CUDA line covers every GPU. The check takes no GPU memory. A GPU that cannot run the kernels uses the PyTorch reference.

    >>> from torchprobe.ops import kernels
    >>> sorted(kernels())
    ['cpu', 'cuda']
    """
    load_kernels()
    lines = dict(status)
    if "cuda" in loaded:
        count = max(torch.cuda.device_count(), 1)  # without a GPU, GPU 0 gives the reason
        reasons = {i: reason for i in range(count) if (reason := loaded["cuda"].unavailable(i))}
        if len(reasons) == count:
            lines["cuda"] = f"not used: {'; '.join(dict.fromkeys(reasons.values()))}"
        elif reasons:
            lines["cuda"] += "; not used on " + "; ".join(f"cuda:{i}: {reason}" for i, reason in reasons.items())
    return lines


def torch_release(version: str) -> tuple[int, int]:
    """Major and minor number of a version of torch.

    >>> torch_release("2.10.0a0+git1234"), torch_release("2.6.0+cu124")
    ((2, 10), (2, 6))
    """
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def warn_unavailable(device: int) -> None:
    """Warns that a GPU cannot run the loaded kernels, with the reason; only once for each GPU."""
    if device not in warned:
        warned.add(device)
        reason = loaded["cuda"].unavailable(device) if "cuda" in loaded else kernels()["cuda"]
        warnings.warn(f"torchprobe: cuda:{device} uses the PyTorch reference instead of the CUDA kernel: {reason}", stacklevel=2)


def _load(device: str, module: str) -> str:
    if os.environ.get("TORCHPROBE_DISABLE_KERNELS", "0") not in ("", "0"):
        return "disabled: TORCHPROBE_DISABLE_KERNELS is set"
    if importlib.util.find_spec(module) is None:
        return f"not built: {_build_reason(device)}"
    if torch_release(torch.__version__) < KERNELS_FROM:
        return f"not loaded: torch {torch.__version__} is older than 2.10, and the kernels need the stable interface that came with it"
    if device == "cuda" and not torch.version.cuda:  # the libraries that it needs are not installed
        return f"not loaded: torch {torch.__version__} is a build without CUDA"
    try:
        library = loaded[device] = importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"not loaded: {str(error).partition(chr(10))[0]}"  # the file exists, but the dynamic linker rejects it
    return f"loaded: {library.describe()}, {library.__file__}"


def _build_reason(device: str) -> str:
    try:
        reason = json.loads(_REASONS.read_text()).get(device)
    except (OSError, ValueError):
        reason = None
    return reason or "this installation has no compiled module; reinstall with TORCHPROBE_BUILD=1 to see the reason"
