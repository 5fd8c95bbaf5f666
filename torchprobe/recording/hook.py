"""The hooks that connect a module with its streams.

A hook has two halves. In eager mode it is called in every forward, and its cost is Python. In a compiled graph it is traced once: see
:mod:`torchprobe.recording.traced`. A hook that is called after its recorder has stopped, because it was moved to another module, does
nothing but remove itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchprobe.common.threads import ordered
from torchprobe.recording import traced
from torchprobe.recording.axes import Axis
from torchprobe.recording.compiled import OwnHook, at_trace_time, is_exporting, never_compile_alone, register
from torchprobe.recording.control import Control, Skipped
from torchprobe.recording.layers import Layer
from torchprobe.recording.leaves import typed_dim
from torchprobe.recording.stream import Stream
from torchprobe.recording.structure import first_tensor, has_places, is_symbolic, named_tensors, replaced

_current_backward = torch._C._current_graph_task_id

Found = list[tuple[str, Tensor]]  # tensors of a structure, with their places


class Hook(OwnHook):
    """Reads the output of one module.

    Args:
        layer: the module.
        control: of the recorder.
        suffix: what follows the name of the layer in the recording.
    """

    of: ClassVar[str] = "output"

    def __init__(self, layer: Layer, control: Control, suffix: str = "") -> None:
        self.layer = layer
        self.control = control
        self.suffix = suffix
        self.main = Stream(layer, control, self.of, suffix)
        self.streams: dict[str, Stream] = {"": self.main}  # by name
        self.places: dict[str, Stream] = {}  # by place in a structure; empty before the first structure
        self.key = register(self)

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.trace(module, output)
        control = self.control
        if control.open and _current_backward() == -1 and (control.training is None or control.training == module.training):
            first = not self.main.dims
            if first:  # what goes in may tell what comes out
                control.trail.seen.given = args
            if type(output) is Tensor and control.select is None:
                if output.is_floating_point():
                    self.main.read(output)
                else:
                    self.nothing(output)
            else:
                for stream, x in self.streams_in(output):
                    stream.read(x)
            if first:
                control.trail.seen.given = None
        else:
            self.skip(module)
        return None

    def place(self, module: nn.Module) -> list[Any]:
        """Registers the hook; returns handles with ``remove``."""
        return [module.register_forward_hook(self)]

    def skip(self, module: nn.Module) -> None:
        """Notes why a call does not count."""
        if not self.control.live:
            self.remove_from(module)
        elif _current_backward() != -1:  # an activation checkpoint runs the forward again, inside backward
            self.main.skipped |= Skipped.RECOMPUTED
        elif self.control.paused:
            self.main.skipped |= Skipped.PAUSED
        elif self.control.training is not None and self.control.training != module.training:
            self.main.skipped |= Skipped.OTHER_MODE

    def complain(self, error: Exception) -> Exception | None:
        return self.main.complain(error)

    # -- the tensors to read -------------------------------------------------------------------------------------------

    def find(self, value: Any) -> Found:
        """The tensors in what the module gives."""
        select = self.control.select
        return named_tensors(value) if select is None else [("", _selected(select(value)))]

    def streams_in(self, value: Any) -> list[tuple[Stream, Tensor]]:
        """The tensors to read in what the module gives, each with its stream."""
        try:
            if is_symbolic(value):
                self.main.skipped |= Skipped.NOT_REAL
                return []
            found = self.find(value)
            if len(found) > 1 and not self.places:
                self.settle(found, [self.features_of(x) for _, x in found], has_places(value))
        except Exception as error:
            self.main.failed(error)
            return []
        if not found:
            self.nothing(value)
            return []
        if not self.places:
            self.places_noted(found[0][0])
            return [(self.main, found[0][1])]
        return [(stream, x) for name, x in found if (stream := self.places.get(name)) is not None]

    def places_noted(self, name: str) -> None:
        """Remembers the place of the only tensor, which is a name for it, too."""
        self.main.place = name

    def features_of(self, x: Tensor) -> int | None:
        """The dimension of the features, before it is decided whether a tensor is read."""
        if self.layer.feature_dim is not None or x.is_nested:
            return self.layer.feature_dim or 0
        return self.control.trail.output(self.layer, x).dim

    @ordered
    def settle(self, found: Found, dims: list[int | None], positions: bool) -> None:
        """Decides which of several tensors are read: those with features. If they are known by position, each has a name of its own,
        otherwise the first one has the name of the layer. What one thread has decided, holds for the others."""
        if self.places:
            return
        places: dict[str, Stream] = {}
        if typed_dim(self.layer.module, found[0][1].dim()) is not None:
            found, dims = found[:1], dims[:1]  # attention and recurrent layers: the rest are weights and states
        chosen = [(name, x) for (name, x), dim in zip(found, dims, strict=True) if dim is not None and _stands_alone(x, found[0][1], dim)]
        names = [name for name, _ in chosen] or [found[0][0]]
        if self.main.slots or self.main.loaded or len(names) == 1 or not positions:  # read before, or the first one of a mapping
            first = self.main.place if self.main.place in names else names[0]
            places[first], self.main.place = self.main, first
        for name in names:
            if name not in places:
                places[name] = self.stream(name)
        if self.main not in places.values():
            del self.streams[""]
        self.places.update(places)  # all at once, since others read it meanwhile

    @ordered
    def stream(self, label: str) -> Stream:
        """The stream of this name."""
        if label not in self.streams:
            self.streams[label] = Stream(self.layer, self.control, self.of, self.suffix, label)
        return self.streams[label]

    def nothing(self, value: Any) -> None:
        """The output holds nothing to read."""
        if self.layer.explicit or self.control.strict:
            what = "it holds no floating-point tensor with features; pass select=, a function that returns the tensor to read"
            self.main.failed(TypeError(what))
        else:
            self.main.skipped |= Skipped.NO_TENSOR

    # -- compiled ------------------------------------------------------------------------------------------------------

    def trace(self, module: nn.Module, value: Any) -> Any:
        """As :meth:`__call__`, for the compiler to trace."""
        if not traced_open(self.key, self.control.open, module.training):
            return None
        found, changed, any_changed = self.find(value), value, False
        if len(found) == 0:
            traced_nothing(self.key)
        elif len(found) == 1 and traced_only(self.key, found[0][0]):
            shown = traced.read(self.main, found[0][1])
            if shown is not found[0][1]:
                changed, any_changed = replaced(changed, found[0][1], shown), True
        else:
            for place, x in self.traced_places(found, has_places(value)):
                shown = traced.read(self.places[place], x)
                if shown is not x:
                    changed, any_changed = replaced(changed, x, shown), True
        return changed if any_changed else None

    def traced_places(self, found: Found, ordered: bool) -> Found:
        """The tensors to read among several, with their places."""
        names = tuple([name for name, _ in found])
        if traced_unsettled(self.key):
            shapes = []
            for _, x in found:
                widths = traced.widths_of(self.main.key)
                shapes.append((0,) * x.dim() if x.is_nested else traced.matched(x, widths))
            traced_settle(self.key, names, tuple(shapes), ordered)
        chosen = traced_chosen(self.key, names)
        return [(name, x) for name, x in found if name in chosen]


class InputHook(Hook):
    """Reads the first tensor in the arguments of a module."""

    of = "input"

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        return super().__call__(module, None, (args, kwargs))

    def place(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_pre_hook(self, with_kwargs=True)]

    def find(self, value: Any) -> Found:
        select = self.control.select
        if select is not None:
            return [("", _selected(select(*value)))]
        x = first_tensor(value)
        return [] if x is None else [("", x)]


def _selected(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError("select must return a tensor")
    return value


def _stands_alone(x: Tensor, first: Tensor, dim: int) -> bool:
    """Whether a tensor beside the first one is an activation of its own: (batch, features) or of the form of the first."""
    return x is first or x.dim() == first.dim() or x.dim() == 2


def takes_hooks(module: nn.Module) -> bool:
    """Scripted modules refuse hooks in new versions of PyTorch, and never call them in old ones."""
    return not isinstance(module, torch.jit.ScriptModule)


for _kind in (Hook, InputHook):
    never_compile_alone(_kind.__call__)


# -- what runs while a graph is traced ---------------------------------------------------------------------------------------


@at_trace_time()
def note(hook: Hook, reason: int) -> None:
    hook.main.skipped |= Skipped(reason)


@at_trace_time(fallback=False)
def traced_open(hook: Hook, open_: bool, training: bool) -> bool:
    """Whether a call counts. The compiler guards on both arguments."""
    control, main = hook.control, hook.main
    if is_exporting():
        main.skipped |= Skipped.NOT_REAL
        return False
    main.skipped |= Skipped.TRACED
    if not open_:
        main.skipped |= Skipped.PAUSED if control.paused else Skipped(0)
        return False
    if control.training is not None and control.training != training:
        main.skipped |= Skipped.OTHER_MODE
        return False
    return True


@at_trace_time()
def traced_nothing(hook: Hook) -> None:
    hook.nothing(None)


@at_trace_time(fallback=True)
def traced_only(hook: Hook, place: str) -> bool:
    if not hook.places:
        hook.places_noted(place)
    return not hook.places


@at_trace_time(fallback=False)
def traced_unsettled(hook: Hook) -> bool:
    return not hook.places


@at_trace_time()
def traced_settle(hook: Hook, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], ordered: bool) -> None:
    given, trail = hook.layer.feature_dim, hook.control.trail
    axes = [Axis(given, "") if given is not None else trail.static(hook.layer, shape) for shape in shapes]
    stand_ins = [(name, torch.empty(shape, device="meta")) for name, shape in zip(names, shapes, strict=True)]
    hook.settle(stand_ins, [axis.dim for axis in axes], ordered)


@at_trace_time(fallback=())
def traced_chosen(hook: Hook, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in hook.places)
