"""A callback for the ``Trainer`` of transformers (``pip install transformers accelerate``)."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from torchprobe.common.files import replacing
from torchprobe.common.messages import reason
from torchprobe.integrations.monitor import Monitor
from torchprobe.integrations.packages import base_class, require
from torchprobe.integrations.padding import Padding
from torchprobe.recording import History, Recorder, RecordingWarning
from torchprobe.recording.layers import Selection

_FILE = "torchprobe-rank{}.pt"
_ENDS = ("training_step", "get_batch_samples", "_maybe_log_save_evaluate", "evaluate")
"""Methods of the trainer that may fail: it tells no callback when it does."""

_CALLBACK = base_class("TrainerCallback", "transformers")


class RecordActivations(_CALLBACK):  # type: ignore[misc,valid-type]
    """Records the layers of a model while a ``Trainer`` trains it. Its numbers are logged with the loss, to the same trackers.

    ``Trainer(…, callbacks=[RecordActivations()])``. A window is closed whenever the trainer logs its loss; ``log_history`` and the trackers
    get one record with both. The console shows the loss alone. Evaluation is not recorded, because the trainer evaluates in eval mode. With
    several ranks the numbers are those of all. Each checkpoint of the trainer holds the state, and a resumed training goes on with it.
    Hooks are removed at the end, and if the training fails.

    Padding does not count if the batch has an ``attention_mask`` for its ``input_ids``. The decoder of an encoder-decoder has its
    ``decoder_attention_mask``, or the tokens whose label is not -100.

    Args:
        layers: see :func:`torchprobe.record`. Default: every block, and the model itself, which keys call "model".
        prefix, fields, merge, save: see :class:`~torchprobe.integrations.Monitor`.
        mask: whether to leave out padding.
        options: for :func:`torchprobe.record`; ``when="train"`` is the default.

    ``recorder`` and ``history`` stay readable after the training; they are None before.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: ``log_every`` is given; ``logging_steps`` of the trainer says it.
    """

    def __init__(
        self,
        layers: Selection | None = None,
        *,
        prefix: str = "act/",
        fields: str | Iterable[str] | None = None,
        merge: bool = True,
        save: str | os.PathLike[str] | None = None,
        mask: bool = True,
        **options: Any,
    ) -> None:
        if _CALLBACK is object:
            require("transformers", "RecordActivations")
        if "log_every" in options:
            raise TypeError("log_every= is not for the Trainer: a window is closed whenever it logs, see its logging_steps")
        self.layers, self.mask = layers, mask
        self.options = {"prefix": prefix, "fields": fields, "merge": merge, "save": save, "when": "train", **options}
        self.monitor: Monitor | None = None
        self._cleanup = contextlib.ExitStack()
        self._numbers: dict[str, float] = {}
        self._logged = 0

    @property
    def recorder(self) -> Recorder | None:
        return None if self.monitor is None else self.monitor.recorder

    @property
    def history(self) -> History | None:
        return None if self.monitor is None else self.monitor.history

    # -- called by the trainer -----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.leave()
        trainer, resumed_from = _trainer()
        self.monitor = Monitor(model, self.layers, log_every=None, **self.options)
        self._logged = state.global_step
        if state.global_step:
            self._resume(Path(resumed_from or Path(args.output_dir, f"checkpoint-{state.global_step}")), args)
        called = model if trainer is None else trainer.model_wrapped
        if self.mask:
            self._cleanup.callback(Padding(called, self.monitor.recorder).place(called).remove)
        if trainer is not None:
            self._arrange(trainer.callback_handler)
            self._cleanup.callback(_guard(trainer, self.leave))
        self.monitor.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is None:
            return
        try:
            self.monitor.step(state.global_step)
        except BaseException:  # a guard that raises; the trainer tells no callback
            self.leave()
            raise

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.monitor is None or not logs or not {"loss", "learning_rate"} <= logs.keys() or state.global_step <= self._logged:
            return  # not the numbers of training steps
        self._logged = state.global_step
        self._numbers = self.monitor.log(state.global_step)
        logs.update(self._numbers)  # trackers come after this callback, and get what is in `logs`
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self._numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is None or args.save_only_model:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)  # other machines may have none
        try:
            with replacing(folder / _FILE.format(args.process_index)) as temporary:
                torch.save({**self.monitor.state_dict(), "size": args.world_size}, temporary)
        except OSError as error:
            text = f"torchprobe: the recording is not part of the checkpoint: {reason(error)}"
            warnings.warn(text, RecordingWarning, stacklevel=2)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._cleanup.close()
        if self.monitor is not None:
            self.monitor.stop()

    def leave(self) -> None:
        """Removes the hooks. For a training that failed where the trainer tells nobody, as by Ctrl-C between two steps."""
        self._cleanup.close()
        if self.monitor is not None:
            self.monitor.leave()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _resume(self, folder: Path, args: Any) -> None:
        """Each rank takes its own file; if there are fewer ranks than files, these take the others too."""
        assert self.monitor is not None
        try:
            first = torch.load(folder / _FILE.format(0), weights_only=True, map_location="cpu")
            numbers = [*range(first.pop("size"))][args.process_index :: args.world_size]
            states = [torch.load(folder / _FILE.format(number), weights_only=True, map_location="cpu") for number in numbers]
            self.monitor.load_state_dicts([first, *[{key: one[key] for key in first} for one in states]], len(states))
        except Exception as error:  # unpickling a damaged file raises many kinds
            text = f"torchprobe: the recording in {folder} cannot be continued, and starts anew: {reason(error)}"
            warnings.warn(text, RecordingWarning, stacklevel=3)

    # -- logging -------------------------------------------------------------------------------------------------------

    def _arrange(self, handler: Any) -> None:
        """Puts this callback before the trackers, and what hides its numbers before the console.

        ``Trainer.log`` in a callback would be simpler. But the handler of its ``on_log`` sets ``control.should_log`` to False, so that the
        trainer does not log its loss after ``on_step_end``; and called in ``on_log`` it would call itself. Handlers iterate over the list
        of before, so it may be replaced.
        """
        from transformers import PrinterCallback, ProgressCallback
        from transformers.trainer_callback import DefaultFlowCallback

        hide = _Hide(self)
        others = [one for one in handler.callbacks if one is not self and not isinstance(one, _Hide)]
        flow = [one for one in others if isinstance(one, DefaultFlowCallback)]
        console = [one for one in others if isinstance(one, (PrinterCallback, ProgressCallback))]
        rest = [one for one in others if one not in flow and one not in console]
        handler.callbacks = [*flow, self, *rest, hide, *console]
        self._cleanup.callback(lambda: setattr(handler, "callbacks", [one for one in handler.callbacks if one is not hide]))

    def numbers_logged(self) -> dict[str, float]:
        """What the last :meth:`on_log` has added."""
        return self._numbers


class _Hide(_CALLBACK):  # type: ignore[misc,valid-type]
    """Takes the numbers out of what the console shows: it would be dozens of them, around a loss."""

    def __init__(self, recording: RecordActivations) -> None:
        self.recording = recording

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key in self.recording.numbers_logged():
            (logs or {}).pop(key, None)


def _trainer() -> tuple[Any, Any]:
    """The trainer whose training begins, and the checkpoint that it resumes from; None if they are not found.

    Callbacks are given neither. But they are called by the trainer, so it is in a frame of the stack.
    """
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back  # type: ignore[assignment]
    return (None, None) if frame is None else (frame.f_locals["self"], frame.f_locals.get("resume_from_checkpoint"))


def _guard(trainer: Any, end: Any) -> Any:
    """Calls ``end`` if one of the methods of a trainer raises; the result undoes that."""
    own = weakref.ref(trainer)
    guarded = [name for name in _ENDS if hasattr(trainer, name) and name not in vars(trainer)]
    for name in guarded:
        setattr(trainer, name, _ending(getattr(trainer, name), end))

    def undo() -> None:
        if (alive := own()) is not None:
            for name in guarded:
                vars(alive).pop(name, None)

    return undo


def _ending(method: Any, end: Any) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException:
            end()
            raise

    return call
