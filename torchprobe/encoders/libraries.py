"""The libraries that have the models: bringing one in, and what goes wrong within it as one clear error."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from torchprobe.common.distribution import install_hint
from torchprobe.encoders.errors import EncoderError, reason

SOURCES = {"timm": "timm", "torchvision": "torchvision", "open_clip": "open_clip_torch"}
"""Where encoders come from, and the package that has it."""


def package(module: str) -> ModuleType:
    """One of :data:`SOURCES`, imported.

    Raises:
        EncoderError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise EncoderError(f"{module} is not installed: pip install {SOURCES[module]}, or {install_hint('vision')}") from error


@contextlib.contextmanager
def making(name: str, fetching: bool) -> Iterator[None]:
    """Turns whatever the libraries raise while they fetch and build into one clear error, and keeps them quiet."""
    # The root logger too: open_clip writes to it, and that would install a handler for the whole process.
    loggers = [logging.getLogger(), logging.getLogger("huggingface_hub")]
    levels, silence = [logger.level for logger in loggers], logging.NullHandler()
    loggers[0].addHandler(silence)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if not fetching:
            raise EncoderError(f"{name} could not be built: {reason(error)}") from error
        raise EncoderError(
            f"the weights of {name} could not be fetched ({reason(error)}). They are looked for in {_caches(name)}. "
            "On a machine without access, bring the file and give it with --checkpoint FILE (checkpoint= in Python)."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        loggers[0].removeHandler(silence)


def _caches(name: str) -> str:
    caches = [str(Path(torch.hub.get_dir(), "checkpoints"))]
    if not name.startswith("torchvision:"):
        with contextlib.suppress(ImportError):
            caches.insert(0, str(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE))
    return " and ".join(caches)
