"""Numbers of windows in TensorBoard (``pip install tensorboard``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torchprobe.integrations.monitor import Writer
from torchprobe.integrations.packages import require


def to_tensorboard(writer: str | os.PathLike[str] | Any) -> Writer:
    """A writer of curves for TensorBoard: ``Monitor(model, to=to_tensorboard("runs/first"))``.

    Args:
        writer: a folder, or a ``SummaryWriter`` of ``torch.utils.tensorboard`` or ``tensorboardX``. One made for a folder is closed at the
            end, yours stays open.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    return _Curves(writer)


class _Curves:
    def __init__(self, writer: Any) -> None:
        self.own = isinstance(writer, (str, os.PathLike))
        if self.own:
            require("tensorboard", "to_tensorboard()")
            writer = require("torch.utils.tensorboard", "to_tensorboard()").SummaryWriter(os.fspath(writer))
        self.writer = writer

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.own:
            self.writer.close()
