"""One model with and without recording: its outputs, gradients and buffers are bitwise equal, and nothing is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning

from .case import Built, Inputs, brief, quiet, seed_everything


@dataclass(frozen=True)
class Scenario:
    """One way to record a model."""

    name: str
    layers: str | None = "**"
    of: str | tuple[str, ...] = "output"
    training: bool = False
    batches: tuple[int, ...] = (2,)
    compiled: bool = False


EAGER = (
    Scenario("all"),
    Scenario("all, train", training=True),
    Scenario("default", layers=None),
    Scenario("input", of="input"),
    Scenario("gradient", of="gradient", training=True),
    Scenario("several", of=("output", "input", "gradient")),
    Scenario("batches", batches=(2, 3, 2)),
)
COMPILED = (
    Scenario("all", compiled=True),
    Scenario("default", layers=None, compiled=True),
    Scenario("gradient", of="gradient", compiled=True),
)
QUICK = tuple(scenario for scenario in EAGER if scenario.name in ("all", "default"))
MODES = {"eager": EAGER, "compiled": COMPILED, "quick": QUICK}


@dataclass
class Outcome:
    """What came of one scenario: "ok", "failed" or "skipped", and why."""

    status: str
    reason: str = ""
    layers: int = 0  # that were recorded
    unsure: int = 0  # whose feature dimension is said to be unsure
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


# -- running a model -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Everything that a step leaves in its outputs, gradients and buffers."""

    tensors: dict[str, Tensor]
    differentiable: bool


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors in a structured output, in order."""
    return [x for x in tensors_in(value) if x.is_floating_point() or x.is_complex()]


def tensors_in(value: Any, depth: int = 0) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if depth > 8:
        return []
    if isinstance(value, Mapping):
        parts: Sequence[Any] = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    else:
        return []
    return [x for part in parts for x in tensors_in(part, depth + 1)]


class Stepper:
    """Runs a model from the same state each time."""

    def __init__(self, built: Built) -> None:
        self.model = built.model
        self.inputs = built.inputs
        self.backward = True  # until it fails
        self.saved = {name: tensor.detach().clone() for name, tensor in self._state()}

    def _state(self) -> list[tuple[str, Tensor]]:
        return [(name, x) for name, x in self.model.named_buffers() if x is not None and not x.is_meta]

    def __call__(self, call: Callable[..., Any], batches: Sequence[int] = (2,), training: bool = False) -> Run:
        """One forward for each batch size, then one backward, with equal random numbers."""
        self.restore()
        self.model.train(True).train(training)  # models that cache something in eval mode forget it in train mode
        self.model.zero_grad(set_to_none=True)
        seed_everything(1)
        found: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for index, batch in enumerate(batches):
            args, kwargs = self.inputs(batch)
            output = call(*args, **kwargs)
            outputs = floats(output)
            losses += [x.abs().sum().float() if x.is_complex() else x.float().sum() for x in outputs if x.requires_grad]
            found.update({f"output {i} of batch {index}": x.detach().clone() for i, x in enumerate(tensors_in(output))})
        differentiable = bool(losses) and self.backward
        if differentiable:
            torch.stack(losses).sum().backward()
        found.update({f"gradient of {name}": p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        found.update({f"buffer {name}": x.clone() for name, x in self._state()})
        self.model.zero_grad(set_to_none=True)
        return Run(found, differentiable)

    def restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self._state():
                saved = self.saved.get(name)
                if saved is not None and saved.shape == tensor.shape:
                    tensor.copy_(saved)


def differences(a: Run, b: Run) -> list[str]:
    """The names of what is not bitwise equal."""
    names = [name for name in a.tensors if name not in b.tensors] + [name for name in b.tensors if name not in a.tensors]
    return names + [name for name, x in a.tensors.items() if name in b.tensors and not same(x, b.tensors[name])]


def same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.is_nested or a.is_sparse:
        return len(a.shape) == len(b.shape)
    if a.is_floating_point() or a.is_complex():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return bool(torch.equal(a, b))


def relative(a: Run, b: Run, name: str) -> float:
    """The largest difference, relative to the largest number; infinite if they cannot be compared."""
    if name not in a.tensors or name not in b.tensors or a.tensors[name].shape != b.tensors[name].shape:
        return math.inf
    x, y = a.tensors[name].detach(), b.tensors[name].detach()
    if x.is_complex() or not x.numel():
        return math.inf
    x, y = x.double(), y.double()
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-300))


# -- what is left behind ---------------------------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict[str, Any]:
    """Where a recorder could leave something: classes, attributes and hooks of modules, hooks of parameters, global hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"class of {name!r}"] = type(module)
        for key, value in vars(module).items():
            kept = isinstance(value, Mapping) and ("hook" in key or key in ("_buffers", "_parameters", "_modules"))
            hooks = tuple(map(repr, value)) if kept else None
            found[f"{key} of {name!r}"] = hooks
    for name, p in model.named_parameters():
        found[f"hooks of parameter {name}"] = (_keys(p._backward_hooks), _keys(getattr(p, "_post_accumulate_grad_hooks", None)))
    for key, value in vars(torch.nn.modules.module).items():
        if key.startswith("_global") and isinstance(value, Mapping):
            found[key] = _keys(value)
    return found


