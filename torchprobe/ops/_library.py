"""Finds the compiled kernels. Where there are none, everything runs on the pure PyTorch reference."""

from __future__ import annotations

import importlib
import json
import logging
import os
from pathlib import Path

_MODULES = {"cpu": "torchprobe._C"}
_REASONS = Path(__file__).parents[1] / "_build.json"  # written by setup.py: device → why its module was not built
_status: dict[str, str] = {}


def load_kernels() -> None:
    """Loads every compiled module of this installation; importing one registers its kernels with PyTorch's dispatcher.

    Done once, by ``import torchprobe.ops``. A module that is missing or does not load is no error and prints nothing:
    :func:`kernels` tells. ``TORCHPROBE_DISABLE_KERNELS=1`` leaves them all out.
    """
    for device, module in _MODULES.items():
        if device not in _status:
            _status[device] = _load(device, module)
            logging.getLogger("torchprobe").info("%s kernels %s", device, _status[device])


def kernels() -> dict[str, str]:
    """Which native kernels serve this process: device → one line, ``"loaded: …"`` or the reason why not.

    >>> from torchprobe.ops import kernels
    >>> sorted(kernels())
    ['cpu', 'cuda']
    """
    load_kernels()
    return {**_status, "cuda": "not built: this version has no CUDA kernel; CUDA tensors take the PyTorch reference"}


def _load(device: str, module: str) -> str:
    if os.environ.get("TORCHPROBE_DISABLE_KERNELS", "0") not in ("", "0"):
        return "disabled: TORCHPROBE_DISABLE_KERNELS is set"
    try:
        library = importlib.import_module(module)
        return f"loaded: {library.instruction_set()}, {library.__file__}"
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"not built: {_build_reason(device)}"
        return f"not loaded: {str(error).partition(chr(10))[0]}"  # it is there, but the dynamic linker refuses it


def _build_reason(device: str) -> str:
    try:
        reason = json.loads(_REASONS.read_text()).get(device)
    except (OSError, ValueError):
        reason = None
    return reason or "this installation has no compiled module; reinstall with TORCHPROBE_BUILD=1 to see what stops it"
