"""Everything that depends on ``torch.compile``.

A hook of a module inside a compiled graph becomes part of the graph: its Python runs once, while the graph is traced. A hook of the
outermost compiled module usually stays outside and runs as in eager mode. ``import torchprobe`` does not import the compiler.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Traced(Protocol):
    """A caller of functions marked :func:`at_trace_time`. Its ``key`` is the result of :func:`register`."""

    key: str


_registered: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(caller: Traced) -> str:
    """The key of a caller. It is text, because text is a constant to the compiler; objects are not, and numbers may change."""
    key = str(next(_numbers))
    _registered[key] = caller
    return key


def at_trace_time(function: Callable[Concatenate[Any, Arguments], Result]) -> Callable[Concatenate[str, Arguments], Result]:
    """Marks a function that runs while a graph is traced. Its result is a constant in the graph.

    It does what ``torch.compiler.assume_constant_result`` does, without importing the compiler. The caller passes the key of a hook, and
    the function gets the hook; the other arguments are constants. While tracing, an error reaches the user as the compiler's
    ``UserError`` with the name of the layer. In eager mode it is an ordinary function.
    """

    def traced(key: str, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        hook = _registered[key]
        try:
            return function(hook, *args, **kwargs)
        except (TypeError, ValueError) as error:
            if not is_tracing():
                raise
            from torch._dynamo.exc import UserError, UserErrorType

            raise UserError(UserErrorType.INVALID_INPUT, f"layer {hook.layer.name!r}: {error}") from error

    traced.__name__, traced.__doc__ = function.__name__, function.__doc__
    traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return traced


def is_tracing() -> bool:
    """Whether the compiler is running. In traced code call ``torch.compiler.is_compiling()`` instead."""
    return torch._guards.CompileContext.current_compile_id() is not None


def never_compile_alone(function: Callable[..., Any]) -> None:
    """Inside a graph the function is traced; outside of one it runs as plain Python, with everything it calls.

    Otherwise the compiler would create a separate graph for every hook of an outermost module, one more for every layer, until it
    reached its recompilation limit.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))


def make_static(state: torch.Tensor) -> None:
    """Tells the compiler that neither the shape nor the address changes. A mutated input that is not static disables CUDA graphs."""
    torch._dynamo.mark_static(state)
    torch._dynamo.mark_static_address(state)


def allow_graphs(graphs: set[str]) -> None:
    """Raises the compiler's limits by one graph when a graph meets a layer for the first time; ``graphs`` remembers these graphs.

    Blocks that are compiled one by one share their code, but not their hooks. Each needs its own graph, and these may be more than
    the limits of the compiler allow.
    """
    graph = str(torch._guards.CompileContext.current_compile_id())
    if graph not in graphs:
        graphs.add(graph)
        _shift_limits(1)


def forget_graphs(graphs: set[str]) -> None:
    """Undoes :func:`allow_graphs`."""
    if graphs:
        _shift_limits(-len(graphs))
        graphs.clear()


def _shift_limits(graphs: int) -> None:
    config = torch._dynamo.config
    config.recompile_limit += graphs
    config.accumulated_recompile_limit += graphs


def drop_graphs(classes: Iterable[type]) -> int:
    """Drops the compiled graphs that guard on an object of one of the classes; returns how many functions had such graphs.

    A graph that was created before hooks were placed never looks for them again, because PyTorch leaves those guards out. So it must
    be compiled again.
    """
    codes = _codes_of(classes)
    for code in codes:
        torch._C._dynamo.eval_frame.reset_code(code)
    return len(codes)


def _codes_of(classes: Iterable[type]) -> list[CodeType]:
    if "torch._dynamo" not in sys.modules:
        return []
    ids = [str(id(cls)) for cls in classes]
    return [code for code in _compiled_codes() if any(_mentions(graph, ids) for graph in _graphs(code))]


def _compiled_codes() -> list[CodeType]:
    seen = torch._dynamo.convert_frame.input_codes.seen
    return [code for reference in list(seen) if (code := reference()) is not None]


def _graphs(code: CodeType) -> list[Any]:
    return list(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))


def _mentions(graph: Any, ids: list[str]) -> bool:
    """Whether the guards name one of the class ids; they name the class of every module that the graph calls."""
    guards = str(graph.guard_manager)
    return any(id_ in guards for id_ in ids)


def has_graphs(classes: Iterable[type]) -> bool:
    """Whether compiled graphs exist that guard on an object of one of the classes."""
    return bool(_codes_of(classes))


def refuse_recomputation(model: nn.Module, traced: Callable[[set[int]], bool]) -> list[Callable[[], object]]:
    """Makes compiled modules with recorded layers in their graphs refuse to run under an activation checkpoint.

    The checkpoint would run the whole graph again during backward, and count everything twice, since the graph contains no Python.

    Args:
        model: the model that is recorded.
        traced: whether a graph holds a hook of one of these modules, given by their ids.

    Returns:
        Functions that undo it.
    """
    undo: list[Callable[[], object]] = []
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            inner = module._modules["_orig_mod"]
            undo.append(module.register_forward_pre_hook(_Refusal(name, inner, traced)).remove)
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is not None:
            guarded = _Guarded(compiled, _Refusal(name, module, traced))
            module._compiled_call_impl = guarded
            undo.append(functools.partial(_unguard, module, guarded))
    return undo


class _Refusal:
    """Runs before a compiled graph. A copy does nothing."""

    def __init__(self, name: str, module: nn.Module, traced: Callable[[set[int]], bool]) -> None:
        self.name = name
        self.inside = {id(inner) for inner in module.modules()}
        self.traced = traced

    def __call__(self, module: nn.Module | None = None, args: Any = None) -> None:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return
        if self.traced(self.inside):
            raise RuntimeError(
                f"torchprobe: the compiled module {self.name!r} holds recorded layers and runs under an activation "
                f"checkpoint, which runs its graph again during backward: they would be counted twice. Compile around the "
                f"checkpoint instead, torch.compile(lambda x: checkpoint(block, x)), or record without the compiler"
            )

    def __deepcopy__(self, memo: Any) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()


class _Guarded:
    """The call of a module that was compiled in place, after a check by :class:`_Refusal`."""

    def __init__(self, compiled: Callable[..., Any], refusal: _Refusal) -> None:
        self.compiled, self.refusal = compiled, refusal

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.refusal()
        return self.compiled(*args, **kwargs)


def _unguard(module: nn.Module, guarded: _Guarded) -> None:
    if module._compiled_call_impl is guarded:
        module._compiled_call_impl = guarded.compiled


class Inert:
    """A copied or unpickled hook: it does nothing."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        return None


never_compile_alone(_Refusal.__call__)
never_compile_alone(Inert.__call__)
