"""Who went bad first: the guard names the layer, the call, the rows, and whether it came in or was made there."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_models import Net, Told, batch, nan_in_row, poison_gradient, train
from models import COMPILER_WARNINGS, Calls, assert_equal, hooks_on
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchprobe
from torchprobe.integrations import Monitor
from torchprobe.recording import NonfiniteError, NonfiniteWarning, read_flight
from torchprobe.recording.nonfinite import facts, suspicious
from torchprobe.recording.verdicts import Report

pytestmark = COMPILER_WARNINGS


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


LAYERS = ["blocks.*", "head"]
CALLS: dict[str, Callable[[Net], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "inductor": lambda model: torch.compile(model, fullgraph=True),
    "checkpointed": lambda model: _checkpointed(model, use_reentrant=False),
    "checkpointed, reentrant": lambda model: _checkpointed(model, use_reentrant=True),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16)(model),
}


def _checkpointed(model: Net, use_reentrant: bool) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.head(x)

    return call


WAYS = [pytest.param(way, marks=pytest.mark.slow("compiles with inductor")) if way == "inductor" else way for way in CALLS]


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_made_in_a_block(way: str) -> None:
    model, told = Net(), Told()

    def at(step: int) -> None:
        model.blocks[2].plant = nan_in_row(4) if step == 3 else None

    with torchprobe.record(model, LAYERS) as rec:
        guard = rec.guard(on=told)
        train(model, CALLS[way](model), rec, 5, at)
    (report,) = told.reports
    first = report.first
    assert (first.layer, first.module, first.kind, first.verdict) == ("blocks.2", "Block", "activation", "made here")
    assert (first.step, first.call, first.rank, first.training, first.after) == (3, 3, 0, True, "blocks.1")
    assert first.rows == (4,) and first.outputs[0].bad_rows == 1 and first.outputs[0].nan == 24
    assert [found.name for found in first.inputs] == ["x"] and not first.inputs[0].nonfinite
    assert {found.name for found in first.parameters} == {f"{m}.{p}" for m in ("norm", "up", "down") for p in ("weight", "bias")}
    assert [event.layer for event in report.events] == ["blocks.2", "blocks.3", "head"]
    assert [event.verdict for event in report.events] == ["made here", "came in", "came in"]
    assert guard.reports == [report] and "made here" in str(report) and "4" in str(report)
    assert report.to_dict()["events"][0]["layer"] == "blocks.2"


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_made_in_a_block(way: str) -> None:
    """The gradient is finite at the output of block 2, and nonfinite at that of block 1."""
    model, told = Net(), Told()

    def at(step: int) -> None:
        model.blocks[2].plant = poison_gradient if step == 1 else None

    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        train(model, CALLS[way](model), rec, 2, at)
    (report,) = told.reports
    # The bias of `up` is inside of block 2, and its gradient arrives before that of the output of block 1.
    assert report.first.layer in (("blocks.1",) if way in ("compiled", "inductor") else ("blocks.2.up",))
    assert report.first.step == 1 and report.first.outputs[0].nonfinite > 0
    (output,) = (event for event in report.events if event.kind == "gradient" and event.layer == "blocks.1")
    assert output.verdict == "came in" and output.rows == (2,) and output.call == 1
    if way == "eager":
        assert report.first.kind == "parameter gradient" and report.first.name == "bias" and "'blocks.2'" not in str(report.first.layer)
        assert report.first.after == "parameter 'bias' of 'blocks.2.down'"


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_bad_batch(way: str) -> None:
    model, told = Net(), Told()
    broken = batch(7)
    broken[5, 1, 3] = math.nan
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        train(model, CALLS[way](model), rec, 3, data=lambda step: broken if step == 2 else batch(step))
    first = told.reports[0].first
    assert (first.layer, first.verdict, first.step, first.rows) == ("blocks.0", "came in", 2, (5,))
    assert "it is in the batch" in first.because and first.inputs[0].nan == 1


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_weight(way: str) -> None:
    model, told = Net(), Told()

    def at(step: int) -> None:
        if step == 1:
            model.blocks[1].up.weight.data[3, 2] = math.inf

    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        train(model, CALLS[way](model), rec, 2, at)
    first = told.reports[0].first
    assert (first.layer, first.verdict) == ("blocks.1", "made here")
    (broken,) = (found for found in first.parameters if found.nonfinite)
    assert (broken.name, broken.inf, broken.rows) == ("up.weight", 1, (3,)) and "'up.weight' was nonfinite" in first.because


def test_every_module_names_the_very_one() -> None:
    """Also what is made between modules: the division runs in the block, after `up`, and `down` gets it."""
    model, told = Net(), Told()
    model.blocks[2].plant = nan_in_row(0)
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard("**", on=told)
        model(batch(0))
    first = told.reports[0].first
    assert (first.layer, first.verdict, first.after) == ("blocks.2.down", "came in", "blocks.2.up")
    assert "made after 'blocks.2.up'" in first.because


def test_against_plain_hooks_at_random_places() -> None:
    """The first layer, call and rows are those that plain hooks see, which keep every output."""
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        model, told = Net(), Told()
        block, row, when = (int(torch.randint(n, (), generator=draw)) for n in (4, 6, 3))
        seen: list[tuple[str, int, list[int]]] = []
        calls: dict[str, int] = {}

        def keep(name: str, seen: Any = seen, calls: Any = calls) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                calls[name] = calls.get(name, -1) + 1
                rows = (~output.double().isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
                if rows:
                    seen.append((name, calls[name], rows))

            return hook

        for name, module in model.named_modules():
            if name != "blocks":
                module.register_forward_hook(keep(name))
        with torchprobe.record(model, "**") as rec:
            rec.guard(on=told)
            for step in range(3):
                model.blocks[block].plant = nan_in_row(row) if step == when else None
                model(batch(step))
                rec.step()
        first = told.reports[0].first
        assert (first.layer, first.call, list(first.rows)) == seen[0]


# -- telling -----------------------------------------------------------------------------------------------------------------


def test_raise_at_the_end_of_the_step() -> None:
    model = Net()
    model.blocks[0].plant = nan_in_row(1)
    with torchprobe.record(model, LAYERS, guard="raise") as rec:
        model(batch(0))  # nothing is raised in the forward
        with pytest.raises(NonfiniteError, match=r"layer 'blocks.0' \(Block\), made here") as caught:
            rec.step()
    assert caught.value.report.first.rows == (1,)
    assert hooks_on(model) == 0


def _once(model: nn.Module, guard: Any, error: type[Exception] | None = None) -> None:
    with torchprobe.record(model, LAYERS, guard=guard):
        model(batch(0)).sum().backward()
        if error is not None:
            raise error


def test_warn_at_the_end_and_at_a_snapshot() -> None:
    model = Net()
    model.blocks[0].plant = nan_in_row(1)
    with pytest.warns(NonfiniteWarning, match="'blocks.0'") as caught:
        _once(model, True)
    assert caught[0].filename == __file__
    with torchprobe.record(model, LAYERS, guard=True) as rec:
        model(batch(0))
        with pytest.warns(NonfiniteWarning, match="'blocks.0'") as caught:
            rec.snapshot(0)
        assert caught[0].filename == __file__
        model(batch(0))  # the same trouble is told once
        rec.snapshot(1)


def test_the_error_of_the_run_is_not_hidden() -> None:
    model = Net()
    model.blocks[0].plant = nan_in_row(1)
    with pytest.warns(NonfiniteWarning, match="'blocks.0'"), pytest.raises(ZeroDivisionError):
        _once(model, "raise", ZeroDivisionError)


def test_an_alarm_is_told_once_and_the_next_one_after_a_finite_step() -> None:
    model, told = Net(), Told()
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        for step in range(7):
            model.blocks[step % 4].plant = nan_in_row(0) if step in (1, 2, 5) else None
            model(batch(step))
            model.blocks[step % 4].plant = None
            rec.step()
    assert [(report.first.layer, report.first.step) for report in told.reports] == [("blocks.1", 1), ("blocks.1", 5)]


def test_a_report_on_request() -> None:
    model, told = Net(), Told()
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        assert rec.guard_report() is None
        model.blocks[3].plant = nan_in_row(2)
        model(batch(0))
        report = rec.guard_report()
        assert report is not None and report.first.layer == "blocks.3" and not told.reports
        rec.step()
    assert len(told.reports) == 1 and rec.guard_report() == told.reports[0]


def test_arguments() -> None:
    model = Net()
    rec = torchprobe.record(model, LAYERS)
    with pytest.raises(ValueError, match='on= is "raise", "warn" or a function'):
        rec.guard(on="stop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has no layer 'blocks.9'"):
        rec.guard("blocks.9")
    with pytest.raises(ValueError, match="allow= takes 'nan', 'inf', '-inf'; got 'big'"):
        rec.guard(allow="big")
    with pytest.raises(ValueError, match="allow: 'tail' is none of the guarded layers"):
        rec.guard(allow={"tail": "-inf"})
    with pytest.raises(ValueError, match="guard= is True, .*; got 'rais'; did you mean raise"):
        torchprobe.record(Net(), guard="rais")
    with pytest.raises(ValueError, match=r"guard= has no option 'layer'; did you mean layers\? It takes layers, exclude, "):
        torchprobe.record(Net(), guard={"layer": "head"})


# -- what is no alarm --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with an additive mask: its logits hold −inf, legitimately."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = Calls(lambda module, x, attn_mask: x @ x.mT + attn_mask)
        self.softmax = nn.Softmax(-1)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        return self.out(self.softmax(self.logits(x, attn_mask)) @ x)


def _causal(blocked: int | None = None) -> Tensor:
    mask = torch.full((3, 3), -math.inf).triu(1)
    if blocked is not None:
        mask[blocked] = -math.inf
    return mask


def test_masked_logits_are_allowed() -> None:
    model, told = Attention(), Told()
    with torchprobe.record(model, ["out"]) as rec:
        rec.guard("**", on=told, allow={"logits": "-inf"})
        model(batch(0), _causal()).sum().backward()
        rec.step()
        assert not told.reports
        model(batch(0), attn_mask=_causal(blocked=1))  # a row in which nothing is left gives nan
        rec.step()
    first = told.reports[0].first
    assert (first.layer, first.verdict) == ("softmax", "unsure") and "−inf and nothing else" in first.because
    with torchprobe.record(model, ["out"]) as rec:
        rec.guard([""], on=told)
        model(batch(0), attn_mask=_causal(blocked=1))
    first = told.reports[1].first
    assert (first.layer, first.verdict) == ("", "made here") and "a row of a mask that is −inf everywhere gives nan" in first.because
    with torchprobe.record(model, ["out"]) as rec:
        rec.guard("**", on=told)
        model(batch(0), _causal())
    assert told.reports[2].first.layer == "logits" and told.reports[2].first.outputs[0].minus_inf == 18


def test_large_finite_values_are_no_alarm() -> None:
    """Their sum overflows."""
    model, told = nn.Identity(), Told()
    with torchprobe.record(model, feature_dim=-1) as rec:
        rec.guard(on=told)
        for dtype, value in ((torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 65504.0), (torch.float64, 1.7e308)):
            x = torch.full((4, 6), value, dtype=dtype)
            assert not facts("x", x).nonfinite
            model(x)
        assert suspicious(torch.full((4, 6), 3e38))
    assert not told.reports


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_kind_of_value_in_every_type(dtype: torch.dtype, value: float) -> None:
    model, told = nn.Identity(), Told()
    x = torch.ones(5, 4, 3, dtype=dtype)[:, ::2]
    x[3, 1, 2] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torchprobe.RecordingWarning)
        with torchprobe.record(model, feature_dim=-1) as rec:
            rec.guard(on=told)
            model(x)
    found = told.reports[0].first.outputs[0]
    assert found.nonfinite == 1 and found.rows == (3,) and (found.low, found.high) == (0.0 if dtype.is_complex else 1.0, 1.0)
    assert (found.nan, found.inf, found.minus_inf) == (int(math.isnan(value)), int(value == math.inf), int(value == -math.inf))


def test_pauses_modes_and_frozen_layers() -> None:
    model, told = Net(), Told()
    model.blocks[0].requires_grad_(False)
    with torchprobe.record(model, LAYERS, when="train") as rec:
        rec.guard(on=told)
        model.blocks[1].plant = nan_in_row(0)
        with rec.paused():
            model(batch(0))
        rec.step()
        model.eval()
        model(batch(0))
        rec.step()
        assert not told.reports
        model.train()
        with torch.no_grad():
            model(batch(0))
        rec.step()
    assert told.reports[0].first.layer == "blocks.1"


@pytest.mark.parametrize("positions", ["all", "mean"])
def test_calls_that_the_recorder_skips_are_guarded(positions: str) -> None:
    model, told = Net(), Told()
    with torchprobe.record(model, LAYERS, every=10, positions=positions) as rec:
        rec.guard(on=told)
        for step in range(5):
            model.blocks[1].plant = nan_in_row(0) if step == 3 else None
            model(batch(step))
            rec.step()
    assert told.reports[0].first.step == 3


def test_structures_tied_layers_and_scalars() -> None:
    """A tuple, a layer that runs twice, and a loss."""
    shared = nn.Linear(8, 8)
    model = Calls(lambda m, x: {"loss": (m.shared(m.shared(x)) * math.inf).sum() * 0, "pair": (x, None)}, shared=shared)
    told = Told()
    with torchprobe.record(model, ["shared"]) as rec:
        rec.guard(["shared", ""], on=told)
        model(batch(0))
        rec.step()
    first = told.reports[0].first
    assert (first.layer, [(found.name, found.nan) for found in first.outputs]) == ("", [("loss", 1), ("pair.0", 0)])
    shared.weight.data.mul_(1e30)
    with torchprobe.record(model, ["shared"]) as rec:
        rec.guard(["shared"], on=told)
        model(batch(0) * 1e5)
        rec.step()
    assert (told.reports[1].first.layer, told.reports[1].first.call) == ("shared", 1)  # the second call overflows


# -- what it costs, and what it leaves ---------------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """How often an operation reads a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read += "_local_scalar_dense" in str(func) or "is_nonzero" in str(func) or "equal" in str(func)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host_while_all_is_well() -> None:
    model = Net()
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard("**")
        model(batch(0)).sum().backward()  # a first call finds out where the features are
        with Count() as counted:
            for step in range(3):
                model(batch(step)).sum().backward()
                rec.step()
    assert counted.read == 0


