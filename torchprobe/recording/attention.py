"""The largest attention logit and the entropy of attention, of each head: read from the operators that compute attention."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchprobe.common.messages import counted, listing, reason
from torchprobe.common.numbers import whole
from torchprobe.recording.attention_rows import of_logits, of_queries
from torchprobe.recording.hook import takes_hooks
from torchprobe.recording.layers import Layer, Selection, select_layers
from torchprobe.recording.recorder import Recorder
from torchprobe.recording.stream import RecordingWarning

_ATTENTION = re.compile(r"att(ention|n)|multihead", re.IGNORECASE)  # in the name of a class
_HIDDEN = re.compile(r"att(ention|n)|flash|fmha", re.IGNORECASE)  # in the name of an operator
_FUSED = re.compile(r"_scaled_dot_product_\w*attention\w*")  # of (batch, heads, queries, width), by the names of their arguments
_SOFTMAX = ("_safe_softmax", "_softmax")


class MaxLogit(nn.Identity):
    """Is called with the largest logit of each row, (batch, rows, heads)."""


class Entropy(nn.Identity):
    """Is called with the entropy of each row in nats, (batch, rows, heads)."""


@contextlib.contextmanager
def record_attention(model: nn.Module, layers: Selection | None = None, *, rows: int | None = None, **options: Any) -> Iterator[Recorder]:
    """Records the largest attention logit and the entropy of attention while a model runs, of each head.

    Training often diverges after the largest logit has grown (Dehghani et al., 2023) and the entropy has fallen to 0 (Zhai et al., 2023).
    Queries and keys are read where the operator gets them, so after rotary embeddings, norms and biases:

    * ``F.scaled_dot_product_attention`` of (batch, heads, queries, width), whichever kernel it takes: logits are computed from queries and
      keys, with scale, mask, causal mask and grouped heads. Dropout is left out. Of other shapes the heads are not known.
    * a softmax over (batch, heads, queries, keys) within an attention module, such as the eager attention of transformers; of
      ``nn.MultiheadAttention`` also (batch · heads, queries, keys): its input.

    Other kernels (flash_attn, xformers, flex attention) show no logits: such a layer is reported when the block ends, and has no numbers.
    Meanwhile a compiled model runs eagerly, and the fused inference path of ``nn.MultiheadAttention`` is off, so outputs may differ in
    the last bits. Only the thread that entered the block is read.

    Args:
        model: any module.
        layers: the attention modules. Default: the innermost modules whose class is named like one (``attention``, ``attn``,
            ``multihead``).
        rows: read so many queries of each call, evenly spaced; then the largest logit is that of these. Default: all. It costs
            about as much as attention itself, in pieces of at most 64 MiB.
        options: further arguments of :func:`torchprobe.record`, such as ``statistic``, ``every`` or ``keep``.

    Yields:
        A :class:`torchprobe.Recorder` with two rows for each layer, ``"{layer}.max_logit"`` and ``"{layer}.entropy"``; their features are
        the heads, their vectors the queries. So ``rec["blocks.0.attn.max_logit"].max`` is the largest logit of each head, and
        ``rec["blocks.0.attn.entropy"].mean`` the mean entropy. ``rec.mask(mask)`` leaves padded queries out (with ``rows=None``).
        Rows that attend to nothing are counted in ``nonfinite``.

    Raises:
        ValueError: the model has no attention module, or an argument is out of range.

    >>> import torch, torchprobe
    >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with torchprobe.record_attention(attention) as rec:
    ...     _ = attention(*[torch.randn(3, 5, 8)] * 3)
    >>> rec.layers, tuple(rec["max_logit"].max.shape), rec["entropy"].vectors
    (['max_logit', 'entropy'], (2,), 15)
    >>> bool((rec["entropy"].mean < torch.tensor(5.0).log()).all())
    True
    """
    rows = None if rows is None else whole("rows", rows, 1)
    chosen = [
        layer for layer in (_attention_layers(model) if layers is None else select_layers(model, layers)) if takes_hooks(layer.module)
    ]
    taps = nn.Module()
    reader = _Reader({id(layer.module): (layer, *_tap(taps, layer.name)) for layer in chosen}, rows)
    rec = Recorder(taps, "**", feature_dim=-1, exclude=[], **options)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled yet
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for layer in chosen:
            stack.callback(layer.module.register_forward_pre_hook(reader.entered).remove)
            stack.callback(layer.module.register_forward_hook(reader.left, always_call=True).remove)
        rec.start()
        stack.callback(rec.leave)
        stack.enter_context(reader)
        stack.enter_context(_Shapes(reader))
        yield rec
    if text := reader.report():
        warnings.warn(text, RecordingWarning, stacklevel=3)


def _attention_layers(model: nn.Module) -> list[Layer]:
    """The innermost modules whose class is named like attention."""

    def named(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) or _ATTENTION.search(type(module).__name__) is not None

    try:
        return select_layers(model, lambda name, module: named(module) and not any(named(m) for m in list(module.modules())[1:]))
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} has no module whose class is named like attention: pass layers=, the modules that compute it"
        ) from error


def _tap(root: nn.Module, name: str) -> tuple[MaxLogit, Entropy]:
    """Two modules at the place of a layer, which a recorder can watch."""
    place = root
    for part in name.split(".") if name else ():
        if part not in place._modules:
            place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    taps = MaxLogit(), Entropy()
    place.add_module("max_logit", taps[0])
    place.add_module("entropy", taps[1])
    return taps


class _Shapes(TorchFunctionMode):
    """Notes attention of queries without four dimensions, which its operator may get with a dimension more."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self.reader = reader

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs.get("query")
        self.reader.shape = tuple(query.shape) if isinstance(query, Tensor) and not query.is_nested and query.dim() != 4 else None
        try:
            return func(*args, **kwargs)
        finally:
            self.reader.shape = None


class _Reader(TorchDispatchMode):
    """Sees every operator that runs, and reads those that compute attention in one of the modules.

    Args:
        taps: ``id`` of a module → its layer, and what is called with its numbers.
        rows: see :func:`record_attention`.
    """

    def __init__(self, taps: dict[int, tuple[Layer, MaxLogit, Entropy]], rows: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.taps, self.rows = taps, rows
        self.running: list[nn.Module] = []
        self.ran: set[str] = set()
        self.read: set[str] = set()
        self.transformed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # which run inside of vmap
        self.reasons: dict[str, str] = {}  # layer → what could not be read
        self.shape: tuple[int, ...] | None = None  # of the queries whose attention is running, if it is not (batch, heads, queries, width)
        self.outside: set[str] = set()  # operators outside of the layers

    def entered(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)
        levels = torch._C._functorch.get_interpreter_stack() or ()
        if any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
            self.transformed.add(module)
        self.ran.add(self.taps[id(module)][0].name)

    def left(self, module: nn.Module, args: Any, output: Any) -> None:
        while self.running and self.running.pop() is not module:
            pass
        self.transformed.discard(module)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in _SOFTMAX or _HIDDEN.search(name):
            self._see(name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _see(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1 or "backward" in name:  # an activation checkpoint runs the forward again
            return
        if not self.running:
            if name != "_softmax":
                self.outside.add(name)
            return
        layer, largest, entropy = self.taps[id(self.running[-1])]
        if self.running[-1] in self.transformed:
            self.reasons.setdefault(layer.name, "it ran inside torch.func.vmap, which hides a dimension: call it directly")
            return
        try:
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
            read = self._rows(name, given, layer.module)
            if isinstance(read, str):
                self.reasons.setdefault(layer.name, read)
                return
            with torch.no_grad():
                numbers = read()
                self.read.add(layer.name)
                for tap, values in zip((largest, entropy), numbers, strict=True):
                    tap(values)
        except Exception as error:  # a monitor never ends a run
            self.reasons.setdefault(layer.name, f"{name} could not be read: {reason(error)}")

    def _rows(self, name: str, given: dict[str, Any], module: nn.Module) -> Callable[[], tuple[Tensor, Tensor]] | str:
        """How the rows are computed, or why they cannot be."""
        if self.shape is not None:
            return f"queries of shape {self.shape}, whose heads are not known: give (batch, heads, queries, width)"
        if name in _SOFTMAX:
            logits, dim = given["self"], given["dim"]
            if dim not in (-1, logits.dim() - 1):
                return f"a softmax over dimension {dim} of {logits.dim()}"
            if logits.dim() == 3 and isinstance(module, nn.MultiheadAttention):
                logits = logits.unflatten(0, (-1, module.num_heads))
            if logits.dim() != 4:
                return f"a softmax over a tensor of shape {tuple(logits.shape)}, whose heads are not known"
            return lambda: of_logits(logits, self.rows)
        if not _FUSED.fullmatch(name) or given["query"].is_nested or given["query"].dim() != 4:
            return f"{name} hides its queries and keys"
        mask = given.get("attn_mask", given.get("attn_bias"))
        causal, scale = bool(given.get("is_causal", False)), given.get("scale")
        return lambda: of_queries(given["query"], given["key"], mask, causal, scale, self.rows)

    def report(self) -> str:
        """What could not be read, in words; "" if there is nothing."""
        silent = sorted(self.ran - self.read)
        parts = []
        if silent:
            nothing = "no operator that computes attention was seen in it: a fused kernel hides it, or it is no attention"
            why = self.reasons.get(silent[0], nothing)
            more = f"; with {counted(len(silent) - 1, 'other layer')}: {listing(silent[1:], 6)}" if silent[1:] else ""
            parts.append(f"attention of {silent[0] or '(output)'} was not read: {why}{more}")
        partly = [name for name in self.reasons if name in self.read]
        if partly:
            parts.append(f"some calls of {listing(partly, 4)} were not read: {self.reasons[partly[0]]}")
        if never := [layer.name or "(output)" for layer, *_ in self.taps.values() if layer.name not in self.ran]:
            parts.append(f"{counted(len(never), 'layer')} did not run: {listing(never, 6)}")
        if self.outside and not self.read:
            parts.append(f"{listing(sorted(self.outside), 3)} ran outside of these modules: pass layers=")
        return f"torchprobe: {'. '.join(parts)}" if parts else ""
