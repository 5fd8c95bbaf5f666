"""No hook outlives its recording, whatever happens to the modules meanwhile; and hooks of others stay."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMPILER_WARNINGS, Calls, X, hooks_on, mlp, told
from processes import python
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import FEATURES, State, Statistic

KINDS = ("output", "input", "gradient", "weight", "weight_gradient")
every_kind = pytest.mark.parametrize("of", [*KINDS, KINDS])
quantized = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def tensor_hooks(model: nn.Module) -> int:
    return sum(len(p._backward_hooks or ()) for p in model.parameters())


def step(model: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    out = model(x)
    out.square().sum().backward()
    return out.detach()


def counts(rec: torchprobe.Recording) -> dict[str, int]:
    return {layer: rec[layer].calls for layer in rec}


def assert_untouched(model: nn.Module, rec: torchprobe.Recorder, x: Tensor = X) -> None:
    """The model works, twice; nothing counts; and no hook of ours is left after that."""
    before = counts(rec)
    for _ in range(2):
        model(x)
    assert counts(rec) == before
    assert hooks_on(model) == tensor_hooks(model) == 0


# -- starting and stopping -------------------------------------------------------------------------------------------------------


@every_kind
def test_stop_leaves_nothing(of: Any) -> None:
    model = mlp()
    rec = torchprobe.record(model, "*", of=of)
    for steps in (0, 1, 2, 3):
        with told():
            rec.start()
            assert hooks_on(model) + tensor_hooks(model) > 0
            for _ in range(steps):
                step(model)
            rec.stop()
        assert_untouched(model, rec)


@every_kind
def test_no_hook_is_left_when_one_cannot_be_placed(of: Any) -> None:
    class Refuses(nn.Linear):
        def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("not here")

        register_forward_pre_hook = register_forward_hook  # type: ignore[assignment]

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), Refuses(6, 6))
    rec = torchprobe.record(model, "*", of=of)
    with pytest.raises(RuntimeError, match="not here"):
        rec.start()
    assert hooks_on(model) == tensor_hooks(model) == 0
    model(X)


@every_kind
def test_a_recorder_that_is_deleted_removes_its_hooks(of: Any) -> None:
    """As when the cell of a notebook is run again."""
    model = mlp()
    for _ in range(2):
        rec = torchprobe.record(model, "**", of=of).start()
        step(model)
    assert all(counts(rec)[layer] == 1 for layer in rec)
    del rec
    gc.collect()
    assert hooks_on(model) == tensor_hooks(model) == 0
    model(X)


class TotalWhileStopped(Statistic):
    states = {"total": State((FEATURES,))}
    fields = {"sum": "sum of all values"}

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.total += x.sum(0)

    def summarize(self, states: Any) -> dict[str, Tensor]:
        return {"sum": states["total"].sum(-1)}


@pytest.mark.parametrize("ran", [False, True])
def test_a_recorder_that_its_own_functions_refer_to_is_freed(ran: bool) -> None:
    """In a notebook, and in every function, a ``select`` or a statistic sees the variables around it."""
    model = mlp()

    def use() -> weakref.ref[torchprobe.Recorder]:
        names: dict[str, Any] = {}

        def select(out: Tensor) -> Tensor:
            assert names
            return out

        class Mine(TotalWhileStopped):
            around = names

        names["rec"] = torchprobe.record(model, "*", select=select, statistic=Mine)
        if ran:
            with names["rec"]:
                model(X)
        return weakref.ref(names["rec"])

    gone = use()
    gc.collect()
    assert gone() is None
    assert hooks_on(model) == 0


def test_a_model_that_is_deleted_while_it_is_recorded() -> None:
    model = mlp()
    rec = torchprobe.record(model, "**").start()
    model(X)
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None
    rec.stop()
    assert rec["0"].vectors == 5


# -- modules that are replaced -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fired", [False, True])
@every_kind
def test_a_layer_that_is_replaced(of: Any, fired: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    rec = torchprobe.record(model, ["0", "2"], of=of).start()
    if fired:
        step(model)
    model[0] = nn.Linear(6, 6)
    gc.collect()
    step(model)
    with told() as texts:
        rec.stop()
    assert_untouched(model, rec)
    mine = {layer: calls for layer, calls in counts(rec).items() if layer.startswith("2")}
    assert set(mine.values()) == {2 if fired else 1}
    if fired:
        assert texts == []
        assert {calls for layer, calls in counts(rec).items() if layer.startswith("0")} == {1}
    else:
        assert "'0" in texts[0]
        assert "its module was replaced or deleted while the model was recorded; record again" in texts[0]
        assert "'2" not in texts[0]


def test_layers_beside_one_that_was_replaced_are_read() -> None:
    """The dimension of an activation function follows from the layer before it, which is not there any more."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    rec = torchprobe.record(model, "**").start()
    model[0] = nn.Linear(6, 6)
    gc.collect()
    out = model(X)
    with told() as texts:
        rec.stop()
    assert counts(rec) == {"1": 1, "2": 1, "": 1}
    assert torch.equal(rec["2"].max, out.detach().double().amax(0))
    (text,) = texts
    assert text.splitlines()[1:] == ["  '0': its module was replaced or deleted while the model was recorded; record again"]
    with torchprobe.record(model, "**") as again:
        model(X)
    assert counts(again) == {"0": 1, "1": 1, "2": 1, "": 1}