def test_numbers_do_not_change() -> None:
    model = Net()
    twin = copy.deepcopy(model)
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard("**")
        train(model, model, rec, 3)
    with torchprobe.record(twin, LAYERS) as plain:
        train(twin, twin, plain, 3)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert_equal(rec, plain)


def test_no_hook_is_left() -> None:
    model = Net()
    rec = torchprobe.record(model, LAYERS, guard={"layers": "**"}).start()
    assert torchprobe.detach_all(model) > 0
    assert hooks_on(model) == 0 and not any(parameter._backward_hooks for parameter in model.parameters())
    rec.start()
    model(batch(0)).sum().backward()
    rec.stop()
    assert hooks_on(model) == 0 and not any(parameter._backward_hooks for parameter in model.parameters())
    rec.guard()  # before the next start
    copy.deepcopy(model)(batch(0))


def test_what_cannot_be_guarded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = Net(), Told()

    def fails(x: Tensor) -> bool:
        raise RuntimeError("no such operation on this device")

    monkeypatch.setattr("torchprobe.recording.guard_hooks.suspicious", fails)
    with pytest.warns(NonfiniteWarning, match=r"not every call of these layers was guarded: 'blocks.0' \(RuntimeError: no such operation"):
        _once(model, told)  # the run goes on
    assert not told.reports


# -- what is said when there is little to say --------------------------------------------------------------------------------


def test_without_steps_none_is_claimed(tmp_path: Path) -> None:
    model, told = Net(), Told()
    model.blocks[1].plant = nan_in_row(2)
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told, dump=tmp_path)
        model(batch(0))
        model(batch(1))
    report = told.reports[0]
    assert report.first.step is None and report.to_dict()["events"][0]["step"] is None
    assert "steps were not counted (call rec.step() once a step), call 0 of the layer" in str(report) and "step 0" not in str(report)
    assert Report.of_ranks([report, report]).first == report.first
    assert Report.from_dict(read_flight(tmp_path / "nonfinite-rank0.safetensors")[0]["report"]).first.step is None
    assert "steps were not counted" in (tmp_path / "nonfinite-rank0.html").read_text(encoding="utf-8")


def test_the_first_step_is_step_0_when_steps_are_counted() -> None:
    model, told = Net(), Told()
    model.blocks[1].plant = nan_in_row(2)
    with torchprobe.record(model, LAYERS) as rec:
        rec.guard(on=told)
        model(batch(0))
        rec.step()
    assert told.reports[0].first.step == 0 and "  step 0, call 0" in str(told.reports[0])


def test_silence_is_put_in_words() -> None:
    model = Net()
    with torchprobe.record(model, LAYERS, guard="raise") as rec:
        (guard,) = rec.guards
        assert str(guard) == "torchprobe guard: none of 5 guarded layers has run"
        for step in range(3):
            loss = model(batch(step)).sum()
            loss.backward()
            loss = loss * math.nan  # what nobody looks at
            rec.step()
    assert str(guard).startswith("torchprobe guard: 5 of 5 guarded layers ran in 3 steps. Their outputs and gradients were finite. ")
    assert str(guard).endswith("look at the loss.") and rec.guard_report() is None
    with torchprobe.record(model, LAYERS) as rec:
        guard = rec.guard(on=Told())
        model(batch(0))
        assert "no gradient was looked at" in str(guard) and "steps were not counted" in str(guard)
        model.blocks[1].plant = nan_in_row(2)
        model(batch(0))
        assert "running step" in str(guard)
    assert "1 alarm, the newest:\ntorchprobe guard: first nonfinite activation" in str(guard)


def test_what_follows_a_nan_of_the_backward() -> None:
    """Each layer once, none after itself, and in words what the order is. The output of the model is the tensor of the last layer."""
    model, told = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)), Told()
    with torchprobe.record(model, "**") as rec:
        rec.guard(on=told)
        poison_gradient(model(batch(0))).sum().backward()
        rec.step()
    assert told.reports[0].first.layer == "2"
    assert "  after it, in the order of the backward, the last layer first: '1', '0'\n" in f"{told.reports[0]}\n"


def test_the_warning_of_dropped_graphs_points_at_the_line_of_the_user() -> None:
    def compiled() -> Any:
        torch.compiler.reset()
        model = torch.compile(nn.Linear(4, 4), backend="eager")
        model(torch.ones(2, 4))
        return model

    def start(model: Any) -> None:
        torchprobe.record(model, guard=True).start().leave()

    def enter(model: Any) -> None:
        with torchprobe.record(model) as rec:
            rec.leave()

    def monitor(model: Any) -> None:
        with Monitor(model, guard=True):
            pass

    for begin in (start, enter, monitor):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            begin(compiled())
        assert "had run before" in str(told[0].message)
        assert {warning.filename for warning in told if "had run before" in str(warning.message)} == {__file__}