def _keys(hooks: Mapping[Any, Any] | None) -> tuple[str, ...]:
    return tuple(map(repr, hooks or ()))


def left_behind(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is new, gone or changed."""
    return sorted(key for key in {*before, *after} if before.get(key, "absent") != after.get(key, "absent"))


# -- the check -------------------------------------------------------------------------------------------------------------


class Checker:
    """All scenarios of one model. The plain runs that they are compared with are made once."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.step = Stepper(built)
        self.plain: dict[Any, Run] = {}
        with quiet():
            try:
                self.step(built.model)
            except TimeoutError:
                raise
            except Exception:
                self.step.backward = False  # a model for inference: an error in its forward comes again
                self.step(built.model)

    def run(self, scenario: Scenario) -> Outcome:
        start = time.perf_counter()
        try:
            outcome = self._run(scenario)
        except Unfit as reason:
            outcome = Outcome("skipped", str(reason))
        outcome.seconds = round(time.perf_counter() - start, 2)
        return outcome

    def _run(self, scenario: Scenario) -> Outcome:
        model = self.built.model
        if scenario.training and not self.built.trains:
            raise Unfit("does not run in train mode")
        if len(scenario.batches) > 1 and not self.built.batched:
            raise Unfit("its inputs have one batch size")
        plain = self._plain(scenario)
        if "gradient" in scenario.of and not plain.differentiable:
            raise Unfit("its outputs have no gradient")
        before = traces(model)
        layers, unsure, caught = 0, 0, []
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                recorder = recorder_of(model, scenario)
                with recorder:
                    recorded = self.step(self._callable(scenario), scenario.batches, scenario.training)
                rows = recorder.rows()
                layers, unsure = len(rows), sum(row.get("feature_dim_by") == "unsure" for row in rows)
            except Unfit:
                raise
            except TimeoutError:
                raise
            except Exception as error:
                return Outcome("failed", f"raised {brief(error)}")
            finally:
                left = left_behind(before, traces(model))
            caught = [str(w.message)[:500] for w in heard if issubclass(w.category, RecordingWarning)]
        outcome = Outcome("ok", "", layers, unsure, caught)
        taken = [row["layer"] for row in rows if row["layer"].split(":")[0] in self.built.featureless and row["features"] is not None]
        if left:
            outcome.status, outcome.reason = "failed", f"left behind: {', '.join(left[:5])}"
        elif taken and len(scenario.batches) > 1:
            outcome.status, outcome.reason = "failed", f"taken for features: {', '.join(map(repr, taken))}"
        elif changed := differences(plain, recorded):
            again = self._step_plain(scenario)
            if differences(plain, again):
                outcome.reason = "not compared: two plain runs differ"
            elif scenario.compiled and not differences(recorded, self._step_hooked(scenario)):
                outcome.reason = "not compared: the compiler gives these bits with any hooks"
            else:
                worst = max(relative(plain, recorded, name) for name in changed)
                outcome.status = "failed"
                outcome.reason = f"changed: {', '.join(changed[:5])} ({len(changed)} in all, by up to {worst:.0e})"
        return outcome

    def _callable(self, scenario: Scenario) -> Callable[..., Any]:
        if not scenario.compiled:
            return self.built.model
        torch._dynamo.reset()
        return torch.compile(self.built.model, backend="aot_eager")

    def _plain(self, scenario: Scenario) -> Run:
        key = (scenario.batches, scenario.training, scenario.compiled)
        if key not in self.plain:
            self.plain[key] = self._step_plain(scenario)
        return self.plain[key]

    def _step_hooked(self, scenario: Scenario) -> Run:
        """With hooks that do nothing on every module."""
        handles = [module.register_forward_hook(_nothing) for module in self.built.model.modules()]
        try:
            return self._step_plain(scenario)
        finally:
            for handle in handles:
                handle.remove()

    def _step_plain(self, scenario: Scenario) -> Run:
        with quiet():
            try:
                return self.step(self._callable(scenario), scenario.batches, scenario.training)
            except TimeoutError:
                raise
            except Exception as error:
                raise Unfit(f"the plain model does not run so: {brief(error)}") from error


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    return None


class Unfit(Exception):
    """A scenario that the model itself, or this version of the recorder, does not know."""


def recorder_of(model: nn.Module, scenario: Scenario) -> torchprobe.Recorder:
    try:
        return torchprobe.record(model, scenario.layers, of=scenario.of)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        if isinstance(scenario.of, tuple):
            raise Unfit(f"record(of={scenario.of}) is not known here: {brief(error)}") from error
        raise


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["MODES", "Checker", "Inputs", "Outcome", "Scenario", "floats", "one_thread", "tensors_in"]
