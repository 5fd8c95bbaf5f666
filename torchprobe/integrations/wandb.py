"""Numbers of windows in Weights & Biases (``pip install wandb``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchprobe.integrations.monitor import Writer
from torchprobe.integrations.packages import require


def to_wandb(run: Any = None) -> Writer:
    """A writer for a run of Weights & Biases: ``Monitor(model, to=to_wandb())``.

    The horizontal axis of the curves is the step of the window, logged as ``"{prefix}step"``, so that your own ``run.log`` may count as it
    likes: numbers for a step before the present one of the run would be dropped. Numbers that are not finite stay as they are.

    Args:
        run: what ``wandb.init`` returned. Default: the active run when the first window closes.

    Raises:
        ModuleNotFoundError: wandb is not installed.
        RuntimeError: there is no run when the first window closes.
    """
    wandb = require("wandb", "to_wandb()")
    axis = ""

    def write_to_wandb(numbers: Mapping[str, float], step: int) -> None:
        nonlocal run, axis
        run = wandb.run if run is None else run
        if run is None:
            raise RuntimeError("no run of wandb is active: call wandb.init() before the first window, or give to_wandb(run)")
        if not axis and numbers:
            prefix = common_prefix(numbers)
            axis = f"{prefix}step"
            run.define_metric(axis, hidden=True)
            run.define_metric(f"{prefix}*", step_metric=axis)
        run.log({**numbers, axis or "step": step})

    return write_to_wandb


def common_prefix(names: Mapping[str, float]) -> str:
    """What all keys begin with, to the first slash.

    >>> common_prefix({"act/0/std": 2.0, "act/1/std": 1.0}), common_prefix({"0/std": 1.0, "1/std": 1.0})
    ('act/', '')
    """
    starts = {name.partition("/")[0] for name in names}
    return f"{starts.pop()}/" if len(starts) == 1 else ""