def test_a_layer_that_moves_into_another_model() -> None:
    """Its hooks come along, and remove themselves there once the recording is over."""
    model = mlp(2)
    rec = torchprobe.record(model, "**").start()
    model(X)
    other = nn.Sequential(nn.Identity(), model[0])
    model[0] = nn.Linear(6, 6)
    with told():
        rec.stop()
    before = counts(rec)
    other(X)
    other(X)
    assert counts(rec) == before
    assert hooks_on(other) == hooks_on(model) == 0


@every_kind
def test_hooks_that_were_moved_to_another_module_remove_themselves(of: Any) -> None:
    """As fusing and quantizing do it: they register the hooks of one module on another."""
    model = mlp(2)
    rec = torchprobe.record(model, "*", of=of).start()
    twin = nn.Linear(6, 6)
    for hook in model[0]._forward_hooks.values():
        twin.register_forward_hook(hook)
    for hook in model[0]._forward_pre_hooks.values():
        twin.register_forward_pre_hook(hook)
    model[0] = twin
    with told():
        step(model)
        step(model)
        rec.stop()
    assert_untouched(model, rec)


# -- quantization ------------------------------------------------------------------------------------------------------------------


@quantized
@every_kind
def test_fused_layers(of: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    rec = torchprobe.record(model, ["1", "2"] if of == "output" else "*", of=of).start()
    expected = step(model, x)
    torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]], inplace=True)
    torch.testing.assert_close(model(x).detach(), expected)
    rec.stop()
    assert_untouched(model, rec, x)


@quantized
@pytest.mark.parametrize("layers", [None, "**", "*"])
@pytest.mark.parametrize("how", ["prepare", "prepare_qat"])
def test_prepared_and_converted_layers(how: str, layers: Any) -> None:
    tools = torch.ao.quantization
    model = nn.Sequential(tools.QuantStub(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), tools.DeQuantStub())
    model.train(how == "prepare_qat")
    model.qconfig = (tools.get_default_qat_qconfig if how == "prepare_qat" else tools.get_default_qconfig)("fbgemm")
    rec = torchprobe.record(model, layers).start()
    model(X)
    getattr(tools, how)(model, inplace=True)
    model(X)
    tools.convert(model.eval(), inplace=True)
    model(X)
    rec.stop()
    ours = lambda: [  # noqa: E731
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if type(hook).__module__.startswith("torchprobe")
    ]
    before = counts(rec)
    model(X)
    model(X)
    assert counts(rec) == before
    assert ours() == []


@quantized
def test_dynamically_quantized_layers() -> None:
    model = mlp(2).eval()
    rec = torchprobe.record(model, "**").start()
    model(X)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    model(X)
    rec.stop()
    assert_untouched(model, rec)


