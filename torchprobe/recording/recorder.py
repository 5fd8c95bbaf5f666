"""Recording while a model runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchprobe.common.messages import users_level
from torchprobe.common.numbers import shown
from torchprobe.common.threads import ordered
from torchprobe.recording import compiled, control, detach, diagnosis, windows
from torchprobe.recording.bank import Bank, entry_of
from torchprobe.recording.control import Control
from torchprobe.recording.guard_hooks import Watch
from torchprobe.recording.history import History, Step, plain_number
from torchprobe.recording.hook import takes_hooks
from torchprobe.recording.layers import Exclusion, Selection, named_layers
from torchprobe.recording.recording import FORMAT, Recording
from torchprobe.recording.setup import check_arguments, make_hooks, select_kinds
from torchprobe.recording.stream import RecordingWarning
from torchprobe.recording.trail import Trail
from torchprobe.recording.watched import Watched
from torchprobe.recording.watchers import Watchers
from torchprobe.recording.windows import Entry, Settings, Unread, check_mergeable
from torchprobe.statistics import Moments
from torchprobe.statistics.factory import Factory, StatisticLike
from torchprobe.statistics.saved import check_keys, check_mapping, same

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Recorder(Watched):
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
        exclude: layers to leave out: names, globs and classes of modules; one of them or a list.
        of: "output", "input", "gradient" (of the tensor that ``backward`` is called on, with respect to the output), "weight" (the
            parameters of the layer itself) or "weight_gradient". Several of them, ``of=("output", "gradient")``, name their rows
            ``"fc"`` for the output and ``"fc@gradient"`` for the gradient of layer ``fc``.
        statistic: what to keep of each layer. A class such as :class:`~torchprobe.Moments`; a function ``(features, device) -> Statistic``,
            such as ``functools.partial(Quantile, quantile=0.01)``; or a list of these, which one hook updates together. A function is also
            called once for 16 features on the CPU, before the model runs. See :class:`torchprobe.statistics.Statistic`.
        positions: what one vector is: "all" (each token, each position of a map), "class" (the first token), "patch" (the
            other tokens), "mean" (one pooled vector for each input).
        feature_dim: the dimension of the features, for all layers or as ``{name or glob: dim}``. By default it follows from what the model
            says, see :mod:`torchprobe.recording.axes`; rows say by what (``feature_dim_by``). "unsure" means that nothing decides.
        every: read only every n-th call of a layer; the calls are counted on the device. With :meth:`step`, every n-th step.
        when: "always", or only while the layer is in "train" or in "eval" mode.
        select: a function from the output of the module to the tensor to read; with ``of="input"`` it is called with ``(args, kwargs)``.
            Default: the floating-point tensors that are more than a single number. If several of an output have features, each is read
            under a name of its own: ``"block:0"``, ``"block:1"``. Of the inputs it is the first.
        on_error: "warn": what cannot be read is left out with a warning, counted, and named at the end; the forward goes on. Only a layer
            whose name you wrote out is an error if its first call cannot be read. "raise": everything is an error.
        outlier_sigma: see :class:`torchprobe.Moments`; passed to every class in ``statistic`` whose constructor takes it.
        keep: how many windows ``history`` keeps, the newest ones. Default: all. ``total`` always includes all windows.
        guard: True finds the first nonfinite activation or gradient, and warns; "raise", a function or a dict: see :meth:`guard`.

    Hooks see what a layer gives when they are called, in the order of their registration: a hook of yours that changes the output counts if
    it was registered before ``start``. A recorder that is deleted while it runs removes its hooks.

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
        exclude: Exclusion | None = None,
        of: str | Sequence[str] = "output",
        statistic: StatisticLike | Sequence[StatisticLike] = Moments,
        positions: str = "all",
        feature_dim: int | Mapping[str, int] | None = None,
        every: int = 1,
        when: str = "always",
        select: Callable[..., Tensor] | None = None,
        on_error: str = "warn",
        outlier_sigma: float = 6.0,
        keep: int | None = None,
        guard: bool | str | Callable[..., object] | Mapping[str, Any] = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"record takes a torch.nn.Module, got {type(model).__name__}")
        kinds = check_arguments(of, positions, every, when, on_error, outlier_sigma)
        factory = Factory(statistic, outlier_sigma)
        history = History(keep, factory.template)
        selected = select_kinds(model, kinds, layers, feature_dim, exclude)
        aliases = {alias: layer.name for chosen in selected.values() for layer in chosen for alias in layer.names[1:]}
        sigma = getattr(factory.template, "outlier_sigma", float(outlier_sigma))
        super().__init__([], Settings("+".join(kinds), positions, sigma, factory.name), aliases, factory.template)
        self.history = history
        self._control = Control(factory, Trail(model), positions, every, when, select, strict=on_error == "raise")
        self._bank = Bank(make_hooks(model, selected, self._control), self._control, model)
        self._model = weakref.ref(model)
        self._witness = diagnosis.Witness()
        self._undo: list[Callable[[], object]] = []
        self._watchers = Watchers(model, self._control, self._bank, guard)
        # A recorder that is deleted removes its hooks. Nothing here may lead to the recorder, not even through the module of a statistic.
        self._abandon = weakref.finalize(self, control.abandon, weakref.ref(self._control), self._undo)
        self._abandon.atexit = False

    # -- starting and stopping -----------------------------------------------------------------------------------------

    def start(self) -> Recorder:
        """Places the hooks. If one cannot be placed, none is."""
        if self._control.live:
            raise RuntimeError("this recorder is running already; call stop() first, or create another one with record()")
        model = self._model()
        if model is None:
            raise RuntimeError("the model of this recorder no longer exists")
        root = named_layers(model)[""].module
        dropped = compiled.drop_graphs({type(module) for hook in self._bank.hooks.values() if (module := hook.layer.alive) is not None})
        self._witness.over = False
        try:
            if takes_hooks(root):
                self._undo.extend(handle.remove for handle in diagnosis.watch(root, self._witness))
            if any(hook.of != "gradient" for hook in self._bank.hooks.values()):
                self._undo.extend(compiled.watch_recomputation(model, self._bank.keep_traced))
            self._undo.append(self._control.trail.close)
            self._control.trail.open()
            for hook in self._bank.hooks.values():
                module = hook.layer.alive
                if module is not None and takes_hooks(module):
                    self._undo.extend(handle.remove for handle in hook.place(module))
            self._undo.extend(self._watchers.place())
        except BaseException:
            self._remove_hooks()
            raise
        self._control.live = True
        self._control.update()
        detach.running[id(self)] = self
        if dropped:
            warnings.warn(
                "torchprobe: this model, or another with modules of the same classes, was compiled and had run before recording started. "
                "Such graphs do not contain the hooks, so they were dropped, and the next call compiles again. To compile once, record "
                "before the first call and do not stop: paused() and snapshot() separate what should not be mixed.",
                RecordingWarning,
                stacklevel=users_level(),
            )
        if not compiled.available():
            compiled.warn_if_compiled(model, RecordingWarning)
        return self

    def stop(self) -> None:
        """Removes the hooks, the last one first, and reports every layer that was not read (:class:`RecordingWarning`)."""
        self._stop(report=True, stacklevel=3)

    def __enter__(self) -> Recorder:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop(report=kind is None, stacklevel=3)

    def _stop(self, report: bool, stacklevel: int) -> None:
        if not self._control.live and not self._undo:  # an interrupted stop may have left something to undo
            return
        detach.running.pop(id(self), None)
        self._control.live = False
        self._control.update()
        self._control.masks = {}
        self._remove_hooks()
        model = self._model()
        hooks = list(self._bank.hooks.values())
        for stream in self._bank.streams():
            control.leave(stream.slots)
        if self._control.graphs:  # their operators belong to this recorder; they would only fill the cache of the compiler
            compiled.drop_graphs({Watch, *(type(hook) for hook in hooks)})
            compiled.forget_graphs(self._control.graphs)
        if report and model is not None and (text := diagnosis.report(model, hooks, self._witness)):
            warnings.warn(text, RecordingWarning, stacklevel=stacklevel)
        self._watchers.end(raising=report)

    def leave(self) -> None:
        """Stops without a report, for :func:`torchprobe.detach_all`."""
        self._stop(report=False, stacklevel=3)

    def watches(self, modules: set[int]) -> bool:
        """Whether it has a hook on one of these modules, given by their ids."""
        return any(id(hook.layer.alive) in modules for hook in self._bank.hooks.values())

    def _remove_hooks(self) -> None:
        self._witness.over = True
        while self._undo:
            with contextlib.suppress(Exception):  # a hook that stays does nothing, and removes itself when it is called
                self._undo.pop()()

    # -- while it runs -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """``with rec.paused(): validate()``: calls inside do not count. In a compiled model the first pause compiles."""
        before, restore = self._control.paused, list[Callable[[], None]]()
        try:
            self._pause(True)
            restore.append(control.keep_contents(self._bank.slots()))  # replays of a CUDA graph do not see the pause
            yield
        finally:
            self._pause(before)
            for undo in restore:
                undo()

    def _pause(self, paused: bool) -> None:
        self._control.paused = paused
        self._control.update()

    def step(self, number: int | None = None) -> None:
        """Ends a step. From the first call on, ``every=n`` means that every n-th step is read, with all calls in it, and the others not.

        Call it after each step of an optimizer, for example when a step has several calls. In a compiled model with ``every`` > 1 the first
        call compiles again.

        Args:
            number: how many steps there were, such as those before a resumed run, too. Default: one more than before. A guard names a step
                by the number of those before it.

        >>> import torch, torchprobe
        >>> model = torch.nn.Linear(4, 3)
        >>> with torchprobe.record(model, every=2) as rec:
        ...     rec.step()  # the steps before the first one count as a step
        ...     for step in range(4):
        ...         for micro_batch in range(3):
        ...             _ = model(torch.randn(8, 4))
        ...         rec.step()
        >>> rec[""].vectors
        48
        """
        self._watchers.end_step()
        if self._control.end_step(number) and self._control.graphs:  # they count calls
            compiled.drop_graphs({type(hook) for hook in self._bank.hooks.values()})

    def mask(self, mask: Tensor | Mapping[str, Tensor] | None) -> contextlib.AbstractContextManager[None]:
        """Sets the padding mask of the next batches: bool (batch, tokens), True for tokens that count; None clears it.

        A mask for some layers is given as ``{name or glob: mask}``: the first one that fits a layer counts, and layers without one have
        none. It holds until it is changed, or, in ``with rec.mask(m):``, until the end of the block. It applies to activations with one
        vector for each token, in the order (batch, tokens), (tokens, batch) or one after the other. Activations with one vector for each
        input, such as the next token of a decoder, count whole. A layer where it is not clear which vectors count is left out, with a
        warning. With ``positions="mean"`` the mean is over the tokens that count, and inputs without such tokens are left out.

        Raises:
            TypeError, ValueError: a mask is not bool, or not (batch, tokens).
        """
        given = self._bank.masks(mask)
        if given and "mask" not in inspect.signature(self._control.factory.template.update).parameters:
            raise ValueError(f"{self.settings.statistic}.update takes no mask, so it cannot be recorded with one")
        before, self._control.masks = self._control.masks, given
        return control.with_masks(self._control, before)

    @ordered
    def snapshot(self, step: Step) -> None:
        """Closes the running window under the name ``step`` and starts the next one. It does not synchronize.

        ``history`` keeps the summary of each window, ``total`` the sum of all.

        Raises:
            TypeError: ``step`` is not a finite number.
            RuntimeError: inside ``paused()`` after a CUDA graph was captured.
        """
        self._check_no_captured_pause()
        number = plain_number(step)
        self._watchers.end_window()
        self._bank.close_window(functools.partial(self._watchers.window, self.history, number))
        self._watchers.window_closed()

    @ordered
    def reset(self) -> None:
        """Forgets everything: the running window, the closed ones, the history and the counters of ``every``."""
        self._check_no_captured_pause()
        windows.erase([slot.statistic for slot in self._bank.slots()])
        for slot in self._bank.slots():
            slot.closed, slot.calls = None, 0
        self.history = History(self.history.keep, self._control.factory.template)

    def _check_no_captured_pause(self) -> None:
        if self._control.paused and any(slot.captured for slot in self._bank.slots()):
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
        layers = list(self._bank.hooks)
        entries, aliases = all_reduce(self.copied_entries(), self.settings, layers, self.aliases, factory, group, union, timeout)
        return Recording(entries, self.settings, aliases, factory.template, self._unread())

    @ordered
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, and forgets everything this recorder has seen. ``keep`` does not change.

        Raises:
            ValueError: the state has other settings, unknown layers, or parts that do not fit. Nothing is changed then.
        """
        check_mapping("a recorder", state)
        if not same(state.get("format"), FORMAT):
            raise ValueError(f"expected the state of a recorder, format {FORMAT}; got format {shown(state.get('format'))}")
        check_keys("a recorder", state, ("format", "settings", "layers", "history"))
        mine, theirs, layers = asdict(self.settings), state["settings"], state["layers"]
        if not isinstance(theirs, Mapping) or theirs.keys() != mine.keys() or not all(same(theirs[key], mine[key]) for key in mine):
            raise ValueError(f"the state was recorded with {shown(theirs, 400)}, this recorder has {mine}")
        check_mapping("the layers", layers)
        if unknown := [name for name in layers if not self._bank.knows(name)]:
            raise ValueError(f"the state holds layers that this recorder does not watch: {', '.join(map(repr, unknown))}")
        entries = [self._bank.trial(name, saved) for name, saved in layers.items()]
        check_mergeable(self._entries(), entries)
        history = History(self.history.keep, self._control.factory.template)
        history.load_state_dict(state["history"])
        self.reset()
        self._bank.restore(entries)
        self.history = history

    # -- what a Recording needs -------------------------------------------------------------------------------------

    def _watched(self) -> list[str]:
        return self._bank.names()

    def _silent(self) -> list[str]:
        return self._bank.silent()

    def _find(self, name: str) -> Entry | None:
        stream = self._bank.find(name)
        return None if stream is None else entry_of(stream)

    @ordered
    def __getitem__(self, layer: str) -> Any:
        return windows.duplicate(super().__getitem__(layer))

    def _entries(self) -> list[Entry]:
        return self._bank.entries()

    def _unread(self) -> list[Unread]:
        return self._bank.unread()

    def _knows(self, layer: str) -> bool:
        return self._bank.knows(layer)

    def _missing(self, layer: str) -> str:
        name = self.aliases.get(layer, layer)
        stream = self._bank.find(name)
        if stream is None:
            return super()._missing(layer)
        why = f": {stream.failure}" if stream.failure else ""
        return f"layer {name!r} is recorded, but {'could not be read' if why else 'has not fired'}{why}"

    def _check_mergeable(self, other: Recording) -> None:
        super()._check_mergeable(other)
        self._bank.check_mergeable(other._entries())

    def _absorb(self, theirs: Entry) -> None:
        self._bank.absorb(theirs)


record = Recorder
