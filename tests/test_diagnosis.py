"""The causes of layers that never fired."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import COMPILER_WARNINGS, Calls, X, mlp, report
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import compiled


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def test_nothing_was_run() -> None:
    assert report(torchprobe.record(mlp())).endswith("none of the 7 layers fired: the model was not called while it was recorded")


def test_no_report_on_top_of_an_exception() -> None:
    model = mlp()
    with pytest.raises(KeyError), torchprobe.record(model):  # a warning would be an error here
        raise KeyError("something else")


def test_nothing_to_report_when_everything_fired() -> None:
    model = mlp()
    with torchprobe.record(model, "**"):
        model(X)


def test_a_layer_that_the_forward_does_not_call() -> None:
    model = Calls(lambda self, x: nn.functional.linear(x, self.b.weight) + self.a(x), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    text = report(torchprobe.record(model, ["a", "b"]), lambda: model(X))
    assert "'b': the forward does not call it (its parameters may be used without it)" in text


def test_the_model_was_entered_by_another_method() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = mlp()

        def encode_image(self, x: Tensor) -> Tensor:
            return self.visual(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x)

    model = Clip()
    text = report(torchprobe.record(model), lambda: model.encode_image(X))
    assert "'': the model was entered through another method than forward; its layers are recorded nevertheless" in text
    assert text.startswith("torchprobe: 1 of 7 layers")


def test_a_forward_that_raised() -> None:
    def fail(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(2, 2))

    model = Calls(fail, a=nn.Linear(6, 6), b=nn.Linear(6, 6))

    def run() -> None:
        with pytest.raises(RuntimeError):
            model(X)

    text = report(torchprobe.record(model, ["a", "b"]), run)
    assert "'b': the forward raised an error before it was reached" in text
    assert "'a'" not in text


def test_only_the_other_mode() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", when="eval"), lambda: model(X))
    assert 'when="eval", but it was only called in train mode; call model.eval()' in text
    model.eval()
    text = report(torchprobe.record(model, "0", when="train"), lambda: model(X))
    assert 'when="train", but it was only called in eval mode; call model.train()' in text


def test_only_while_paused() -> None:
    model = mlp()
    recorder = torchprobe.record(model, "0")

    def run() -> None:
        with recorder.paused():
            model(X)

    assert "it was only called while the recorder was paused" in report(recorder, run)


def test_no_backward_no_gradient() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", of="gradient"), lambda: model(X))
    assert "no gradient reached it: backward was not called" in text


def test_a_forward_without_gradients() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", of="gradient"), lambda: torch.no_grad()(model)(X))
    assert "it was called without gradients" in text


def test_only_empty_batches() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0"), lambda: [model(X[:0]) for _ in range(3)])
    assert "its 3 calls had empty batches, or batches that the mask leaves out" in text


def test_every_read_the_wrong_calls() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", every=4), lambda: [model(X[:n]) for n in (0, 5, 5, 5, 0, 5)])
    assert "every=4 read 2 of its 6 calls, which had empty batches" in text


def test_no_tensor_in_a_layer_selected_by_default() -> None:
    model = Calls(lambda self, x: str(self.blocks[0](x)), blocks=mlp())
    text = report(torchprobe.record(model), lambda: model(X))
    assert "'': it holds no floating-point tensor with features; pick one with select=" in text


def test_no_patch_tokens_in_a_layer_selected_by_default() -> None:
    model = Calls(lambda self, x: self.blocks(x)[:, 0], blocks=mlp())
    text = report(torchprobe.record(model, positions="patch"), lambda: model(X[None]))
    assert "'': it has one vector per input, but positions=\"patch\" needs tokens" in text


def test_called_in_backward_only() -> None:
    model = mlp()
    x = X.clone().requires_grad_()
    y = x * 2
    y.register_hook(lambda grad: model(grad))
    text = report(torchprobe.record(model, "0"), lambda: y.sum().backward())
    assert "it was only called during backward, which counts as the recomputation of an activation checkpoint" in text


@COMPILER_WARNINGS
def test_a_compiled_graph_that_ran_before_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls(lambda self, x: self.inner(x), inner=mlp())
    fast = torch.compile(model, backend="eager")
    fast(X)
    monkeypatch.setattr(compiled, "drop_graphs", lambda classes: 0)  # as if the compiler had hidden it
    text = report(torchprobe.record(fast, "inner.*"), lambda: fast(X))
    names = ", ".join(f"'inner.{i}'" for i in range(6))
    assert f"  {names}: it runs inside a compiled graph that was created before the hooks; call torch.compiler.reset()" in text
    assert len(text.splitlines()) == 2


@COMPILER_WARNINGS
def test_a_compiled_graph_that_was_not_run_to_its_end() -> None:
    def fail(gm: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise RuntimeError("out of luck")

        return run

    model = Calls(lambda self, x: self.inner(x), inner=mlp())
    fast = torch.compile(model, backend=fail)

    def run() -> None:
        with pytest.raises(RuntimeError, match="out of luck"):
            fast(X)

    assert "it is part of a compiled graph that was created, but did not run to its end" in report(torchprobe.record(fast, "inner.0"), run)


# -- causes that were told wrongly ---------------------------------------------------------------------------------------------


def test_a_forward_that_is_called_directly() -> None:
    model = mlp()
    text = report(torchprobe.record(model, ["", "0"]), lambda: model.forward(X))
    assert "'': the model was entered through another method than forward" in text
    block = Calls(lambda self, x: self.inner.forward(x), inner=mlp())
    text = report(torchprobe.record(block, ["inner", "inner.0"]), lambda: block(X))
    assert "'inner': its forward was called directly; only model(x) runs hooks, and model.forward(x) does not" in text


def test_a_recorder_that_was_reset() -> None:
    model = mlp()
    recorder = torchprobe.record(model, "0")

    def run() -> None:
        model(X)
        recorder.reset()

    assert "'0': nothing was recorded after its state was loaded or reset" in report(recorder, run)


def test_names_of_fabric() -> None:
    class Fabric(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._forward_module = module

        def forward(self, x: Tensor) -> Tensor:
            return self._forward_module(x)  # type: ignore[no-any-return]

    model = Fabric(mlp())
    with torchprobe.record(model, "**") as rec:
        model(X)
    assert rec._bank.names() == ["", *(str(i) for i in range(6))]


@pytest.mark.parametrize("gone", ["_FrameAction", "_FrameExecStrategy", "set_code_exec_strategy", "reset_code"])
def test_a_pytorch_without_the_private_names_of_dynamo(gone: str) -> None:
    """``import torchprobe`` works, and so does eager recording; a compiled model is warned about."""
    program = f"""
import warnings, torch
name = torch._C._dynamo.eval_frame.{gone}
del torch._C._dynamo.eval_frame.{gone}
import torchprobe
torch._C._dynamo.eval_frame.{gone} = name  # the compiler itself needs it
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
with torchprobe.record(model, "**", on_error="raise") as rec:
    model(torch.randn(5, 3))
assert rec["0"].vectors == 5 and rec[""].vectors == 5
compiled = torch.compile(model, backend="eager")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torchprobe.record(compiled, "**").start().stop()
assert any("has changed inside" in str(w.message) for w in caught), caught
"""
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stderr
