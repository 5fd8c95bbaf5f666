"""The evidence for :mod:`torchprobe.recording.axes`: which layers ran, in which order, and what they gave."""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchprobe.recording.axes import UNSURE, Axis, fits, square
from torchprobe.recording.compiled import OwnHook, at_trace_time, never_compile_alone, register
from torchprobe.recording.events import (
    Event,
    Seen,
    contradicted,
    is_same,
    moved_or_resized,
    multiplied,
    outside,
    permuted,
    resized,
    same_shape,
    same_tensor,
    shares_memory,
)
from torchprobe.recording.layers import Layer, named_layers
from torchprobe.recording.leaves import (
    declared_features,
    hides_children,
    input_width,
    is_bare,
    is_leaf,
    keeps_layout,
    leaf_dims,
    own_widths,
    typed_dim,
    width,
)
from torchprobe.recording.structure import first_tensor

_FORWARDS = 2  # of the model, in which the trail is kept
_MOST_EVENTS = 64  # for each leaf


class Trail:
    """The layers of a model that know their features, in the order in which they ran.

    Hooks on them are kept for the first two forwards. They change nothing, and are removed by :meth:`close`, or by themselves.

    >>> model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.ReLU())
    >>> trail = Trail(model)
    >>> trail.open()
    >>> x = model(torch.zeros(3, 2, 8))
    >>> trail.output(named_layers(model)["1"], x)[:2]
    (1, "as '0'")
    >>> trail.close()
    """

    def __init__(self, model: nn.Module) -> None:
        named = named_layers(model)
        layers = list({id(layer): layer for layer in named.values()}.values())
        self._place = {id(layer.module): index for index, layer in enumerate(layers)}
        hidden: set[int] = set()
        for layer in layers:
            if hides_children(layer.module):
                hidden |= {id(child) for child in layer.module.modules()} - {id(layer.module)}
        self._leaves = [layer for layer in layers if id(layer.module) not in hidden and is_leaf(layer.module)]
        self._keeping = [layer for layer in layers if id(layer.module) not in hidden and keeps_layout(layer.module)]
        self._places = [self._place[id(leaf.module)] for leaf in self._leaves]
        self._root = weakref.ref(named[""].module)
        self.seen = Seen()
        self._clear: dict[tuple[type, int], int] = {}  # class and number of dimensions → what was clear for a block
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._forwards = 0
        self._running = False  # whether events are noted
        self._compiled = False  # then hooks stay: a graph that holds them would be compiled again without them
        self.key = register(self)

    # -- hooks -----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Places the hooks."""
        self.close()
        self._running, self._forwards = True, 0
        scripted = torch.jit.ScriptModule
        for leaf in (*self._leaves, *self._keeping) if self._leaves else ():
            module = leaf.alive
            if module is not None and not isinstance(module, scripted):
                self._handles.append(module.register_forward_hook(_Step(self, leaf)))
        root = self._root()
        if root is not None and not isinstance(root, scripted) and self._handles:
            self._handles.append(root.register_forward_hook(_End(self)))

    def close(self) -> None:
        """Removes the hooks. What they saw stays."""
        self._running = False
        while self._handles:
            self._handles.pop().remove()

    @property
    def watching(self) -> bool:
        """Whether there are hooks."""
        return bool(self._handles)

    @property
    def fresh(self) -> bool:
        """Whether the last event is the last layer that ran."""
        return self._running and bool(self.seen.events)

    def forward_ended(self) -> None:
        self._forwards += 1
        if self._forwards >= _FORWARDS:
            self._end()

    def _end(self) -> None:
        if self._compiled:
            self._running = False
        else:
            self.close()

    def complain(self, error: Exception) -> Exception | None:
        return error

    def keep_hooks(self) -> None:
        """A compiled graph holds hooks of the trail; they do nothing there."""
        self._compiled, self._running = True, False

    def note(self, module: nn.Module, name: str, x: Tensor, dim: int) -> None:
        """Adds an event. Nothing happens after the first forwards."""
        if not self._running or x.is_nested:
            return
        if len(self.seen.events) >= _MOST_EVENTS * len(self._leaves):  # the model is not called as a whole
            self._end()
            return
        strides = x.stride() if x.layout is torch.strided else ()
        self.seen.events.append(Event(id(module), name, tuple(x.shape), strides, dim, weakref.ref(x)))

    def step(self, leaf: Layer, module: nn.Module, args: object, output: object) -> None:
        """A leaf gave its output."""
        if not self._running:
            return
        x = first_tensor(output)
        if x is None or x.is_nested:
            return
        shape = tuple(x.shape)
        if keeps_layout(module):
            if self.seen.events and self.seen.events[-1].shape == shape and is_same(first_tensor(args), self.seen.events[-1].tensor()):
                self.note(module, leaf.name, x, self.seen.events[-1].dim)
            return
        dims_found = leaf_dims(module, shape)
        if len(dims_found) > 1 and self.seen.events and is_same(first_tensor(args), self.seen.events[-1].tensor()):
            dims_found = [self.seen.events[-1].dim] if self.seen.events[-1].shape == shape else dims_found  # a norm keeps the layout
        if len(dims_found) == 1:
            self.note(module, leaf.name, x, dims_found[0])

    # -- the dimension of the features -------------------------------------------------------------------------------------

    def output(self, layer: Layer, x: Tensor) -> Axis:
        """The dimension of the features in an output of a layer."""
        if x.layout is not torch.strided and not x.is_nested:
            return self._decide(layer, None, tuple(x.shape))
        return self._decide(layer, x, tuple(x.shape))

    def input(self, layer: Layer, x: Tensor) -> Axis:
        """The dimension of the features in the first input of a layer, which has not run yet."""
        if self.fresh:
            found = same_tensor(self.seen.events, x) or same_shape(self.seen.events, x)
            if found is not None and not is_leaf(layer.module):
                return found
        return self.static_input(layer, tuple(x.shape))

    def static_input(self, layer: Layer, shape: tuple[int, ...]) -> Axis:
        """As :meth:`input`, without the order in which layers run."""
        module, dims = layer.module, len(shape)
        dim, wide = typed_dim(module, dims), input_width(module)
        if is_leaf(module) and dim is not None and (wide is None or shape[dim] == wide):
            return Axis(dim, layer.kind)
        if not self._leaves and 0 < dims < 4:
            return Axis(dims - 1, "convention: no layer of the model says it", sure=False)
        return self._before(layer, shape, 0) or (self._static(layer, shape) if is_bare(module) else None) or Axis(None, UNSURE)

    def static(self, layer: Layer, shape: tuple[int, ...]) -> Axis:
        """As :meth:`output`, without the order in which layers run. A size of 0 in ``shape`` is unknown."""
        return self._decide(layer, None, shape)

    def widths(self, layer: Layer) -> list[int]:
        """The sizes that matter in :meth:`static`."""
        leaves = self._inside(layer) or self._around(layer)
        found = [size for leaf in leaves for size in (width(leaf.module), *(n for p in leaf.module.parameters(False) for n in p.shape))]
        following = self._leaves[bisect.bisect_right(self._places, self._place.get(id(layer.module), 0)) :][:1]
        found += [input_width(leaf.module) for leaf in following if leaf.alive is not None]
        found += [size for sizes in own_widths(layer.module) for size in sizes]
        return list(dict.fromkeys(size for size in found if size))

    def _decide(self, layer: Layer, x: Tensor | None, shape: tuple[int, ...]) -> Axis:
        module, dims = layer.module, len(shape)
        if dims == 0:
            return Axis(None, "a single number")
        dims_found = leaf_dims(module, shape) if is_leaf(module) or typed_dim(module, dims) is not None else []
        if len(dims_found) == 1:
            return Axis(dims_found[0], layer.kind)
        if dims == 1:
            return self._one_dimension(layer, shape, x)
        if dims == 2 and shape[1] and shape[1] == declared_features(module):
            return Axis(1, f"features of {layer.kind}")
        found = None
        if x is not None:
            found = self._followed(layer, x, dims_found) if is_bare(module) or dims_found or is_leaf(module) else self._contained(layer, x)
        if found is None:
            found = self._static(layer, shape)
        if found is not None:
            return self._checked(layer, found, shape, x)
        own = [dim for sizes in own_widths(module) for size in sizes for dim in fits(shape, size)]
        if len(set(own)) == 1:
            return Axis(own[0], f"the parameters of {layer.kind}")
        if not self._leaves:
            return Axis(dims - 1, "convention: no layer of the model says it", sure=False) if dims < 4 else Axis(None, UNSURE)
        return Axis(None, UNSURE)

    def _checked(self, layer: Layer, axis: Axis, shape: tuple[int, ...], x: Tensor | None) -> Axis:
        """Remembers what was clear for a class. A tie takes it from there."""
        key = type(layer.module), len(shape)
        if axis.dim is not None:
            if not is_bare(layer.module) and not type(layer.module).__module__.startswith("torch.nn."):
                self._clear.setdefault(key, axis.dim)
            return axis
        if len(axis.open) > 1 and self._clear.get(key) in axis.open:
            return Axis(self._clear[key], f"as other {layer.kind} layers", sure=axis.sure)
        return axis

    def _one_dimension(self, layer: Layer, shape: tuple[int, ...], x: Tensor | None) -> Axis:
        """One dimension counts the inputs, unless the layers around it work on inputs without a batch."""
        inside = self._events_of(layer) if x is not None else []
        before = inside or (self.seen.events if self.fresh and is_bare(layer.module) else [])
        if before and before[-1].shape == shape:
            return Axis(0, f"as {before[-1].name!r}")
        if not self._leaves:
            return Axis(0, "convention: no layer of the model says it", sure=False)
        return Axis(None, "one number for each input")

    # -- evidence ----------------------------------------------------------------------------------------------------------

    def _events_of(self, layer: Layer) -> list[Event]:
        inside = {id(module) for module in layer.module.modules()} if self.seen.events else set()
        return [event for event in self.seen.events if event.module in inside]

    def _contained(self, layer: Layer, x: Tensor) -> Axis | None:
        """By what ran inside of a block."""
        inside = self._events_of(layer)
        if not inside:
            return self._followed(layer, x, [])
        shape, last = tuple(x.shape), inside[-1]
        if (found := same_tensor(inside, x)) is not None:
            given = self._given_dim(shape, inside)
            return found if given in (None, found.dim) else Axis(given, "as its input: its layers mix positions")
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for event in reversed(inside):
            if (event.dim, event.shape) in seen:
                continue
            seen.add((event.dim, event.shape))
            same = event.shape == shape
            if not same and (event.width == 1 or (event is not last and len(event.shape) != len(shape))):
                continue
            dims_found = fits(shape, event.width, 0 if last.dim == 0 else 1)
            around = inside if len(event.shape) == len(shape) else outside(self.seen.events, inside)
            if contradicted(event, shape, dims_found, around) or (len(dims_found) == 1 and moved_or_resized(event, shape, dims_found[0])):
                return Axis(None, UNSURE)
            if len(dims_found) == 1:
                by = f"as {event.name!r}" if same else f"width {event.width} of {event.name!r}"
                return square(Axis(dims_found[0], by, sure=len(shape) > 2), shape)  # a batch may be as large
            if dims_found:
                return self._tie(event, inside, x, dims_found)
        return multiplied(layer.module, last, shape) or resized(last, shape, inside) or same_shape(self.seen.events, x)

    def _followed(self, layer: Layer, x: Tensor, allowed: Sequence[int]) -> Axis | None:
        """By what ran before a layer that keeps the layout of its input, such as an activation function."""
        events = [event for event in self.seen.events if event.module != id(layer.module)] if self.fresh else []
        if not events:
            return None
        if (found := same_tensor(events, x)) is not None:
            return found._replace(sure=False)  # another width may come from another place in the model
        if keeps_layout(layer.module) and (there := permuted(events, x)) is not None:
            return Axis(there, "its input, in another order of dimensions", sure=False)
        shape, last = tuple(x.shape), events[-1]
        keeps_shape = keeps_layout(layer.module)
        if last.shape == shape:
            dims_found = fits(shape, last.width)
            if len(dims_found) > 1 and not (keeps_shape and is_same(first_tensor(self.seen.given), last.tensor())):
                return Axis(None, UNSURE, tuple(dims_found), last.width, sure=False)
            axis = Axis(last.dim, f"as {last.name!r}", sure=False)
            return axis if keeps_shape else square(axis, shape)
        if last.width > 1 and (len(shape) < len(last.shape) or (len(shape) == len(last.shape) and shape[0] == last.shape[0])):
            dims_found = [dim for dim in fits(shape, last.width) if not allowed or dim in allowed]
            mixed = len(shape) == len(last.shape) and contradicted(last, shape, dims_found, events)
            if mixed or (len(dims_found) == 1 and moved_or_resized(last, shape, dims_found[0])):
                return Axis(None, UNSURE)
            if len(dims_found) == 1:
                return square(Axis(dims_found[0], f"width {last.width} of {last.name!r}", sure=False), shape)
            if dims_found:
                return Axis(None, UNSURE, tuple(dims_found), last.width, sure=False)
        return same_shape(events, x) or resized(last, shape, events)

    def _tie(self, event: Event, inside: Sequence[Event], x: Tensor, dims_found: list[int]) -> Axis:
        """Several dimensions are as wide. Of a view of what a layer gave, the order in memory tells; otherwise an input of the same shape
        does, if the layers inside agree. The order of a new tensor says nothing."""
        dims = x.dim()
        agree = len({other.dim for other in inside if len(other.shape) == dims}) == 1
        if shares_memory(event.tensor(), x) and event.strides:
            there = [dim for dim in dims_found if x.stride(dim) == event.strides[event.dim]]
            if len(there) == 1:
                return square(Axis(there[0], f"width {event.width} of {event.name!r}, and its order in memory"), tuple(x.shape))
        if agree and event.dim in dims_found and event.shape == tuple(x.shape) and self._given_dim(tuple(x.shape), inside) == event.dim:
            return square(Axis(event.dim, f"as {event.name!r}, and as its input"), tuple(x.shape))
        return Axis(None, UNSURE, tuple(dims_found), event.width)

    def _given_dim(self, shape: tuple[int, ...], inside: Sequence[Event]) -> int | None:
        """The dimension of the features in the input of the layer, if it has the same shape as the output."""
        given = first_tensor(self.seen.given)
        return None if given is None or tuple(given.shape) != shape else permuted(outside(self.seen.events, inside), given)

    # -- evidence without an order of running ------------------------------------------------------------------------------

    def _inside(self, layer: Layer) -> list[Layer]:
        inside = {id(module) for module in layer.module.modules()}
        return [leaf for leaf in self._leaves if id(leaf.alive) in inside]

    def _around(self, layer: Layer) -> list[Layer]:
        """The leaf before a layer, and then those of its parent."""
        place = bisect.bisect_left(self._places, self._place.get(id(layer.module), 0))
        parent = {id(module) for module in layer.parent.modules()} if layer.parent is not None else set()
        family = [leaf for leaf in self._leaves if id(leaf.alive) in parent]
        before = [leaf for leaf in self._leaves[max(place - 1, 0) : place] if leaf.alive is not None]
        return [*family, *before]

    def _static(self, layer: Layer, shape: tuple[int, ...]) -> Axis | None:
        leaves = self._inside(layer)
        for leaf in reversed(leaves or self._around(layer)):
            size = width(leaf.module)
            if size is None or size == 1:
                continue
            dims_found = fits(shape, size)
            if len(dims_found) == 1 and ((leaves and len(shape) > 3) or dims_found[0] == typed_dim(leaf.module, len(shape))):
                return square(Axis(dims_found[0], f"width {size} of {leaf.name!r}", sure=len(shape) > 2 and bool(leaves)), shape)
            if dims_found:
                return Axis(None, UNSURE, tuple(dims_found) if leaves or len(dims_found) > 1 else (), size, sure=False)
        return None if leaves else self._before(layer, shape, 1)

    def _before(self, layer: Layer, shape: tuple[int, ...], skip: int) -> Axis | None:
        """By what the next layer takes: the first one inside, or after."""
        place = self._place.get(id(layer.module), 0) + skip
        following = self._leaves[bisect.bisect_left(self._places, place) :][:1]
        for leaf in following:
            if leaf.alive is None:
                continue
            size, dim = input_width(leaf.module), typed_dim(leaf.module, len(shape))
            if size is None or dim is None or shape[dim] != size or len(fits(shape, size, 0 if dim == 0 else 1)) > 1:
                continue
            return square(Axis(dim, f"the input of {leaf.name!r}"), shape)
        return None


class _Step(OwnHook):
    """The hook of a leaf."""

    def __init__(self, trail: Trail, leaf: Layer) -> None:
        self.trail, self.leaf = trail, leaf

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            _traced(self.trail.key)
        elif not self.trail.watching:
            self.remove_from(module)  # it was moved there
        elif torch._C._current_graph_task_id() == -1:
            self.trail.step(self.leaf, module, args, output)


class _End(OwnHook):
    """The hook of the model, for the end of a forward."""

    def __init__(self, trail: Trail) -> None:
        self.trail = trail

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            _traced(self.trail.key)
        elif self.trail.watching:
            self.trail.forward_ended()
        else:
            self.remove_from(module)


@at_trace_time()
def _traced(trail: Trail) -> None:
    trail.keep_hooks()


never_compile_alone(_Step.__call__)
never_compile_alone(_End.__call__)
