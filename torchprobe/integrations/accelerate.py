"""Recording in a training loop with accelerate (``pip install accelerate``)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import nn

from torchprobe.integrations.monitor import Monitor
from torchprobe.integrations.packages import require
from torchprobe.integrations.padding import Padding
from torchprobe.recording import History, Recorder
from torchprobe.recording.layers import Selection


class RecordActivations:
    """Records a model that an ``Accelerator`` has prepared, and logs to its trackers.

    ::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with RecordActivations(accelerator, model, log_every=50) as recording:
            for batch in loader:
                with accelerator.accumulate(model):
                    ...  # forward, accelerator.backward, optimizer.step
                recording.step()
            with recording.paused():
                ...  # validation

    :meth:`step` counts steps of the optimizer: calls while gradients are accumulated do nothing. With several ranks the numbers are those
    of all, and every rank calls ``step``. The state is part of ``accelerator.save_state``, and ``load_state`` restores it. Padding does not
    count if the forward is given an ``attention_mask`` for its ``input_ids``. Hooks are removed at the end of the block, also if it fails.

    Args:
        accelerator: whose ``log`` is called; trackers are those of ``Accelerator(log_with=…)`` and ``init_trackers``.
        model: that ``prepare`` returned, which you call.
        layers, log_every, prefix, fields, merge, save: see :class:`~torchprobe.integrations.Monitor`.
        mask: whether to leave out padding.
        options: for :func:`torchprobe.record`.

    Raises:
        ModuleNotFoundError: accelerate is not installed.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        layers: Selection | None = None,
        *,
        log_every: int = 50,
        prefix: str = "act/",
        fields: str | Iterable[str] | None = None,
        merge: bool = True,
        save: str | os.PathLike[str] | None = None,
        mask: bool = True,
        **options: Any,
    ) -> None:
        require("accelerate", "RecordActivations")
        self.accelerator, self.model = accelerator, model
        write = lambda numbers, step: accelerator.log(dict(numbers), step=step)  # noqa: E731
        self.monitor = Monitor(
            model, layers, log_every=log_every, to=write, prefix=prefix, fields=fields, merge=merge, save=save, **options
        )
        self._padding = Padding(model, self.monitor.recorder) if mask else None
        self._hooks = contextlib.ExitStack()
        accelerator.register_for_checkpointing(self)

    @property
    def recorder(self) -> Recorder:
        return self.monitor.recorder

    @property
    def history(self) -> History:
        return self.monitor.history

    def __enter__(self) -> RecordActivations:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()
        self.monitor.__exit__(kind, error, trace)

    def start(self) -> RecordActivations:
        """Places the hooks."""
        self.monitor.start()
        if self._padding is not None:
            self._hooks.callback(self._padding.place(self.model).remove)
        return self

    def stop(self) -> None:
        """Removes the hooks."""
        self.__exit__(None, None, None)

    def step(self) -> dict[str, float] | None:
        """Call it after each step of the loop. It returns the numbers if a window was closed."""
        return self.monitor.step() if self.accelerator.sync_gradients else None

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """``with recording.paused(): validate()``"""
        return self.monitor.paused()

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, on rank 0, which writes the checkpoint. ``save_state`` calls this on every rank."""
        return self.monitor.state_dict(gather=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.monitor.resume(state, "the checkpoint")