# -- copies ------------------------------------------------------------------------------------------------------------------------


@every_kind
def test_copies_carry_no_hooks(of: Any) -> None:
    model = mlp()
    own = model[0].register_forward_hook(lambda *args: None)
    rec = torchprobe.record(model, "**" if of in KINDS[:3] else "*", of=of)
    with told(), rec:
        twins = [copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module, copy.deepcopy({"a": [model]})["a"][0]]
        step(model)
        twins += [copy.deepcopy(model), copy.deepcopy(nn.ModuleList([model, model]))[1]]
        for twin in twins:
            assert len(twin[0]._forward_hooks) == 1  # that of the user
            twin[0]._forward_hooks.clear()
            assert hooks_on(twin) == tensor_hooks(twin) == 0
            step(twin)
    assert set(counts(rec).values()) == {1}
    own.remove()
    assert hooks_on(model) == tensor_hooks(model) == 0
    with torchprobe.record(twins[0], "0") as again:
        twins[0](X)
    assert again["0"].calls == 1


def test_a_copied_module_keeps_the_hooks_of_others_in_their_order() -> None:
    model, seen = mlp(1), []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    with torchprobe.record(model, "**"):
        model[0].register_forward_hook(lambda *args: seen.append(2))
        twin = copy.deepcopy(model)
        twin(X)
        seen_by_the_twin, seen[:] = list(seen), []
        model(X)
    assert seen_by_the_twin == seen == [1, 2]
    assert len(twin[0]._forward_hooks) == 2


def test_a_pickle_of_a_recorded_model_needs_no_torchprobe(tmp_path: Path) -> None:
    model = mlp()
    with torchprobe.record(model, "**", of=("output", "input", "gradient")):
        expected = float(step(model).double().sum())
        torch.save(model, tmp_path / "model.pt")
        (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    torch.save(X, tmp_path / "x.pt")
    code = f"""
import pickle, sys, torch
sys.modules["torchprobe"] = None
x = torch.load({str(tmp_path / "x.pt")!r})
for model in (torch.load({str(tmp_path / "model.pt")!r}, weights_only=False), pickle.load(open({str(tmp_path / "model.pickle")!r}, "rb"))):
    out = model(x)
    out.sum().backward()
    print(float(out.detach().double().sum()))
"""
    first, second = python(code).stdout.split()
    assert float(first) == float(second) == pytest.approx(expected, rel=1e-5)


def test_a_pickle_counts_nothing_and_can_be_cleaned() -> None:
    model = mlp()
    with torchprobe.record(model, "**", of=("output", "gradient")) as rec:
        step(model)
        twin = pickle.loads(pickle.dumps(model))
        step(twin)
    assert set(counts(rec).values()) == {1}
    torchprobe.detach_all(twin)
    assert hooks_on(twin) == 0
    with torchprobe.record(twin, "**") as again:
        twin(X)
    assert set(counts(again).values()) == {1}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_scripting_of_a_recorded_model_and_of_copies() -> None:
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torchprobe.record(model, "**"):
        model(X)
        late, twin = torch.optim.swa_utils.AveragedModel(model), copy.deepcopy(model)
        with pytest.raises(Exception, match="torch.jit.script cannot compile its hooks: stop the recording first, or call"):
            torch.jit.script(model)
        for other in (average.module, late.module, twin):
            torch.testing.assert_close(torch.jit.script(other)(X), model(X))
    for other in (model, average.module, late.module, twin):
        torch.testing.assert_close(torch.jit.script(other)(X), model(X))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    assert b"torchprobe" not in buffer.getvalue()


@COMPILER_WARNINGS
@pytest.mark.parametrize("strict", [False, True])
@every_kind
def test_exported_models_hold_nothing_of_ours(of: Any, strict: bool) -> None:
    model = mlp(1)
    with told(), torchprobe.record(model, "0", of=of) as rec:
        program = torch.export.export(model, (X,), strict=strict)
        step(model)
        again = torch.export.export(model, (X,), strict=strict)
    for exported in (program, again):
        assert not any("torchprobe" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(exported.module()(X), model(X))
    assert set(counts(rec).values()) == {1}
    assert hooks_on(model) == 0


# -- detach_all --------------------------------------------------------------------------------------------------------------------


@every_kind
def test_detach_all_stops_every_recorder(of: Any) -> None:
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    model[0].register_forward_pre_hook(lambda *args: seen.append(2))
    model[0].weight.register_hook(lambda grad: seen.append(3))
    recorders = [torchprobe.record(model, "*", of=of).start(), torchprobe.record(model[0], "", of=of).start()]
    step(model)
    seen.clear()
    assert torchprobe.detach_all(model) > 0
    assert torchprobe.detach_all(model) == 0
    assert hooks_on(model) == 2
    assert tensor_hooks(model) == 1
    before = [counts(rec) for rec in recorders]
    step(model)
    assert sorted(seen) == [1, 2, 3]
    assert [counts(rec) for rec in recorders] == before
    assert {calls for found in before for calls in found.values()} == {1}
    for rec in recorders:
        rec.stop()  # without a report, and without an error
    with told(), recorders[0]:
        step(model)
    assert max(counts(recorders[0]).values()) == 2


def test_detach_all_leaves_other_models_alone() -> None:
    one, other = mlp(), mlp()
    first, second = torchprobe.record(one, "**").start(), torchprobe.record(other, "**").start()
    torchprobe.detach_all(one)
    one(X)
    other(X)
    second.stop()
    assert first.layers == []
    assert counts(second)["0"] == 1
    with pytest.raises(TypeError, match="detach_all takes a torch.nn.Module, got list"):
        torchprobe.detach_all([one])  # type: ignore[arg-type]


def test_detach_all_of_a_part_of_a_recorded_model() -> None:
    model = nn.Sequential(mlp(1), mlp(1))
    rec = torchprobe.record(model, "**").start()
    model(X)
    torchprobe.detach_all(model[0])
    model(X)
    assert hooks_on(model[0]) == 0
    rec.stop()
    assert_untouched(model, rec)
    assert counts(rec)["0.0"] == 1


def test_detach_all_finds_hooks_of_recorders_that_are_gone() -> None:
    model = mlp()
    twin = nn.Linear(6, 6)
    rec = torchprobe.record(model, "**").start()
    for hook in model[0]._forward_hooks.values():
        twin.register_forward_hook(hook)
    with told():
        rec.stop()
    del rec
    gc.collect()
    torchprobe.detach_all(twin)
    assert hooks_on(twin) == 0


@COMPILER_WARNINGS
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_detach_all_of_a_compiled_model(how: str) -> None:
    model = Calls(lambda self, x: self.inner(x), inner=mlp(1))
    if how == "wrapped":
        model.inner = torch.compile(model.inner, backend="eager")
    else:
        model.inner.compile(backend="eager")
    own = model.inner.__dict__.get("_compiled_call_impl")
    rec = torchprobe.record(model, "inner.**").start()
    expected = model(X)
    torchprobe.detach_all(model)
    assert hooks_on(model) == 0
    assert model.inner.__dict__.get("_compiled_call_impl") is own
    before = counts(rec)
    torch.testing.assert_close(model(X), expected)
    model(X)
    assert counts(rec) == before
    assert set(before.values()) == {1}


def test_a_hook_of_the_user_that_was_registered_meanwhile_stays() -> None:
    model, seen = mlp(1), []
    rec = torchprobe.record(model, "**").start()
    handle = model[0].register_forward_hook(lambda module, args, out: (seen.append(1), out + 1)[1])
    expected = torch.tanh(nn.functional.linear(X, model[0].weight, model[0].bias) + 1)
    torch.testing.assert_close(model(X), expected)
    rec.stop()
    assert hooks_on(model) == 1
    torch.testing.assert_close(model(X), expected)
    assert len(seen) == 2
    handle.remove()
    assert hooks_on(model) == 0
