"""One tensor of a layer, read in every call: a row of the recording.

Most layers have one. A layer whose output holds several tensors has one for each, ``"layer:0"`` and ``"layer:1"``.
"""

from __future__ import annotations

import re
import threading
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchprobe.common.threads import lock, ordered
from torchprobe.ops.observe import check
from torchprobe.ops.positions import vectors_of
from torchprobe.recording import masks, nested
from torchprobe.recording.axes import UNSURE, Axis, parameter_axis, second_shape
from torchprobe.recording.compiled import allow_graphs, is_tracing, make_static, register
from torchprobe.recording.control import Control, Skipped, Slot, capturing, hold
from torchprobe.recording.tensors import is_ordinary, is_plain, local, unreadable

if TYPE_CHECKING:
    from torchprobe.recording.layers import Layer

_observe = torch.ops.torchprobe.observe_.default
_observe_now = getattr(_observe, "_op", _observe)  # without a wrapper in Python
PARAMETERS = ("weight", "weight_gradient")
_NUMBERS = re.compile(r"[\d(),? ]+")
_counting = threading.Lock()


class RecordingWarning(UserWarning):
    """Something about a recording is unexpected. The numbers that were recorded are correct."""


class Unsure(ValueError):
    """Nothing decides which dimension of an activation holds the features."""


