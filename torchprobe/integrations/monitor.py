"""What the integrations share: a recorder with its windows, its writers, its file, and what a checkpoint keeps of it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from torch import distributed, nn

import torchprobe
from torchprobe.common.messages import reason
from torchprobe.common.numbers import shown, whole
from torchprobe.common.ranks import Ranks
from torchprobe.recording import History, Recorder, Recording, RecordingWarning
from torchprobe.recording.layers import Selection
from torchprobe.recording.windows import summaries
from torchprobe.statistics.saved import check_keys, check_mapping, same

Writer = Callable[[Mapping[str, float], int], object]
"""Takes the numbers of a window and its step. It may have a ``close()``."""

FORMAT = 1
_SHARE = 100  # the file is written again after 100 times as long as writing took: about 1 % of the run


class Monitor:
    """Records a model while it trains: closes a window after every ``log_every`` steps, and gives its numbers to writers.

    For a loop of your own. Lightning, the ``Trainer`` of transformers and accelerate have callbacks that do the same.

    Args:
        model: any module, as for :func:`torchprobe.record`. A wrapped or compiled one may be given, too.
        layers: see :func:`torchprobe.record`.
        log_every: steps in a window. None: whenever :meth:`log` is called.
        to: a writer or several. A writer is a function of the numbers, ``{key: float}``, and the step, such as
            :func:`torchprobe.integrations.wandb.to_wandb` returns. Only rank 0 writes. A writer that fails is told, and the run goes on.
        prefix: of every key. Keys are ``"{prefix}{layer}/{field}"``; the model itself is called "model".
        fields: see :meth:`torchprobe.Recorder.metrics`; default: at most five for each layer.
        merge: with several ranks, the numbers are those of all ranks, at the price of one exchange for each window
            (:meth:`torchprobe.Recorder.all_reduce`). False: those of rank 0.
        save: a file, which rank 0 writes after windows, at most about 1 % of the time, and at the end: ``torchprobe watch`` shows it, and
            :func:`torchprobe.load` reads it. Its running window is the total, and has the steps after the last window too; with ``merge``
            and several ranks it does not, and a warning says so.
        options: for :func:`torchprobe.record`, such as ``statistic=``, ``guard=`` or ``every=``, which counts steps.

    ``recorder`` is the recorder. ``history`` holds the windows of all ranks; without ``merge`` or with one rank it is that of the recorder.

    Raises:
        ValueError: ``log_every`` is not a positive whole number, or an argument of the recorder is out of range.
        FileNotFoundError: the folder of ``save`` does not exist.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    >>> with Monitor(model, "0", log_every=2, to=lambda numbers, step: print(step, sorted(numbers)[0]), fields="vectors") as monitor:
    ...     for step in range(4):
    ...         _ = model(torch.randn(8, 4))
    ...         _ = monitor.step()
    2 act/0/vectors
    4 act/0/vectors
    >>> monitor.history["vectors"].tolist()
    [[16.0], [16.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Selection | None = None,
        *,
        log_every: int | None = 50,
        to: Writer | Iterable[Writer] = (),
        prefix: str = "act/",
        fields: str | Iterable[str] | None = None,
        merge: bool = True,
        save: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        check_log_every(log_every)
        if save is not None and not os.path.isdir(folder := os.path.dirname(os.path.abspath(save))):
            raise FileNotFoundError(f"save={os.fspath(save)!r}: there is no folder {folder!r}")
        self.recorder: Recorder = torchprobe.record(model, layers, **options)
        self.log_every, self.prefix, self.merge, self.path = log_every, prefix, merge, save
        self.fields = fields if fields is None or isinstance(fields, str) else list(fields)
        self.writers: list[Writer] = [to] if callable(to) else list(to)
        self.last = 0  # the step of the last window
        self.count = 0  # steps so far
        self._again = _maker(model, layers, options)
        self._merged = History(self.recorder.history.keep, self.recorder.history.statistic)
        self._broken: dict[int, str] = {}  # by the id of the writer
        self._unsaved: Recording | None = None  # newer than the file
        self._running = False
        self._next_save = 0.0
        self._label = ""  # of the model itself, in keys

    # -- its life ------------------------------------------------------------------------------------------------------

    def start(self) -> Monitor:
        """Places the hooks; see :meth:`torchprobe.Recorder.start`."""
        self.recorder.start()
        self._running = True
        self.recorder.step(self.count)  # `every` counts steps
        return self

    def stop(self) -> None:
        """Removes the hooks, writes the file, and closes the writers. A second call does nothing."""
        try:
            self.recorder.stop()
        finally:
            self._end()

    def leave(self) -> None:
        """The same without a report of layers that were not read, for a run that failed."""
        self.recorder.leave()
        self._end()

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.stop()
        else:
            self.leave()

    def _end(self) -> None:
        if self.path is not None and self.first and self._running:
            self._save_the_rest()
        self._running = False
        for writer in self.writers:
            if (close := getattr(writer, "close", None)) is not None:
                self._guarded(writer, close)
        self.writers = []

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """``with monitor.paused(): validate()``: see :meth:`torchprobe.Recorder.paused`."""
        return self.recorder.paused()

    # -- windows -------------------------------------------------------------------------------------------------------

    def step(self, step: int | None = None) -> dict[str, float] | None:
        """Ends a step of the optimizer: call it once after each. It returns the numbers if a window was closed. A guard and what watches
        for jumps look at the step now, see :meth:`torchprobe.Recorder.step`.

        Args:
            step: how many steps there were. Default: one more than before. A number that does not grow, as while gradients are
                accumulated, does nothing.

        Raises:
            NonfiniteError: a guard that raises has found something.
        """
        self._end_step(self.count + 1 if step is None else step)
        if self.log_every is None or self.count // self.log_every <= self.last // self.log_every:
            return None
        return self.log(self.count)

    def log(self, step: int) -> dict[str, float]:
        """Closes the window under the name ``step``, gives its numbers to the writers, and returns them. With several ranks and ``merge``
        every rank must call it.

        Raises:
            RuntimeError: a rank has ended, so that the numbers cannot be merged.
        """
        self._end_step(step)
        window = self._window()
        numbers = self.numbers(window)
        if window is not self.recorder or self._merged.steps:
            _append(self._merged, step, window)
        self.recorder.snapshot(step)
        self.last = step
        if self.first:
            for writer in self.writers:
                self._guarded(writer, functools.partial(writer, numbers, step))
            if self.path is not None:
                self._unsaved = window
                if time.monotonic() >= self._next_save:
                    self._write(window)
        return numbers

    def _end_step(self, step: int) -> None:
        before, self.count = self.count, step
        if step > before:
            self.recorder.step(step)

    def numbers(self, window: Recording | None = None) -> dict[str, float]:
        """The numbers of a window, with a name in the place of the empty one of the model. The keys are the same in every window."""
        numbers = self.recorder.metrics("", self.fields)
        if window is not None and window is not self.recorder:
            numbers = dict.fromkeys(numbers, math.nan) | window.metrics("", self.fields)
        if not self._label:  # a model may have a layer with this name
            names = {key.partition("/")[0] for key in numbers}
            self._label = next(name for name in ("model", "whole-model", "the-whole-model") if name not in names)
        root = ("/", "@", ":")  # what follows the empty name: a field, a kind of tensor, one of several outputs
        return {f"{self.prefix}{self._label if key[0] in root else ''}{key}": value for key, value in numbers.items()}

    @property
    def history(self) -> History:
        return self._merged if self._merged.steps else self.recorder.history

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return not _several() or distributed.get_rank() == 0

    def _window(self) -> Recording:
        """The running window: of all ranks, or of this one."""
        if not (self.merge and _several()):
            return self.recorder
        try:
            return self.recorder.all_reduce()
        except ValueError as error:  # on every rank
            self.merge = False
            text = f"torchprobe: the numbers are those of rank 0 from now on, because those of all ranks cannot be merged: {error}"
            warnings.warn(text, RecordingWarning, stacklevel=4)
            return self.recorder

    def _guarded(self, writer: Writer, action: Callable[[], object]) -> None:
        """A writer that fails does not end the run. Each kind of error is told once."""
        try:
            action()
        except Exception as error:
            if self._broken.get(id(writer)) != (why := reason(error)):
                self._broken[id(writer)] = why
                name = getattr(writer, "__qualname__", type(writer).__qualname__)
                warnings.warn(f"torchprobe: {name} did not write the numbers: {why}", RecordingWarning, stacklevel=4)

    # -- the file ------------------------------------------------------------------------------------------------------

    def _write(self, window: Recording) -> None:
        """Writes the total with the history. A disk that is full does not end the run."""
        assert self.path is not None
        start = time.monotonic()
        try:
            total = window.total
            total.history = self.history.copy()
            total.save(self.path)
            self._unsaved = None
        except (OSError, TypeError) as error:
            text = f"torchprobe: the recording was not written to {os.fspath(self.path)}: {reason(error)}"
            warnings.warn(text, RecordingWarning, stacklevel=4)
        self._next_save = time.monotonic() + _SHARE * (time.monotonic() - start)

    def _save_the_rest(self) -> None:
        """Writes what the file lacks: a window, and steps after the last one. Those of other ranks are not asked for, since they may have
        failed."""
        rest = any(bool(statistic.saw_anything()) for statistic in self.recorder.values())
        alone = not (self.merge and _several())
        if self._unsaved is not None or (rest and alone):
            self._write(self.recorder if alone else self._unsaved or self.recorder)
        if rest and not alone:
            text = f"steps after {self.last} are not in {os.fspath(self.path or '')}: their window was not closed, call log() on every rank"
            warnings.warn(f"torchprobe: {text}", RecordingWarning, stacklevel=4)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self, gather: bool = False) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers, text and tensors.

        Args:
            gather: with several ranks, the state of rank 0 holds those of all ranks, so that one file is enough. All ranks must call it.
        """
        states = [self.recorder.state_dict()]
        if gather and _several():
            with Ranks() as ranks:
                states += list(ranks.to_first(states[0]))
        history = self._merged.state_dict() if self._merged.steps else None
        return {"format": FORMAT, "last": self.last, "count": self.count, "history": history, "ranks": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned. Of several ranks in it, each rank takes its own; if there are now fewer ranks, these
        take those of the others too, so that nothing is lost.

        Raises:
            ValueError: it does not fit, for instance because other layers are recorded. Nothing is changed then.
        """
        rank, size = (distributed.get_rank(), distributed.get_world_size()) if _several() else (0, 1)
        self._restore(_checked(state), lambda ranks: ranks[rank::size])

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]], saved_here: int) -> None:
        """The same from what several ranks have saved without ``gather``.

        Args:
            states: of which the first gives the history and the steps.
            saved_here: how many of them, the last ones, this rank takes.

        Raises:
            ValueError: one does not fit. Nothing is changed then.
        """
        checked = [_checked(state) for state in states]
        ranks = [one for state in checked for one in state["ranks"]]
        self._restore({**checked[0], "ranks": ranks}, lambda ranks: ranks[len(ranks) - saved_here :])

    def _restore(self, state: Mapping[str, Any], choose: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        restored = self._again()
        for index, one in enumerate(choose(state["ranks"])):
            other = self._again() if index else restored
            other.load_state_dict(one)
            if index:  # the windows of ranks are not one after the other, so their histories cannot be joined
                other.history = History(statistic=other.history.statistic)
                restored.merge(other)
        merged = History(self._merged.keep, self._merged.statistic)
        if state["history"] is not None:
            merged.load_state_dict(state["history"])
        elif self.merge and _several() and len(state["ranks"]) == 1:  # saved by a run with one rank
            merged.load_state_dict(state["ranks"][0]["history"])
        self.recorder.load_state_dict(restored.state_dict())
        self._merged, self.last, self.count = merged, int(state["last"]), int(state["count"])
        self.recorder.step(self.count)  # the next one has the number that it would have had

    def resume(self, state: Mapping[str, Any], whence: str) -> None:
        """The same for a run that goes on whatever the checkpoint holds: what does not fit is told, and the recording starts anew."""
        try:
            self.load_state_dict(state)
        except (ValueError, TypeError) as error:
            text = f"torchprobe: the recording in {whence} does not fit this one, which starts anew: {error}"
            warnings.warn(text, RecordingWarning, stacklevel=3)


def check_log_every(log_every: Any) -> None:
    """Raises ValueError unless it is a whole number of at least 1, or None."""
    if log_every is not None and (isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1):
        raise ValueError(f"log_every must be a whole number of at least 1, or None; got {log_every!r}")


def _maker(model: nn.Module, layers: Selection | None, options: Mapping[str, Any]) -> Callable[[], Recorder]:
    """Makes recorders like that of a monitor. It does not keep the model alive."""
    reference = weakref.ref(model)

    def make() -> Recorder:
        if (alive := reference()) is None:
            raise RuntimeError("the model of this monitor no longer exists")
        return torchprobe.record(alive, layers, **options)

    return make


def _checked(state: Any) -> Mapping[str, Any]:
    check_mapping("a monitor", state)
    check_keys("a monitor", state, ("format", "last", "count", "history", "ranks"))
    if not same(state["format"], FORMAT) or not isinstance(state["ranks"], (list, tuple)):
        raise ValueError(f"expected the state of a monitor, format {FORMAT}; got format {shown(state['format'])}")
    for name in ("last", "count"):
        whole(name, state[name])
    return cast(Mapping[str, Any], state)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _append(history: History, step: int, window: Recording) -> None:
    """Adds the running window of a recording to a history."""
    entries = window.copied_entries()
    names = [entry.name for entry in entries]
    parts = summaries([entry.statistic for entry in entries], True)  # with histograms
    history.append(step, names, [([names[index] for index in group], numbers) for group, numbers in parts])
