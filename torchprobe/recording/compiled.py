"""Everything that depends on ``torch.compile``.

A hook of a module inside a compiled graph becomes part of the graph: its Python runs once, while the graph is traced. A hook of the
outermost compiled module usually stays outside and runs as in eager mode. ``import torchprobe`` does not import the compiler.

The names of PyTorch that begin with an underscore may change. They are all in this file, and are looked up once. Without them everything
works but recording inside of compiled graphs: see :func:`available`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from torchprobe.common.messages import users_level

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _Names(NamedTuple):
    """What we use of the compiler, beside its public names."""

    skip: Any
    strategy: Callable[..., Any]
    set_strategy: Callable[..., Any]
    reset_code: Callable[..., Any]
    entries: Callable[..., Any]
    current_compile: Callable[[], Any]


def _lookup() -> _Names | None:
    """The names, or None if this version of PyTorch lacks one."""
    try:
        frames = torch._C._dynamo.eval_frame
        return _Names(
            frames._FrameAction.SKIP,
            frames._FrameExecStrategy,
            frames.set_code_exec_strategy,
            frames.reset_code,
            frames._debug_get_cache_entry_list,
            torch._guards.CompileContext.current_compile_id,
        )
    except AttributeError:
        return None


_names = _lookup()


def available() -> bool:
    """Whether recording inside of compiled graphs works with this version of PyTorch."""
    return _names is not None


class Traced(Protocol):
    """A caller of functions marked :func:`at_trace_time`. Its ``key`` is the result of :func:`register`."""

    key: str

    def complain(self, error: Exception) -> Exception | None:
        """Notes an error; returns it if it shall be raised."""


_registered: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(caller: Any) -> str:
    """The key of a caller. It is text, because text is a constant to the compiler; objects are not, and numbers may change."""
    key = str(next(_numbers))
    caller.answers = "", {}
    _registered[key] = caller
    return key


def at_trace_time(
    fallback: Any = None, fresh: bool = False
) -> Callable[[Callable[Concatenate[Any, Arguments], Result]], Callable[Concatenate[str, Arguments], Result]]:
    """Marks a function that runs while a graph is traced. Its result is a constant in the graph.

    It does what ``torch.compiler.assume_constant_result`` does, without importing the compiler. The caller passes the key of a hook, and
    the function gets the hook, a :class:`Traced`; the other arguments are constants. The compiler may trace a graph several times until it
    succeeds, and must take the same way again; so an answer is kept for the whole compilation, unless it must be ``fresh``.

    After an error the result is ``fallback``, and the forward goes on, unless the recorder wants errors: then it reaches the user, while
    tracing as the compiler's ``UserError``.
    """

    def mark(function: Callable[Concatenate[Any, Arguments], Result]) -> Callable[Concatenate[str, Arguments], Result]:
        def traced(key: str, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            hook = _registered[key]
            kept = None if fresh else _answers(hook)
            question = function.__name__, args
            if kept is not None and question in kept:
                answer: Result = kept[question]
                return answer
            try:
                answer = function(hook, *args, **kwargs)
                if kept is not None:
                    kept[question] = answer
                return answer
            except Exception as error:
                explained = hook.complain(error)
                if explained is None:
                    answer = fallback
                    if kept is not None:
                        kept[question] = answer
                    return answer
                if not is_tracing():
                    raise explained from error
                from torch._dynamo.exc import UserError, UserErrorType

                raise UserError(UserErrorType.INVALID_INPUT, str(explained)) from error

        traced.__name__, traced.__doc__ = function.__name__, function.__doc__
        traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
        return traced

    return mark


def _answers(hook: Any) -> dict[Any, Any] | None:
    """What was answered in the running compilation."""
    if not is_tracing():
        return None
    compilation = _compilation()
    if hook.answers[0] != compilation:
        hook.answers = compilation, {}
    answers: dict[Any, Any] = hook.answers[1]
    return answers


def _compilation() -> str:
    return str(_names.current_compile()) if _names is not None else ""


def in_region() -> bool:
    """Whether the compiler traces a part of a graph where operators may not change their arguments, such as a nested region."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tracers = InstructionTranslator.current_tx().output.tracers
        names = [str(getattr(tracer, "source_target", None)) for tracer in tracers[1:]]
    except AttributeError:  # another version of PyTorch
        return False
    return any("checkpoint" not in name for name in names)