class Stream:
    """The state of one tensor of a layer, and how it is read.

    Args:
        layer: whose tensor it is.
        control: of the recorder.
        of: what is read of the layer, such as "output".
        suffix: what follows the name of the layer: "@gradient" in a recorder of several kinds.
        label: its place among several tensors; "" for the only one.
    """

    def __init__(self, layer: Layer, control: Control, of: str, suffix: str = "", label: str = "") -> None:
        self.layer = layer
        self.control = control
        self.of = of
        self.suffix = suffix
        self.label = label
        self.slots: dict[torch.device, Slot] = {}
        self.axes: dict[int, Axis] = {}  # number of dimensions → what is known
        self.dims: dict[int, int] = {}  # the same, where it is known
        self.shapes: dict[int, tuple[int, ...]] = {}  # the first shape, where it is not
        self.loaded: tuple[int | None, str] | None = None  # the dimension of the features in a loaded state, and by what
        self.place = label  # of the only tensor in a structure, which is a name for it, too
        self.order = -1
        self.ended = False  # it turned out to hold no features, and is not read any more
        self.failure = ""  # why a call could not be read
        self.unsure = False  # whether that is because nothing decides
        self.left_out = 0  # calls that could not be read
        self.seen = False  # whether a call was read
        self.skipped = Skipped(0)
        self.swapped = control.swapped.get(id(layer))  # whether tokens come before the batch
        self._pattern: tuple[tuple[str, ...], str | None] = (), None
        self.key = register(self)
        self.graph_tensor: Tensor | None = None  # what a compiled graph writes to, while there is only one device
        self.fused = control.factory.template.fused
        self.positions: str = "all" if of in PARAMETERS else control.positions
        self.direct = self.fused and self.positions == "all"  # then only the operator is needed

    @property
    def name(self) -> str:
        """Its name in the recording."""
        return f"{self.layer.name}{':' if self.label else ''}{self.label}{self.suffix}"

    @property
    def feature_dim(self) -> int | None:
        """The dimension of the features; -1 for the last."""
        known = next(((dims, dim) for dims, dim in self.dims.items()), None)
        if known is not None:
            return -1 if known[1] == known[0] - 1 else known[1]
        return self.loaded[0] if self.loaded else None

    @property
    def feature_dim_by(self) -> str:
        """By what the dimension of the features is known."""
        known = next((axis.by for axis in self.axes.values() if axis.dim is not None), None)
        return known or (self.loaded[1] if self.loaded else UNSURE)

    def take_place(self) -> None:
        """Gives the stream its place in the order of firing; later calls do nothing."""
        if self.order < 0:
            self.order = next(self.control.places)

    # -- eager ---------------------------------------------------------------------------------------------------------

    def read(self, x: Tensor) -> None:
        """Reads one tensor. If it cannot be read, the call is left out."""
        control = self.control
        try:
            if self.direct and not control.masks:
                slot, dim = self.slots.get(x.device), self.dims.get(x.dim())
                if slot is not None and dim is not None and is_ordinary(x):
                    if capturing(x):
                        hold(slot, control.every)
                    _observe_now(slot.state, x, dim, slot.sigma, control.every)
                    return
            if capturing(x):
                hold(self.slots.get(x.device), control.every)
            self.observe(x, self.mask())
        except Exception as error:
            self.failed(error, x)

    def arrived(self, x: Tensor, mask: Tensor | None) -> None:
        """As :meth:`read`, with a mask of its own, while the recorder lives."""
        if not self.control.live:
            return
        try:
            if capturing(x):
                hold(self.slots.get(x.device), self.control.every)
            self.observe(x, mask)
        except Exception as error:
            self.failed(error, x)

    def activation(self, x: Tensor, mask: Tensor | None) -> None:
        """Called by a compiled graph, for a statistic without an operator of its own."""
        if torch._C._current_graph_task_id() == -1:  # otherwise an activation checkpoint runs the graph again
            self.arrived(x, mask)

    def gradient(self, grad: Tensor, mask: Tensor | None) -> None:
        """Called during backward. Gradients that arrive after the recording has ended do not count."""
        self.skipped &= ~Skipped.WAITING
        self.arrived(grad, mask)

    def mask(self) -> Tensor | None:
        """The mask that is set for this layer."""
        pattern = self.pattern() if self.control.masks else None
        return None if pattern is None else self.control.masks[pattern]

    def pattern(self) -> str | None:
        """The name or glob of the mask that is set for this layer."""
        if self.of in PARAMETERS:
            return None
        patterns = tuple(self.control.masks)
        if self._pattern[0] != patterns:
            self._pattern = patterns, masks.pattern_for([*self.layer.names, self.name], patterns)
        return self._pattern[1]

    def readable(self, dims: int) -> bool:
        """Whether there are features and the requested positions. If not, a layer that the user did not name is reported at the end."""
        positions = self.positions
        there = dims > 2 or (positions == "all" and dims > 0) or (positions != "patch" and dims == 2)
        if there or self.layer.explicit or self.control.strict:
            return True
        self.skipped |= Skipped.NO_POSITIONS if dims else Skipped.NO_TENSOR
        return False

    def observe(self, x: Tensor, mask: Tensor | None) -> None:
        """Reads one tensor.

        Raises:
            Exception: it cannot be read.
        """
        if self.ended:
            self.left_out += 1
            return
        if x.is_meta or type(x).__name__ == "FakeTensor":
            self.skipped |= Skipped.NOT_REAL
            return
        if (reason := unreadable(x)) is not None:
            raise ValueError(reason)
        if x.is_nested:
            self._observe_nested(x)
            return
        if not self.readable(x.dim()):
            return
        dim = self.axis(x)
        vectors, kept = local(x, dim).detach(), None
        if mask is not None or self.positions != "all":
            if self.swapped and self.positions != "all" and vectors.dim() == 3 and dim == 2:
                vectors = vectors.transpose(0, 1)
            if mask is not None:
                mask = self.fitted(mask, list(vectors.shape), dim)
            kept = masks.cut(mask, self.positions)
            vectors = vectors_of(vectors, self.positions, dim, mask)
        self._update(vectors, dim, kept)

    def _observe_nested(self, x: Tensor) -> None:
        """A nested tensor has no padding, so a mask does not apply."""
        sizes = nested.sizes(x)
        known = self.axes.get(len(sizes))
        if known is None or known.dim is None:
            fixed = [dim for dim in range(1, len(sizes)) if sizes[dim]]
            if self.layer.feature_dim is not None:
                known = self.given(len(sizes))
            elif len(fixed) == 1:
                known = Axis(fixed[0], "the only size that all inputs share")
            else:
                known = self.control.trail.static(self.layer, sizes)
            self.decided(len(sizes), known, sizes)
        assert known.dim is not None
        vectors, kept = nested.vectors(x.detach(), known.dim, self.positions)
        if sizes[0]:
            self._update(vectors, 1, kept)

    def _update(self, vectors: Tensor, dim: int, kept: Tensor | None) -> None:
        self.allocate(vectors.shape[dim], vectors.device, vectors.dim())
        slot = self.slots[vectors.device]
        if slot.fused:
            _observe(slot.state, vectors, dim, slot.sigma, self.control.every, kept)
        elif self._counted(slot):  # the operator counts calls itself
            slot.update(vectors, dim, kept)
        self.seen = True

    def _counted(self, slot: Slot) -> bool:
        """Counts a call, and says whether ``every`` selects it."""
        with _counting:  # threads may share a layer
            slot.calls += 1
            return (slot.calls - 1) % self.control.every == 0

    def fitted(self, mask: Tensor, shape: list[int], dim: int) -> Tensor | None:
        """The mask for an activation of this shape.

        Raises:
            ValueError: it is not clear which vectors count.
        """
        swapped = False if self.swapped and self.positions != "all" else self.swapped  # then it was transposed already
        clear, found = masks.fit(mask, shape[:dim] + shape[dim + 1 :], swapped)
        if not clear:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)} (batch, tokens), but the activation has shape {tuple(shape)} with "
                f"feature_dim={dim}: set the mask of this batch, give this layer its own, rec.mask({{{self.layer.name!r}: mask}}), or "
                f"clear it with rec.mask(None)"
            )
        return found

    def allocate(self, width: int, device: torch.device, dims: int) -> None:
        """Creates the state in the first call, when the width is known.

        Raises:
            ValueError: the width is another one than before.
        """
        with lock, torch.inference_mode(False), torch.no_grad():
            slot = self.slots.get(device)
            if slot is None and self.width not in (None, width):
                slot = next(iter(self.slots.values()))
            if slot is None:
                slot = Slot(self.control.factory(width, device))
                self.take_place()
                self.slots[device] = slot
            elif slot.statistic.features != width:
                self._changed(slot.statistic.features, width, dims)
        if is_tracing():
            self.graph_tensor = self.slots[device].static_tensors()[0]
            for tensor in self.slots[device].static_tensors():
                make_static(tensor)
            allow_graphs(self.control.graphs)

    @property
    def width(self) -> int | None:
        """How many features it has; None before the first call."""
        return next((slot.statistic.features for slot in self.slots.values()), None)

    def _changed(self, before: int, width: int, dims: int) -> None:
        axis = self.axes.get(dims)
        if axis is None or axis.sure:
            raise ValueError(
                f"its activations were {before} features wide and are now {width}: the features are "
                f"probably along another dimension; pass feature_dim={{{self.layer.name!r}: …}}"
            )
        self.ended = True
        self.slots.clear()
        raise ValueError(
            f"its activations were {before} wide and are now {width}: this size depends on the batch, or the layer comes after "
            f"several others. What was read is dropped. Record the layers before it, or pass feature_dim={{{self.layer.name!r}: …}}"
        )

    # -- the dimension of the features ---------------------------------------------------------------------------------

    def axis(self, x: Tensor) -> int:
        """The dimension of the features in ``x``, ≥ 0.

        Raises:
            Unsure: nothing decides.
            ValueError: there is none.
        """
        dim = self.dims.get(x.dim())
        return self._first_axis(x) if dim is None else dim

    @ordered
    def _first_axis(self, x: Tensor) -> int:
        """As :meth:`axis`. One thread finds it out; others wait and know it then."""
        dims = x.dim()
        if (dim := self.dims.get(dims)) is not None:
            return dim
        if dims == 0:
            raise ValueError("it holds a single number, which has no features")
        known, shape, trail = self.axes.get(dims), tuple(x.shape), self.control.trail
        if self.of in PARAMETERS:
            return self.decided(dims, parameter_axis(self.layer.module, shape, self.label or "weight"), shape)
        if self.layer.feature_dim is not None:
            return self.decided(dims, self.given(dims), shape)
        if known is not None:
            return self.decided(dims, second_shape(known, self.shapes[dims], shape), shape)
        dim = self.decided(dims, trail.input(self.layer, x) if self.of == "input" else trail.output(self.layer, x), shape)
        if self.of != "input":
            trail.note(self.layer.module, self.layer.name, x, dim)
        return dim

    def given(self, dims: int) -> Axis:
        dim = self.layer.feature_dim
        if dim is None or not -dims <= dim < dims:
            raise ValueError(f"its activations have {dims} dimensions, and feature_dim={dim} is not one of them")
        return Axis(dim % dims, "feature_dim=")

    def decided(self, dims: int, axis: Axis, shape: tuple[int, ...]) -> int:
        """Keeps what is known.

        Raises:
            Unsure: nothing decides.
            ValueError: there are no features.
        """
        self.axes[dims] = axis
        if axis.dim is not None:
            self.dims[dims] = axis.dim
            return axis.dim
        shown = ", ".join(str(size) if size else "?" for size in self.shapes.setdefault(dims, shape))
        self.take_place()
        if axis.by != UNSURE:
            raise ValueError(f"its activations ({shown}{',' if dims == 1 else ''}) hold no features: {axis.by}")
        wait = "; a call with another shape may decide it" if axis.open else ""
        raise Unsure(
            f"unsure which dimension of its activations ({shown}) holds features{wait}. Pass feature_dim={{{self.layer.name!r}: …}} "
            f"to read it"
        )

    # -- what cannot be read ---------------------------------------------------------------------------------------------

    def failed(self, error: Exception, x: Tensor | None = None) -> None:
        """A call could not be read. It is left out and counted, and the first one of its kind is told in a warning.

        Raises:
            Exception: errors are wanted; or the user named this layer, and its first call cannot be read.
        """
        reason = self._reason(error, x)
        raised = self.complain(reason)
        if raised is not None:
            raise raised from reason

    def complain(self, error: Exception) -> Exception | None:
        """As :meth:`failed`, but it returns the error that shall be raised."""
        self.left_out += 1
        first = not self.failure and not self.seen
        if first and self.loaded is None:
            self.slots.clear()  # a state in which nothing was read
        self.failure, self.unsure = str(error), isinstance(error, Unsure)
        if self.control.strict or (first and self.layer.explicit and not self.unsure):
            kind = next((kind for kind in (NotImplementedError, TypeError, ValueError) if isinstance(error, kind)), RuntimeError)
            return kind(f"layer {self.name!r}: {error}")
        cause = _NUMBERS.sub("", self.failure.replace(repr(self.layer.name), ""))[:60]
        if cause not in self.control.warned:
            self.control.warned.add(cause)
            warnings.warn(
                f"torchprobe: layer {self.name!r} was not read: {error}. This call is left out, and the run goes on. The report at the end "
                f"names every such layer",
                RecordingWarning,
                stacklevel=2,
            )
        return None

    def _reason(self, error: Exception, x: Tensor | None) -> Exception:
        """The operator says in its own words that a tensor does not fit; this says what has changed."""
        if type(error) not in (RuntimeError, NotImplementedError, TypeError, ValueError):
            return error
        if x is not None and x.device in self.slots and is_plain(x):
            try:
                dim = self.axis(x)
                self.allocate(x.shape[dim], x.device, x.dim())
                if self.fused:
                    check(self.slots[x.device].state, x, dim, self.control.every, None)
            except (IndexError, ValueError) as reason:
                return reason
        return error
