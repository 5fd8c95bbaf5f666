"""What a recorder watches beside its statistics: guards."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torchprobe.recording.guard import Guard
from torchprobe.recording.guard_options import Allow, GuardOptions, On, Scaler
from torchprobe.recording.jumps import JumpOptions, Jumps
from torchprobe.recording.jumps import On as OnJump
from torchprobe.recording.layers import Exclusion, Selection
from torchprobe.recording.recording import Recording
from torchprobe.recording.verdicts import Report
from torchprobe.recording.watchers import Watchers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Watched(Recording):
    """A recording with guards; the base class of :class:`torchprobe.Recorder`, which places and removes hooks."""

    _watchers: Watchers
    _undo: list[Callable[[], object]]

    def guard(
        self,
        layers: Selection | None = None,
        *,
        exclude: Exclusion | None = None,
        gradients: bool = True,
        on: On = "warn",
        allow: Allow = "",
        scaler: Scaler | None = None,
        dump: str | os.PathLike[str] | None = None,
    ) -> Guard:
        """Finds the first nonfinite activation or gradient: which layer, which call, which rows, and whether it came in or was made there.

        What a step has found is told when the step ends, by :meth:`step`, :meth:`snapshot` or the end of the recording, or when
        :meth:`guard_report` asks. Nothing waits for a device in between.

        Args:
            layers: as in ``record``. Default: the recorded ones. ``"**"`` names the very module, and costs more.
            exclude: layers to leave out: names, globs and classes.
            gradients: look at gradients, too: with respect to the outputs, and of the scales and biases inside of the layers.
            on: "warn" (:class:`NonfiniteWarning`), "raise" (:class:`NonfiniteError`), or a function that gets the :class:`Report`.
            allow: kinds of values that are legitimate in outputs, "-inf", "inf", "nan" or several: for all layers, or as
                ``{name or glob: kinds}``. Attention logits with a mask hold −inf, for example.
            scaler: the ``GradScaler`` of the training. Gradients that overflow in a step that it skips are counted, and are no alarm,
                until its scale is 1 or less. Call :meth:`step` in every step.
            dump: a folder for what is known of an alarm: the offending rows, the ranges of the weights, and the last steps of the
                statistics of every layer, as safetensors and as a page.

        Returns:
            the guard; ``guard.reports`` has every alarm.

        Raises:
            ValueError: an unknown layer, or an argument is out of range.

        >>> import torch, torchprobe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> _ = model[2].weight.data[0, 1].fill_(float("nan"))
        >>> with torchprobe.record(model) as rec:
        ...     guard = rec.guard("**", on=lambda report: None)
        ...     _ = model(torch.ones(3, 4))
        ...     rec.step()
        >>> guard.reports[0].first.layer, guard.reports[0].first.verdict
        ('2', 'made here')
        """
        guard = self._watchers.guard(GuardOptions(layers, exclude, gradients, on, allow, scaler, dump))
        if self._watchers.control.live:
            self._undo.extend(guard.place())
        return guard

    @property
    def guards(self) -> list[Guard]:
        """The guards of this recorder. ``print(*rec.guards)`` says what they have looked at, also when nothing was found.

        >>> import torch, torchprobe
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> with torchprobe.record(model, "*", guard=True) as rec:
        ...     loss = model(torch.ones(3, 4)).sum() / 0
        ...     rec.step()
        >>> print(*rec.guards)  # doctest: +ELLIPSIS
        torchprobe guard: 2 of 2 guarded layers ran in 1 step. Their outputs were finite; no gradient was looked at. If the loss is not, ...
        """
        return [*self._watchers.guards]

    def guard_report(self, ranks: bool = False, group: ProcessGroup | None = None, timeout: float | None = None) -> Report | None:
        """What the guards know now: the trouble of the running step, else the newest alarm.

        None if all guarded outputs and gradients were finite; :attr:`guards` says that in words. The loss is not guarded. It waits for the
        device, and does not count as telling: the end of the step still does.

        Args:
            ranks: of all ranks, the same on each: the earliest step counts. Collective.
            group, timeout: see :meth:`torchprobe.Recorder.all_reduce`.

        Raises:
            RuntimeError: a rank has ended, or did not call this within ``timeout``.
        """
        reports = [report for guard in self._watchers.guards if (report := guard.peek()) is not None]
        if ranks:
            from torchprobe.recording.distributed import gather  # seldom used, so `import torchprobe` leaves it out

            sent = json.dumps([report.to_dict() for report in reports]).encode()
            reports = [Report.from_dict(values) for text in gather(sent, group, timeout) for values in json.loads(text)]
            return Report.of_ranks(reports) if reports else None
        return max(reports, key=lambda report: (report.first.step or 0, -report.first.order), default=None)

    def watch_jumps(
        self,
        fields: str | Iterable[str] | None = None,
        layers: str | Iterable[str] | None = None,
        *,
        false_alarms: float = 0.01,
        windows: int = 10_000,
        least: float = 0.1,
        on: OnJump = "warn",
        save: str | os.PathLike[str] | None = None,
    ) -> Jumps:
        """Watches fields of the layers for changes against their own past, window by window; :meth:`snapshot` closes a window.

        Compared are the medians of blocks of 5, 20 and 80 windows with those before, relative to how much they usually change: see
        :mod:`torchprobe.statistics.changes`. After 125 windows a sudden change is found within 10 windows. A slow one is found in the
        larger blocks, after 500 and 2,000 windows. On a GPU it is told one window later, since nothing waits for the device.

        Args:
            fields: of the statistic. Default: those of :meth:`metrics`, without ``nonfinite``, which is for a guard.
            layers: names and globs of rows; default: all.
            false_alarms: the share of healthy runs of ``windows`` windows with a false alarm, over all layers and fields together.
            windows: the length of such a run.
            least: smaller changes do not count; 0.1 is 10 %.
            on: "warn" (:class:`JumpWarning`), or a function that gets the :class:`Jump`.
            save: a folder, to which the recording is written when there is a jump.

        Returns:
            the watch; ``jumps.found`` has every jump.

        Raises:
            ValueError, KeyError: an argument is out of range, or the statistic has no such field.

        >>> import torch, torchprobe
        >>> model = torch.nn.Linear(4, 3)
        >>> with torchprobe.record(model) as rec:
        ...     jumps = rec.watch_jumps("std", on=print)
        ...     for step in range(200):
        ...         if step == 190:
        ...             _ = model.weight.data.mul_(100)
        ...         _ = model(torch.randn(512, 4, generator=torch.Generator().manual_seed(step)))
        ...         rec.snapshot(step)  # doctest: +ELLIPSIS
        std of (output) went from ... to ..., between steps 190 and 194 or just before (...)
        """
        template = self._watchers.control.factory.template
        options = JumpOptions(fields, layers, false_alarms, windows, least, on, None if save is None else Path(save))
        reference = weakref.ref(self)

        def save_recording(path: Path) -> None:
            if (recording := reference()) is not None:
                recording.save(path)

        self._watchers.jumps.append(Jumps(template, options, save_recording))
        return self._watchers.jumps[-1]
