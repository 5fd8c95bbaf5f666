"""Recording while a model runs."""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchprobe.ops.positions import POSITIONS
from torchprobe.recording import compiled, control, diagnosis, windows
from torchprobe.recording.control import NOTHING_TO_READ, Control, Skipped, Slot
from torchprobe.recording.history import History, Step
from torchprobe.recording.hook import GradientHook, Hook, InputHook, allocate, takes_hooks
from torchprobe.recording.layers import Layer, Selection, named_layers, select_layers
from torchprobe.recording.recording import FORMAT, Recording
from torchprobe.recording.windows import Entry, Settings, check_mergeable
from torchprobe.statistics import Moments
from torchprobe.statistics.factory import Factory, StatisticLike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_HOOKS: dict[str, type[Hook]] = {"output": Hook, "input": InputHook, "gradient": GradientHook}
_WHEN = ("always", "train", "eval")


class Recorder(Recording):
    """Records the activations of ``model`` while it runs. Use it in a ``with`` statement, or call ``start`` and ``stop``.

    ``torchprobe.record`` is this class: a :class:`Recording` that grows while its model runs. It shows the running window, which is
    everything since the last :meth:`snapshot`. Hooks, ``snapshot``, ``reset`` and ``paused`` never wait for the device; reading does.
    ``recorder[layer]`` is a copy of the present state.

    Args:
        model: any module, also a compiled, parallel or wrapped one.
        layers: a name or glob (``*`` is one component of a name, ``**`` any number); several of them; a compiled regular
            expression, which must match a whole name; ``predicate(name, module) -> bool``. Default: the children of every
            ``ModuleList`` and ``Sequential`` that holds at least two modules of one class (the outermost such), and the
            model itself, whose name is ``""``.
        of: "output", "input", or "gradient" (of the tensor that ``backward`` is called on, with respect to the output).
        statistic: what to keep of each layer. A class such as :class:`~torchprobe.Moments`; a function ``(features, device) -> Statistic``,
            such as ``functools.partial(Quantile, quantile=0.01)``; or a list of these, which one hook updates together. A function is also
            called once for 16 features on the CPU, before the model runs. See :class:`torchprobe.statistics.Statistic`.
        positions: what one vector is: "all" (each token, each position of a map), "class" (the first token), "patch" (the
            other tokens), "mean" (one pooled vector for each input).
        feature_dim: the dimension of the features, for all layers or as ``{name or glob: dim}``. By default it follows
            from the class of the layer, see :func:`torchprobe.recording.layers.default_feature_dim`.
        every: read only every n-th call of a layer; the calls are counted on the device.
        when: "always", or only while the layer is in "train" or in "eval" mode.
        select: a function from the output of the module to the tensor to read; with ``of="input"`` it is called with ``(args, kwargs)``.
            Default: the first floating-point tensor that is more than a single number.
        outlier_sigma: see :class:`torchprobe.Moments`; passed to every class in ``statistic`` whose constructor takes it.
        keep: how many windows ``history`` keeps, the newest ones. Default: all. ``total`` always includes all windows.

    Raises:
        ValueError: the model does not have a layer, or an argument is out of range. No hook is placed then.
        TypeError: ``statistic`` does not make statistics, or they break the contract; the message says how.

    >>> import torch, torchprobe
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    >>> with torchprobe.record(model, ["0", "2"]) as rec:
    ...     for _ in range(3):
    ...         _ = model(torch.randn(10, 8))
    >>> rec.layers, rec["2"].vectors, tuple(rec["2"].kurtosis.shape)
    (['0', '2'], 30, (4,))
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Selection | None = None,
        *,
        of: str = "output",
        statistic: StatisticLike | Sequence[StatisticLike] = Moments,
        positions: str = "all",
        feature_dim: int | Mapping[str, int] | None = None,
        every: int = 1,
        when: str = "always",
        select: Callable[..., Tensor] | None = None,
        outlier_sigma: float = 6.0,
        keep: int | None = None,
    ) -> None:
        for name, value, choices in (("of", of, _HOOKS), ("positions", positions, POSITIONS), ("when", when, _WHEN)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        if not outlier_sigma > 0:
            raise ValueError(f"outlier_sigma must be positive, got {outlier_sigma}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"record takes a torch.nn.Module, got {type(model).__name__}")
        factory = Factory(statistic, outlier_sigma)
        history = History(keep, factory.template)
        selected = select_layers(model, layers, feature_dim)
        if all(isinstance(layer.module, torch.jit.ScriptModule) for layer in selected):
            raise ValueError(
                "every selected layer is a scripted module, which takes no hooks and runs its children without Python: "
                "record the model before torch.jit.script, or wrap it, nn.Sequential(scripted), and record the wrapper"
            )
        aliases = {alias: layer.name for layer in selected for alias in layer.names[1:]}
        sigma = getattr(factory.template, "outlier_sigma", float(outlier_sigma))
        super().__init__([], Settings(of, positions, sigma, factory.name), aliases, factory.template)
        self.history = history
        self._control = Control(factory, positions, every, when, select, lenient=layers is None)
        self._hooks = {layer.name: _HOOKS[of](layer, self._control) for layer in selected}
        self._model = weakref.ref(model)
        self._witness = diagnosis.Witness()
        self._undo: list[Callable[[], object]] = []
        if positions != "all":
            _check_batch_first(selected, positions)

    # -- starting and stopping -----------------------------------------------------------------------------------------

    def start(self) -> Recorder:
        """Places the hooks. If one cannot be placed, none is."""
        if self._control.live:
            raise RuntimeError("this recorder is running already; call stop() first, or create another one with record()")
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this recorder no longer exists")
        named = named_layers(model)
        dropped = compiled.drop_graphs({type(hook.layer.module) for hook in self._hooks.values()})
        try:
            if takes_hooks(named[""].module):
                self._undo.extend(handle.remove for handle in diagnosis.watch(named[""].module, self._witness))
            if self.settings.of != "gradient":
                self._undo.extend(compiled.refuse_recomputation(model, self._traced))
            for hook in self._hooks.values():
                if takes_hooks(hook.layer.module):
                    self._undo.append(hook.place(hook.layer.module).remove)
        except BaseException:
            self._remove_hooks()
            raise
        self._control.live = True
        if dropped:
            warnings.warn(
                "torchprobe: this model was compiled and had run before recording started. Its compiled graphs do not contain "
                "the hooks, so they were dropped, and the next call compiles again. To compile once, start recording before "
                "the first call and do not stop: paused() and snapshot() separate what should not be mixed.",
                diagnosis.RecordingWarning,
                stacklevel=2,
            )
        return self

    def stop(self) -> None:
        """Removes the hooks, the last one first, and reports every layer that never fired (:class:`RecordingWarning`)."""
        self._stop(report=True, stacklevel=3)

    def __enter__(self) -> Recorder:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop(report=kind is None, stacklevel=3)

    def _stop(self, report: bool, stacklevel: int) -> None:
        if not self._control.live:
            return
        self._control.live = False
        self._control.mask = None
        self._remove_hooks()
        model = self._model()
        hooks = list(self._hooks.values())
        for hook in hooks:
            control.leave(hook.slots)
        if self._control.graphs:  # their operators belong to this recorder; they would only fill the cache of the compiler
            compiled.drop_graphs({type(hook) for hook in hooks})
            compiled.forget_graphs(self._control.graphs)
        if report and model is not None:
            diagnosis.report(hooks, named_layers(model), self._witness, stacklevel)

    def _traced(self, modules: set[int]) -> bool:
        return any(id(hook.layer.module) in modules for hook in self._hooks.values() if Skipped.TRACED in hook.skipped)

    def _remove_hooks(self) -> None:
        while self._undo:
            self._undo.pop()()

    # -- while it runs -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """``with rec.paused(): validate()``: calls inside do not count. In a compiled model the first pause compiles."""
        before, self._control.paused = self._control.paused, True
        restore = control.keep_contents(self._slots())  # replays of a CUDA graph do not see the pause
        try:
            yield
        finally:
            self._control.paused = before
            restore()

    def mask(self, mask: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Sets the padding mask of the next batches: bool (batch, tokens), True for tokens that count; None clears it.

        It holds until it is changed, or, in ``with rec.mask(m):``, until the end of the block. It applies to activations
        with one vector per token, not to those with one vector per input. With ``positions="mean"`` the mean is over the tokens
        that count, and inputs without such tokens are left out.

        Raises:
            TypeError, ValueError: the mask is not bool, or not (batch, tokens).
        """
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"a mask is a bool tensor, True for the tokens that count; got {what}: try mask.bool()")
            if mask.dim() != 2:
                raise ValueError(f"a mask has the shape (batch, tokens), got {tuple(mask.shape)}")
            update = self._control.factory.template.update
            if "mask" not in inspect.signature(update).parameters:
                raise ValueError(f"{self.settings.statistic}.update takes no mask, so it cannot be recorded with one")
        before, self._control.mask = self._control.mask, mask
        return _restored(self._control, before)

    def snapshot(self, step: Step) -> None:
        """Closes the running window under the name ``step`` and starts the next one. It does not synchronize.

        ``history`` keeps the summary of each window, ``total`` the sum of all.

        Raises:
            TypeError: ``step`` is not a finite number.
            RuntimeError: inside ``paused()`` after a CUDA graph was captured.
        """
        self._check_no_captured_pause()
        entries = self._entries()
        parts = windows.summaries([entry.statistic for entry in entries], True)
        self.history.append(step, [entry.name for entry in entries], [([entries[i].name for i in group], part) for group, part in parts])
        slots = self._slots()
        closed = windows.close([slot.statistic for slot in slots], [slot.closed for slot in slots])
        for slot, statistic in zip(slots, closed, strict=True):
            slot.closed = statistic

    def reset(self) -> None:
        """Forgets everything: the running window, the closed ones, the history and the counters of ``every``."""
        self._check_no_captured_pause()
        windows.erase([slot.statistic for slot in self._slots()])
        for slot in self._slots():
            slot.closed, slot.calls = None, 0
        self.history = History(self.history.keep, self._control.factory.template)

    def _check_no_captured_pause(self) -> None:
        if self._control.paused and any(slot.captured for slot in self._slots()):
            raise RuntimeError(
                "no window can end inside paused() here: the step was captured in a CUDA graph, and the end of the pause removes "
                "what its replays add; call this outside the pause"
            )

    # -- merging and resuming -------------------------------------------------------------------------------------------

    def all_reduce(self, group: ProcessGroup | None = None, union: bool = False, timeout: float | None = None) -> Recording:
        """The recordings of all ranks as one, the same on every rank. Collective; this recorder does not change.

        States are merged in the order of the ranks. A layer may be silent on some ranks. The result has no history, since summaries
        of windows cannot be merged. Call it before :meth:`snapshot` for the numbers of one window.

        Args:
            group: the process group; default: all ranks.
            union: accept that the ranks record different layers.
            timeout: seconds to wait for the other ranks. Default: that of the process group.

        Raises:
            ValueError: the ranks record different layers (unless ``union``), widths or settings; on every rank, with the difference.
            RuntimeError: a rank has ended, or did not call this within ``timeout``. The process group is unusable then.
        """
        from torchprobe.recording.distributed import all_reduce  # seldom used, so `import torchprobe` leaves it out

        factory = self._control.factory
        entries, aliases = all_reduce(self._entries(), self.settings, list(self._hooks), self.aliases, factory, group, union, timeout)
        return Recording(entries, self.settings, aliases, factory.template)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, and forgets everything this recorder has seen. ``keep`` does not change.

        Raises:
            ValueError: the state has other settings, unknown layers, or parts that do not fit. Nothing is changed then.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"expected the state of a recorder, format {FORMAT}; got format {state.get('format')!r}")
        if state["settings"] != asdict(self.settings):
            raise ValueError(f"the state was recorded with {state['settings']}, this recorder has {asdict(self.settings)}")
        unknown = [name for name in state["layers"] if name not in self._hooks]
        if unknown:
            raise ValueError(f"the state holds layers that this recorder does not watch: {', '.join(map(repr, unknown))}")
        layers: dict[str, Mapping[str, Any]] = state["layers"]
        check_mergeable(self._entries(), [self._trial(name, saved) for name, saved in layers.items()])
        history = History(self.history.keep, self._control.factory.template)
        history.load_state_dict(state["history"])
        self.reset()
        for name, saved in layers.items():
            hook = self._hooks[name]
            slot = self._slot(hook, saved["features"])
            slot.statistic.load_state_dict(saved["window"])
            if saved["closed"] is not None:
                slot.closed = self._control.factory(saved["features"], slot.statistic.device)
                slot.closed.load_state_dict(saved["closed"])
            slot.calls = saved.get("calls", 0)
            hook.loaded_dim = saved["feature_dim"]
        self.history = history

    def _trial(self, name: str, saved: Mapping[str, Any]) -> Entry:
        """A saved layer, loaded apart from this recorder."""
        statistic = self._control.factory(saved["features"], torch.device("cpu"))
        try:
            for state in (saved["closed"], saved["window"]):
                if state is not None:
                    statistic.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        return Entry(name, "", saved["feature_dim"], statistic)

    # -- what a Recording needs -------------------------------------------------------------------------------------

    def _watched(self) -> list[str]:
        return list(self._hooks)

    def _silent(self) -> list[str]:
        return [hook.layer.name for hook in self._hooks.values() if not hook.slots and not hook.skipped & NOTHING_TO_READ]

    def _find(self, name: str) -> Entry | None:
        hook = self._hooks.get(name)
        return _entry(hook) if hook is not None and hook.slots else None

    def __getitem__(self, layer: str) -> Any:
        return windows.duplicate(self._entry(layer).statistic)

    def _entries(self) -> list[Entry]:
        fired = sorted((hook for hook in self._hooks.values() if hook.slots), key=lambda hook: hook.order)
        return [_entry(hook) for hook in fired]

    def _missing(self, layer: str) -> str:
        name = self.aliases.get(layer, layer)
        return f"layer {name!r} is recorded, but has not fired" if name in self._hooks else super()._missing(layer)

    def _check_mergeable(self, other: Recording) -> None:
        super()._check_mergeable(other)
        theirs = other._entries()
        silent = [entry for entry in theirs if not self._hooks[entry.name].slots]
        empty = [replace(entry, statistic=self._control.factory(entry.statistic.features, torch.device("cpu"))) for entry in silent]
        check_mergeable(empty, theirs)

    def _absorb(self, theirs: Entry) -> None:
        slot = self._slot(self._hooks[theirs.name], theirs.statistic.features)
        slot.statistic.merge(theirs.statistic)
        if theirs.closed is not None:
            if slot.closed is None:
                slot.closed = self._control.factory(theirs.closed.features, slot.statistic.device)
            slot.closed.merge(theirs.closed)
        slot.calls += theirs.calls

    def _slots(self) -> list[Slot]:
        return [slot for hook in self._hooks.values() for slot in hook.slots.values()]

    def _slot(self, hook: Hook, features: int) -> Slot:
        """The slot of a layer that may not have fired yet: then on the device of the parameters around it, its most likely device."""
        if not hook.slots:
            model = self._model()
            around = [hook.layer.module, *([] if model is None else [model])]
            device = next((p.device for module in around for p in module.parameters()), torch.device("cpu"))
            allocate(hook.key, features, device)
        return next(iter(hook.slots.values()))


def _entry(hook: Hook) -> Entry:
    slots = list(hook.slots.values())
    statistic, closed = slots[0].statistic, slots[0].closed
    if len(slots) > 1:
        together = windows.merged([slot.statistic for slot in slots])
        assert together is not None
        statistic, closed = together, windows.merged([slot.closed for slot in slots])
    feature_dim = next(iter(hook.dims.values()), hook.loaded_dim)
    return Entry(hook.layer.name, hook.layer.kind, feature_dim, statistic, closed, sum(slot.calls for slot in slots))


def _check_batch_first(selected: list[Layer], positions: str) -> None:
    """Refuses attention with tokens in the first dimension, since they are expected in the second."""
    for layer in selected:
        for family in (layer.module, layer.parent):
            for module in () if family is None else (family, *family.children()):
                if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
                    raise ValueError(
                        f'positions="{positions}" needs (batch, tokens, features), but layer {layer.name!r} works on '
                        f'(tokens, batch, features): its attention has batch_first=False. Use positions="all" for it'
                    )


@contextlib.contextmanager
def _restored(control: Control, mask: Tensor | None) -> Iterator[None]:
    try:
        yield
    finally:
        control.mask = mask


record = Recorder
