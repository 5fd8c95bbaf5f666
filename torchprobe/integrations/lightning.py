"""A callback for Lightning (``pip install lightning``)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torchprobe.integrations.monitor import Monitor, check_log_every
from torchprobe.integrations.packages import base_class, require
from torchprobe.integrations.padding import Padding
from torchprobe.recording import History, Recorder, select_layers
from torchprobe.recording.layers import Selection

# A trainer of pytorch_lightning wants its own classes. Both may be installed.
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_FIRST = _PACKAGES[::-1] if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules else _PACKAGES

_CALLBACK = base_class("Callback", *_FIRST)


class RecordActivations(_CALLBACK):  # type: ignore[misc,valid-type]
    """Records the layers of a ``LightningModule`` while it is fitted, and logs to all loggers of the trainer.

    ``Trainer(callbacks=[RecordActivations()])``. A window is closed after every ``log_every`` steps of the optimizer, also while gradients
    are accumulated. Sanity checks, validation and tests within the fit are not recorded. With several ranks the numbers are those of all.
    The state is part of the checkpoints of the trainer, and a resumed fit goes on with it. Hooks are removed at the end, and if the fit
    fails.

    Padding does not count if a batch is a mapping with an ``attention_mask`` for its ``input_ids``.

    Args:
        layers: see :func:`torchprobe.record`. Default: every block, without the module itself, of which Lightning calls
            ``training_step`` and not ``forward``.
        log_every, prefix, fields, merge, save: see :class:`~torchprobe.integrations.Monitor`.
        mask: whether to leave out padding.
        options: for :func:`torchprobe.record`.

    ``recorder`` and ``history`` stay readable after the fit; they are None before.

    Raises:
        ModuleNotFoundError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """

    def __init__(
        self,
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
        if _CALLBACK is object:
            require("lightning", "RecordActivations")
        super().__init__()
        check_log_every(log_every)
        self.layers, self.mask = layers, mask
        self.options = {"log_every": log_every, "prefix": prefix, "fields": fields, "merge": merge, "save": save, **options}
        self.monitor: Monitor | None = None
        self._padding: Padding | None = None
        self._pause = contextlib.ExitStack()
        self._saved: Mapping[str, Any] | None = None
        self._failed = False

    @property
    def recorder(self) -> Recorder | None:
        return None if self.monitor is None else self.monitor.recorder

    @property
    def history(self) -> History | None:
        return None if self.monitor is None else self.monitor.history

    # -- called by the trainer -----------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None:
            self.monitor.leave()
        layers = [layer.name for layer in select_layers(pl_module) if layer.name] if self.layers is None else self.layers
        write = lambda numbers, step: [logger.log_metrics(dict(numbers), step=step) for logger in trainer.loggers]  # noqa: E731
        self.monitor, self._failed = Monitor(pl_module, layers, to=write, **self.options), False
        self._padding = Padding(pl_module, self.monitor.recorder) if self.mask else None
        if self._saved is not None:
            self.monitor.resume(self._saved, "the checkpoint")
            self._saved = None
        self.monitor.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._padding is not None:
            self._padding.batch(batch)

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if self.monitor is not None and trainer.global_step > self.monitor.count:
            self.monitor.step(trainer.global_step)  # it stays the same while gradients are accumulated

    def on_validation_start(self, *args: Any) -> None:
        if self.monitor is not None:
            self._pause.enter_context(self.monitor.paused())

    def on_validation_end(self, *args: Any) -> None:
        self._pause.close()

    def on_fit_end(self, *args: Any) -> None:
        self._pause.close()
        if self.monitor is not None:
            self.monitor.stop()

    def on_exception(self, *args: Any) -> None:
        self._failed = True  # the other ranks may not answer any more
        self._pause.close()
        if self.monitor is not None:
            self.monitor.leave()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, on rank 0, which writes the checkpoint. Lightning calls this on every rank."""
        return {} if self.monitor is None else self.monitor.state_dict(gather=not self._failed)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._saved = state_dict or None
