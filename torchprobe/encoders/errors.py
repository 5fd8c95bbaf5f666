"""One kind of error for everything that goes wrong with an encoder, also inside the libraries that the models come from."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from torchprobe.common.messages import install_hint, reason


class EncoderError(RuntimeError):
    """An encoder, a head or a suite cannot be loaded. The message says what was wrong, where, and what to do."""


def package(module: str, pip: str | None = None, extra: str = "vision") -> ModuleType:
    """An optional package, imported.

    Args:
        module: the name to import.
        pip: the name to install, if it is another one.
        extra: the extra of this project that brings it.

    Raises:
        EncoderError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise EncoderError(f"{module} is not installed: pip install {pip or module}, or {install_hint(extra)}") from error


@contextlib.contextmanager
def library_errors(name: str, fetching: bool) -> Iterator[None]:
    """Turns every error of a library in this block into an :class:`EncoderError`, and keeps the library quiet.

    Args:
        name: of the encoder, for the message.
        fetching: whether the block may fetch weights.
    """
    # The root logger too: open_clip writes to it, and that would install a handler for the whole process.
    loggers = [logging.getLogger(), logging.getLogger("huggingface_hub"), logging.getLogger("transformers")]
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
            f"the weights of {name} could not be fetched ({reason(_cause(error))}). "
            f"The local caches are {_caches(name)}. Without network access, {_elsewhere(name)}. "
            "To try the architecture without weights, use --random-init (pretrained=False)."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        loggers[0].removeHandler(silence)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar for weights that it reads from the disk."""
    control = importlib.import_module("transformers.utils.logging")
    shown = control.is_progress_bar_enabled()
    control.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            control.enable_progress_bar()


def _cause(error: BaseException) -> BaseException:
    """The first of the errors that led to this one. Libraries wrap "no network" in long texts."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _elsewhere(name: str) -> str:
    if name.startswith("hf:"):
        return "download the repository elsewhere and give its folder, hf:FOLDER"
    return "download the file elsewhere and pass it with --checkpoint FILE (checkpoint= in Python)"


def _caches(name: str) -> str:
    caches = [str(Path(torch.hub.get_dir(), "checkpoints"))]
    if not name.startswith("torchvision:"):
        with contextlib.suppress(ImportError):
            caches.insert(0, str(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE))
    return " and ".join(caches)
