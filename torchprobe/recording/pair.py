"""Two models on the same input, layer by layer: where their outputs part, and which layer adds the error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.messages import counted, listing
from torchprobe.common.numbers import whole
from torchprobe.recording.layers import OUTPUT, Exclusion, Layer, Selection, select_layers
from torchprobe.recording.matching import match_layers
from torchprobe.recording.pair_comparison import LayerPair, PairComparison
from torchprobe.recording.pair_replay import Swap
from torchprobe.recording.pair_state import restored
from torchprobe.recording.pair_taps import Call, Taps
from torchprobe.recording.reader import device_of
from torchprobe.recording.structure import mapped
from torchprobe.recording.tensor_difference import Difference, difference

Run = Callable[[nn.Module, Any], object]

MEMORY = 2 << 30
"""Bytes of outputs of the first model that are kept on the host at a time."""


def record_pair(
    model_a: nn.Module,
    model_b: nn.Module,
    batch: Any,
    layers: Selection | None = "**",
    *,
    exclude: Exclusion | None = None,
    rename: Mapping[str, str] | None = None,
    isolate: bool = False,
    tolerance: float = 0.0,
    run: Run | None = None,
    memory: int = MEMORY,
) -> PairComparison:
    """Runs two models on the same batch and compares the outputs of each layer exactly: every tensor in tuples, lists, mappings and
    dataclasses, whole numbers and bool, too.

    The models may differ in weights, precision, device, quantization, or in that one is compiled. ``a`` is the reference. Both run without
    gradients, in the mode (train or eval) in which they are, from the same state of the random numbers. Their buffers and that state are
    restored afterwards, and no hook is left. Outputs are read, never changed.

    ``isolate=True`` finds out which layer *adds* the error, instead of passing on what came in. While ``a`` runs, each layer of ``b`` runs
    on the input that the layer of ``a`` was given, and its inner layers give what those of ``a`` gave. So the error of a layer, ``own``, is
    that of its own code and weights alone; rounding its input to the dtype of ``b`` counts as its own, too.

    Memory: the outputs of ``a`` are kept on the host, at most ``memory`` bytes at a time. If they are more, both models run again for the
    rest. ``isolate`` also keeps, on the device, the inputs of the modules that are running and the inputs and outputs of their inner
    layers. Of a compiled model all selected outputs are on its device at once.

    Args:
        model_a, model_b: any modules, also the same modules once plain and once compiled.
        batch: what the models are called with: a tensor, a tuple of arguments, or a mapping of keyword arguments. Tensors are moved to the
            device of each model; floating-point tensors get the dtype of its first floating-point parameter.
        layers, exclude: layers of ``model_a``, as for :func:`torchprobe.record`. Default: all modules.
        rename: name or glob of a layer of ``a`` → name in ``b``; see :func:`torchprobe.recording.matching.match_layers`.
        isolate: see above.
        tolerance: the relative L2 error up to which outputs count as equal, for :attr:`PairComparison.first`. 0: they must be the same.
            Whole numbers, such as chosen tokens, must always be.
        run: calls a model, ``run(model, batch)``, if the above does not fit.
        memory: see above.

    Raises:
        TypeError: an argument is not a module.
        ValueError: the models have no layer in common, none of them ran or gave a value, or ``isolate`` cannot look into a compiled
            ``model_b``.

    >>> import copy, torch, torchprobe
    >>> a = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> b = copy.deepcopy(a)
    >>> with torch.no_grad():
    ...     _ = b[2].weight[3].mul_(1.1)
    >>> found = torchprobe.record_pair(a, b, torch.randn(16, 8), isolate=True)
    >>> found.first, found.culprit
    ('2', '2')
    """
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is a relative error of at least 0, got {tolerance}")
    memory = whole("memory", memory, 1)
    selected = {layer.name: layer for layer in select_layers(model_a, layers, exclude=exclude)}
    others = {layer.name: layer for layer in select_layers(model_b, lambda name, module: True)}
    matched = match_layers([*selected], [*others], rename)
    if not matched.pairs:
        raise ValueError(
            f"the models have no layer in common: a has {listing([*map(repr, selected)], 4)}, b has {listing([*map(repr, others)], 4)}. "
            f"Say which is which with rename={{'blocks.*': 'layers.*'}}"
        )
    if isolate and _is_compiled(model_b):
        raise ValueError(
            "isolate=True runs layers of model_b alone, which a compiled model does not do: give the model before torch.compile"
        )
    pairs = [(selected[a], others[b]) for a, b in matched.pairs]
    call = run if run is not None else _call
    remarks, caveats = [*matched.remarks], _modes(pairs)
    rows, swap = _passes(model_a, model_b, pairs, batch, call, memory, isolate)
    if not rows:
        raise ValueError(f"none of the layers ran in both models, such as {listing([*map(repr, selected)], 4)}")
    if all(row.output.equal and not row.output.elements for row in rows):
        raise ValueError("no output holds any value, so there is nothing to compare: give a batch that is not empty")
    ran = {row.layer for row in rows}
    if unread := {row.name: row.output.problem for row in rows if not row.output.compared}:
        remarks.append(f"{counted(len(unread), 'output')} could not be compared: {listing([*unread], 6)} ({next(iter(unread.values()))})")
    if silent := [name for name, _ in matched.pairs if name not in ran]:
        remarks.append(f"{counted(len(silent), 'layer')} did not run in both, or gave no tensor: {listing(silent, 6)}")
    if matched.only_first:
        caveats.append(f"{counted(len(matched.only_first), 'layer')} of a without a partner in b: {listing(matched.only_first, 6)}")
    if swap is not None and swap.problems:
        remarks.append(f"{counted(len(swap.problems), 'layer')} of b could not run alone, such as {swap.told()}")
    return PairComparison(rows, isolate, float(tolerance), [*remarks, *caveats], caveats)


def _modes(pairs: list[tuple[Layer, Layer]]) -> list[str]:
    """Layers in train mode in one model only: their dropout and batch norms differ, whatever their weights."""
    found = []
    for mode, training in (("train", True), ("eval", False)):
        names = [a.name or OUTPUT for a, b in pairs if a.module.training == training != b.module.training]
        if names:
            other = "eval" if training else "train"
            count = (
                "all layers are" if len(names) == len(pairs) > 1 else f"{counted(len(names), 'layer')} {'is' if len(names) == 1 else 'are'}"
            )
            found.append(f"{count} in {mode} mode in a and in {other} mode in b, which is a difference by itself: {listing(names, 6)}")
    return found


def _passes(
    model_a: nn.Module, model_b: nn.Module, pairs: list[tuple[Layer, Layer]], batch: Any, call: Run, memory: int, isolate: bool
) -> tuple[list[LayerPair], Swap | None]:
    """Both models run as often as the memory demands; rows in the order in which the layers of ``a`` end."""
    names = {b.name: a.name for a, b in pairs}
    swap: Swap | None = None
    if isolate:
        swap = Swap(pairs)
        with swap.noting_types():
            _forward(model_b, batch, call)
        with swap.testing(), restored(model_b):
            _forward(model_a, batch, call)
    rows: dict[int, list[LayerPair]] = {}  # by the number of the call in a
    start, end, order = 0, 1, dict[tuple[str, int], int]()
    while start < end:
        kept: dict[tuple[str, int], Call] = {}
        taps = Taps({a.name: a.module for a, _ in pairs}, kept.__setitem__, start, memory, True, order)
        with taps.placed(_is_compiled(model_a)):
            _forward(model_a, batch, call)
        end, order, start = taps.calls, taps.orders, taps.next_start

        def compare(key: tuple[str, int], found: Call, kept: dict[tuple[str, int], Call] = kept) -> None:
            name = names[key[0]], key[1]
            if (expected := kept.pop(name, None)) is not None:
                rows[expected.order] = _rows(name, expected, found, swap)

        others = Taps({b.name: b.module for _, b in pairs}, compare, 0, sys.maxsize, False)
        with others.placed(_is_compiled(model_b)):
            _forward(model_b, batch, call)
    return [row for number in sorted(rows) for row in rows[number]], swap


def _rows(name: tuple[str, int], a: Call, b: Call, swap: Swap | None) -> list[LayerPair]:
    """One row for each tensor of one call of a layer."""
    entered = None if a.given is None or b.given is None else difference(a.given, b.given)
    there, rows = dict(b.tensors), []
    for place, x in a.tensors:
        y = there.get(place)
        found = Difference(problem="b gives no such tensor") if y is None else difference(x, y)
        own, at, problem = (None, "", "") if swap is None else swap.error(name, place)
        rows.append(LayerPair(name[0], place, name[1], a.module, entered, found, own, at, problem))
    return rows


# -- running -----------------------------------------------------------------------------------------------------------------


def _forward(model: nn.Module, batch: Any, call: Run) -> None:
    """One pass from the present state of the random numbers and of the buffers, which are the same afterwards: the next pass begins there,
    and ``b`` may be ``a`` itself."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices), restored(model):
        call(model, batch)


def _call(model: nn.Module, batch: Any) -> object:
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def fitted(x: Tensor) -> Tensor:
        return x.detach().to(device, dtype if dtype is not None and x.is_floating_point() else None, copy=True)

    given = mapped(batch, fitted, lambda other: other)
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, (tuple, list)) else model(given)


def _is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled."""
    return "torch._dynamo" in sys.modules and any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )
