"""How a tensor is read inside of a compiled graph.

The compiler traces these functions once, and only the operator remains. So they change nothing, and read nothing on the host. Everything
else that tracing needs is in functions marked ``at_trace_time``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchprobe.ops.observers import register_observer
from torchprobe.ops.positions import vectors_of
from torchprobe.recording import masks, nested
from torchprobe.recording.axes import Axis, parameter_axis
from torchprobe.recording.compiled import at_trace_time, in_region
from torchprobe.recording.stream import PARAMETERS, Stream, Unsure
from torchprobe.recording.tensors import is_plain, local

_observe = torch.ops.torchprobe.observe_.default
_observe_activation = torch.ops.torchprobe.observe_activation_.default
_observe_output = torch.ops.torchprobe.observe_output.default
_LOOK = -2


def read(stream: Stream, x: Tensor) -> Tensor:
    """As :meth:`Stream.read`. It returns what takes the place of ``x`` in the graph: mostly ``x`` itself."""
    pattern = pattern_of(stream.key)
    mask = None if pattern is None else stream.control.masks[pattern]
    if inside_region(stream.key):
        shown: Tensor = _observe_output(x, observer_number(stream.key), mask)
        return shown
    dim = axis(stream, x)
    if dim >= 0:
        _read(stream, x, dim, mask)
    return x


def _read(stream: Stream, x: Tensor, dim: int, mask: Tensor | None) -> None:
    positions, fused, every, swapped = settings(stream.key)
    if not fused:
        if allocated(stream.key, len(range(x.shape[dim])), x.device, x.dim()):
            _observe_activation(state_of(stream, x.device), x, observer_number(stream.key), mask)
        return
    vectors, kept = x, None
    if x.is_nested:
        vectors, kept = nested.vectors(x, dim, positions)
        dim = 1
    elif mask is not None or positions != "all":
        if swapped and positions != "all" and x.dim() == 3 and dim == 2:
            vectors, swapped = x.transpose(0, 1), False
        if mask is not None:
            lead = [size for index, size in enumerate(vectors.shape) if index != dim]
            clear, mask = masks.fit(mask, lead, swapped)
            if not clear:
                mask_unclear(stream.key)
                return
        if not positions_fit(stream.key, x.dim(), dim):
            return
        kept = masks.cut(mask, positions)
        vectors = vectors_of(vectors, positions, dim, mask)
    elif not is_plain(x):
        vectors = local(x, dim)
    # len(range(n)) is n, made a constant of the graph
    if allocated(stream.key, len(range(vectors.shape[dim])), vectors.device, x.dim()):
        _observe(state_of(stream, vectors.device), vectors, dim, sigma_of(stream.key), every, kept)


def axis(stream: Stream, x: Tensor) -> int:
    """The dimension of the features, or -1 if the activation is left out."""
    dims = x.dim()
    if x.is_nested:
        return nested_axis(stream.key, dims)
    dim = known_axis(stream.key, dims)
    if dim == _LOOK:
        widths = widths_of(stream.key)
        dim = found_axis(stream.key, matched(x, widths))
    return dim


def state_of(stream: Stream, device: torch.device) -> Tensor:
    """What the graph writes to. An attribute, where possible: regions that share a graph look for it before it exists."""
    if one_device(stream.key):
        assert stream.graph_tensor is not None
        return stream.graph_tensor
    slot = stream.slots[device]
    return slot.state if stream.fused else slot.token


def matched(x: Tensor, widths: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as constants, with 0 for sizes that are none of the widths. Comparing them adds guards; the batch stays free."""
    return tuple([0 if dim == 0 else match(size, widths) for dim, size in enumerate(x.shape)])


def match(size: int, widths: tuple[int, ...]) -> int:
    """The size if it is one of the widths, as a constant; otherwise 0."""
    for width in widths:
        if size == width:
            return width
    return 0


# -- what runs while a graph is traced ---------------------------------------------------------------------------------------


@at_trace_time(fallback=False)
def inside_region(stream: Stream) -> bool:
    return in_region() and stream.of not in PARAMETERS


@at_trace_time()
def pattern_of(stream: Stream) -> str | None:
    return stream.pattern() if stream.control.masks else None


@at_trace_time(fallback=-1)
def known_axis(stream: Stream, dims: int) -> int:
    if stream.ended or not stream.readable(dims):
        return -1
    if dims in stream.dims:
        return stream.dims[dims]
    if dims == 0:
        raise ValueError("it holds a single number, which has no features")
    if stream.of in PARAMETERS:
        name = stream.label or "weight"
        shape = tuple(getattr(stream.layer.module, name).shape)
        return stream.decided(dims, parameter_axis(stream.layer.module, shape, name), shape)
    return stream.decided(dims, stream.given(dims), ()) if stream.layer.feature_dim is not None else _LOOK


@at_trace_time(fallback=())
def widths_of(stream: Stream) -> tuple[int, ...]:
    """The sizes that say which dimension holds the features."""
    return tuple(stream.control.trail.widths(stream.layer))


@at_trace_time(fallback=-1)
def found_axis(stream: Stream, shape: tuple[int, ...]) -> int:
    trail, layer = stream.control.trail, stream.layer
    return stream.decided(len(shape), trail.static_input(layer, shape) if stream.of == "input" else trail.static(layer, shape), shape)


@at_trace_time(fallback=-1)
def nested_axis(stream: Stream, dims: int) -> int:
    """Of a nested tensor in a graph only (batch, tokens, features) is clear."""
    if dims != 3:
        raise Unsure("unsure which dimension of a nested tensor holds features in a compiled graph; run this model without torch.compile")
    return stream.decided(dims, Axis(2, "the last of a nested tensor"), ())


@at_trace_time(fallback=False)
def allocated(stream: Stream, width: int, device: torch.device, dims: int) -> bool:
    stream.allocate(width, device, dims)
    stream.seen = True
    return True


@at_trace_time(fallback=False)
def one_device(stream: Stream) -> bool:
    return len(stream.slots) == 1


@at_trace_time(fallback=False)
def positions_fit(stream: Stream, dims: int, dim: int) -> bool:
    if stream.positions in ("class", "patch") and (dims != 3 or dim != 2) and not (dims == 2 and stream.positions == "class"):
        raise ValueError(f'positions="{stream.positions}" needs (batch, tokens, features) with features last')
    return True


@at_trace_time()
def mask_unclear(stream: Stream) -> None:
    raise ValueError(
        f"the mask does not fit its activations, so it is not clear which vectors count: set the mask of this batch, give this layer "
        f"one of its own, rec.mask({{{stream.layer.name!r}: mask}}), or clear it with rec.mask(None)"
    )


@at_trace_time()
def settings(stream: Stream) -> tuple[str, bool, int, bool | None]:
    """``positions``, whether the statistic is an operator, ``every``, and whether tokens come first."""
    return stream.positions, stream.fused, stream.control.every, stream.swapped


@at_trace_time(fallback=6.0)
def sigma_of(stream: Stream) -> float:
    return next(iter(stream.slots.values())).sigma


@at_trace_time(fallback=-1, fresh=True)
def observer_number(stream: Stream) -> int:
    """A new number for every call. The compiler would merge two calls with equal arguments, such as those of a shared layer."""
    return register_observer(stream)
