"""A Lightning callback that records every block, logs to all loggers of the trainer, and resumes with its history.

    trainer = lightning.Trainer(callbacks=[RecordActivations(every=50)])

Needs ``pip install lightning``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import lightning

import torchprobe
from torchprobe.recording import select_layers


class RecordActivations(lightning.Callback):
    """Logs and closes a window after every ``every`` steps of the optimizer. Validation is not recorded.

    ``layers`` and ``options`` go to :func:`torchprobe.record`; by default every block is recorded. ``recorder`` stays readable afterwards.
    """

    def __init__(self, layers: Any = None, every: int = 50, prefix: str = "act/", **options: Any) -> None:
        self.layers, self.every, self.prefix, self.options = layers, every, prefix, options
        self.recorder: torchprobe.Recorder | None = None
        self.pause = contextlib.ExitStack()
        self.saved: dict[str, Any] | None = None
        self.last = 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Lightning calls training_step of the module, not forward, so the module itself has no output to record.
        layers = self.layers or [layer.name for layer in select_layers(pl_module) if layer.name]
        self.recorder = torchprobe.record(pl_module, layers, **self.options).start()
        if self.saved is not None:
            self.recorder.load_state_dict(self.saved)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        step = trainer.global_step  # does not change while gradients are accumulated
        if step % self.every or step == self.last:
            return
        self.last = step
        window = self.recorder.all_reduce() if trainer.world_size > 1 else self.recorder
        for logger in trainer.loggers:
            logger.log_metrics(window.metrics(self.prefix), step=step)
        self.recorder.snapshot(step)

    def on_validation_start(self, *args: Any) -> None:
        if self.recorder is not None:
            self.pause.enter_context(self.recorder.paused())

    def on_validation_end(self, *args: Any) -> None:
        self.pause.close()

    def on_fit_end(self, *args: Any) -> None:
        self.pause.close()
        if self.recorder is not None:
            self.recorder.stop()

    def on_exception(self, *args: Any) -> None:
        self.on_fit_end()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.recorder is None else {"recorder": self.recorder.state_dict(), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved, self.last = state.get("recorder"), state.get("last", 0)
