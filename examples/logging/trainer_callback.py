"""A callback for the Trainer of Hugging Face transformers. It records every block, logs with the loss, and resumes with its history.

    trainer = Trainer(model, arguments, train_dataset=…)
    trainer.add_callback(RecordActivations(trainer))

Needs ``pip install transformers accelerate``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import torchprobe


class RecordActivations(TrainerCallback):
    """Logs and closes a window whenever the trainer logs, to the same loggers. Evaluation is not recorded.

    ``layers`` and ``options`` go to :func:`torchprobe.record`; by default every block is recorded. ``recorder`` stays readable afterwards.
    """

    def __init__(self, trainer: Trainer, layers: Any = None, prefix: str = "act/", **options: Any) -> None:
        self.trainer, self.layers, self.prefix = trainer, layers, prefix
        self.options = {"when": "train", **options}  # the trainer evaluates in eval mode
        self.recorder: torchprobe.Recorder | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder = torchprobe.record(kwargs["model"], self.layers, **self.options).start()
        saved = _file(args, state)
        if state.global_step and saved.exists():
            self.recorder.load_state_dict(torch.load(saved, weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not control.should_log:
            return
        window = self.recorder.all_reduce() if args.world_size > 1 else self.recorder
        self.trainer.log(window.metrics(self.prefix))
        self.recorder.snapshot(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        torch.save(self.recorder.state_dict(), _file(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder.stop()


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    """Each process has its own windows, and its own file in the checkpoint."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}", f"recorder-{args.process_index}.pt")