def warn_if_compiled(model: nn.Module, category: type[Warning]) -> None:
    """Warns if a part of the model is compiled, and this version of PyTorch lacks what recording there needs."""
    if any("_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None for module in model.modules()):
        warnings.warn(
            "torchprobe: this version of PyTorch has changed inside, so layers in compiled graphs may not be recorded. Run the model "
            "without torch.compile, with torch.compiler.set_stance('force_eager'), or use another version",
            category,
            stacklevel=users_level(),
        )


def is_tracing() -> bool:
    """Whether the compiler is running. In traced code call ``torch.compiler.is_compiling()`` instead."""
    return _names is not None and _names.current_compile() is not None


def is_exporting() -> bool:
    """Whether ``torch.export`` is running; False before torch 2.7, which cannot say it."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def never_compile_alone(function: Callable[..., Any]) -> None:
    """Inside a graph the function is traced; outside of one it runs as plain Python, with everything it calls.

    Otherwise the compiler would create a separate graph for every hook of an outermost module, one more for every layer, until it
    reached its recompilation limit.
    """
    if _names is not None:
        _names.set_strategy(function.__code__, _names.strategy(_names.skip, _names.skip))


def make_static(state: torch.Tensor) -> None:
    """Tells the compiler that neither the shape nor the address changes. A mutated input that is not static disables CUDA graphs."""
    torch._dynamo.mark_static(state)
    torch._dynamo.mark_static_address(state)


def allow_graphs(graphs: set[str]) -> None:
    """Raises the compiler's limits by one graph when a graph meets a layer for the first time; ``graphs`` remembers these graphs.

    Blocks that are compiled one by one share their code, but not their hooks. Each needs its own graph, and these may be more than
    the limits of the compiler allow.
    """
    graph = _compilation()
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
        if _names is not None:
            _names.reset_code(code)
    return len(codes)


def _codes_of(classes: Iterable[type]) -> list[CodeType]:
    if "torch._dynamo" not in sys.modules or _names is None:
        return []
    ids = [str(id(cls)) for cls in classes]
    return [code for code in _compiled_codes() if any(_mentions(graph, ids) for graph in _graphs(code))]


def _compiled_codes() -> list[CodeType]:
    seen = torch._dynamo.convert_frame.input_codes.seen
    return [code for reference in list(seen) if (code := reference()) is not None]


def _graphs(code: CodeType) -> list[Any]:
    return list(_names.entries(code)) if _names is not None else []


def _mentions(graph: Any, ids: list[str]) -> bool:
    """Whether the guards name one of the class ids; they name the class of every module that the graph calls."""
    guards = str(graph.guard_manager)
    return any(id_ in guards for id_ in ids)


def has_graphs(classes: Iterable[type]) -> bool:
    """Whether compiled graphs exist that guard on an object of one of the classes."""
    return bool(_codes_of(classes))


def watch_recomputation(model: nn.Module, keep: Callable[[set[int]], Callable[[], None]]) -> list[Callable[[], object]]:
    """Makes compiled modules with recorded layers count once when they run under an activation checkpoint.

    The checkpoint runs the whole graph again during backward. The graph holds no Python that could leave the second run out, so what it
    adds is undone.

    Args:
        model: the model that is recorded.
        keep: remembers what the hooks of these modules, given by their ids, have counted; returns a function that restores it.

    Returns:
        Functions that undo it.
    """
    undo: list[Callable[[], object]] = []
    for module in model.modules():
        if "_orig_mod" in module._modules and module._modules["_orig_mod"] is not None:
            again = Recomputation(module._modules["_orig_mod"], keep)
            undo.append(module.register_forward_pre_hook(again.begin).remove)
            undo.append(module.register_forward_hook(again.end, always_call=True).remove)
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is not None:
            guarded = _Guarded(compiled, Recomputation(module, keep))
            module._compiled_call_impl = guarded
            undo.append(functools.partial(_unguard, module, guarded))
    return undo


class Recomputation:
    """Leaves out what a compiled module counts while it runs during backward."""

    def __init__(self, module: nn.Module, keep: Callable[[set[int]], Callable[[], None]]) -> None:
        self.inside = {id(inner) for inner in module.modules()}
        self.keep = keep
        self.restore: list[Callable[[], None]] = []
        self.begin, self.end = Quiet(self._begin), Quiet(self._end)

    def _begin(self) -> None:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self.restore.append(self.keep(self.inside))

    def _end(self) -> None:
        if self.restore and not torch.compiler.is_compiling():
            self.restore.pop()()


class OwnHook:
    """Base class of all hooks of this package. A copy or a pickle of a hook does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return copied(memo)

    def __reduce__(self) -> Any:
        return NOTHING

    @property
    def __name__(self) -> str:
        """``torch.jit.script`` asks for it, to compile the hook."""
        raise AttributeError(
            "torchprobe records this model, and torch.jit.script cannot compile its hooks: stop the recording first, or call "
            "torchprobe.detach_all(model). A scripted module runs without Python, so it could not be recorded"
        )

    def remove_from(self, module: nn.Module) -> None:
        """Takes this hook off a module that it was moved to."""
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            own: Any = self
            for key in [key for key, hook in hooks.items() if hook is own]:
                del hooks[key]


class Quiet(OwnHook):
    """A hook that calls a function without arguments."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function()


class _Guarded:
    """The call of a module that was compiled in place."""

    def __init__(self, compiled: Callable[..., Any], again: Recomputation) -> None:
        self.compiled, self.again = compiled, again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.again.begin()
        try:
            return self.compiled(*args, **kwargs)
        finally:
            self.again.end()


def _unguard(module: nn.Module, guarded: _Guarded) -> None:
    if module._compiled_call_impl is guarded:
        module._compiled_call_impl = guarded.compiled


def unguard_all(module: nn.Module) -> None:
    """Gives a module its own compiled call back."""
    guarded = module.__dict__.get("_compiled_call_impl")
    while isinstance(guarded, _Guarded):
        module._compiled_call_impl = guarded = guarded.compiled


# -- copies of hooks ---------------------------------------------------------------------------------------------------------


NOTHING = (getattr, (contextlib.nullcontext(), "__exit__"))
"""What a pickled hook becomes: a function of Python that does nothing. So the file of a recorded model does not need this package."""


class _Sweep:
    """Removes the copy of a hook from the dictionary of a copied module. The copying holds it, and drops it at its end."""

    def __init__(self, hooks: dict[int, Any], twin: object) -> None:
        self.hooks, self.twin = hooks, twin

    def __del__(self) -> None:
        for key in [key for key, hook in self.hooks.items() if hook is self.twin]:
            del self.hooks[key]


def copied(memo: dict[int, Any]) -> Callable[..., None]:
    """What ``copy.deepcopy`` makes of a hook: nothing. The copy of the module has no hook once the copying is over."""
    twin: Callable[..., None] = contextlib.nullcontext().__exit__
    hooks = next((value for value in reversed(memo.values()) if type(value) is OrderedDict), None)  # the dictionary being copied
    if hooks is not None:
        memo.setdefault(id(memo), []).append(_Sweep(hooks, twin))  # where deepcopy keeps what must live until its end
    return twin


never_compile_alone(Recomputation._begin)
never_compile_alone(Recomputation._end)
never_compile_alone(Quiet.__call__)
