"""Finds the compiled kernels. Where there are none, everything runs on the pure PyTorch reference."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

_MODULES = {"cpu": "torchprobe._C", "cuda": "torchprobe._C_cuda"}
_REASONS = Path(__file__).parents[1] / "_build.json"  # written by setup.py: device → why its module was not built
_loaded: dict[str, ModuleType] = {}
_status: dict[str, str] = {}
_warned: set[int] = set()


def load_kernels() -> None:
    """Loads every compiled module of this installation; importing one registers its kernels with PyTorch's dispatcher.

    Done once, by ``import torchprobe.ops``; nothing is asked of a GPU. A module that is missing or does not load is no error and prints
    nothing: :func:`kernels` tells. ``TORCHPROBE_DISABLE_KERNELS=1`` leaves them all out.
    """
    for device, module in _MODULES.items():
        if device not in _status:
            _status[device] = _load(device, module)
            logging.getLogger("torchprobe").info("%s kernels %s", device, _status[device])


def kernels() -> dict[str, str]:
    """Which native kernels serve this process: device → one line, ``"loaded: …"`` or the reason why not.

    For CUDA, every GPU is asked whether it can run them, which takes none of its memory. One that cannot takes the PyTorch reference.

    >>> from torchprobe.ops import kernels
    >>> sorted(kernels())
    ['cpu', 'cuda']
    """
    load_kernels()
    status = dict(_status)
    if "cuda" in _loaded:
        count = max(torch.cuda.device_count(), 1)  # without any, the first says why
        reasons = {i: reason for i in range(count) if (reason := _loaded["cuda"].unavailable(i))}
        if len(reasons) == count:
            status["cuda"] = f"not used: {'; '.join(dict.fromkeys(reasons.values()))}"
        elif reasons:
            status["cuda"] += "; not used on " + "; ".join(f"cuda:{i}: {reason}" for i, reason in reasons.items())
    return status


def warn_unavailable(device: int) -> None:
    """Says why the kernels that are loaded cannot run on a GPU, the first time only."""
    if device not in _warned:
        _warned.add(device)
        reason = _loaded["cuda"].unavailable(device) if "cuda" in _loaded else kernels()["cuda"]
        warnings.warn(f"torchprobe: cuda:{device} takes the PyTorch reference instead of the CUDA kernel: {reason}", stacklevel=2)


def _load(device: str, module: str) -> str:
    if os.environ.get("TORCHPROBE_DISABLE_KERNELS", "0") not in ("", "0"):
        return "disabled: TORCHPROBE_DISABLE_KERNELS is set"
    if importlib.util.find_spec(module) is None:
        return f"not built: {_build_reason(device)}"
    if device == "cuda" and not torch.version.cuda:  # it could not be: the libraries that it needs are not there
        return f"not loaded: torch {torch.__version__} is a build without CUDA"
    try:
        library = _loaded[device] = importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"not loaded: {str(error).partition(chr(10))[0]}"  # it is there, but the dynamic linker refuses it
    return f"loaded: {library.describe()}, {library.__file__}"


def _build_reason(device: str) -> str:
    try:
        reason = json.loads(_REASONS.read_text()).get(device)
    except (OSError, ValueError):
        reason = None
    return reason or "this installation has no compiled module; reinstall with TORCHPROBE_BUILD=1 to see what stops it"
