"""Guards and gradients with outputs that are no ordinary tensors: nothing is missed in silence, nothing is left behind, no file is lost."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.recording.flight import read_flight
from torchprobe.recording.verdicts import NonfiniteWarning, Report


class Gives(nn.Module):
    """A linear layer, and what a function makes of its output."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.function, self.output = nn.Linear(4, 4), function, nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.output(self.function(self.linear(x)))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a conjugated view": lambda x: torch.complex(x, x * math.nan).conj(),
    "float8": lambda x: (x.detach() * math.nan).to(torch.float8_e4m3fn),
    "sparse": lambda x: (x * math.nan).to_sparse(),
    "compressed rows": lambda x: (x.detach() * math.nan).to_sparse_csr(),
    "half the complex": lambda x: torch.complex(x.detach(), x.detach() * math.inf).to(torch.complex32),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OUTPUTS)
def test_nonfinite_values_of_other_tensors_are_seen(name: str) -> None:
    model, reports = Gives(OUTPUTS[name]), list[Report]()
    with torchprobe.record(model, "linear") as rec:
        rec.guard("output", on=reports.append)
        model(torch.randn(3, 4))
    assert [report.first.layer for report in reports] == ["output"]


def test_what_cannot_be_looked_at_is_told() -> None:
    model = Gives(lambda x: torch.masked.masked_tensor(x.detach(), x.detach() > 0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torchprobe.record(model, "linear") as rec:
            rec.guard("output")
            model(torch.randn(3, 4))
    assert any(issubclass(one.category, NonfiniteWarning) and "MaskedTensor" in str(one.message) for one in told)


def test_an_output_that_holds_itself_ends_no_run() -> None:
    value: list[Any] = [torch.randn(3, 4)]
    value.append(value)
    model = Gives(lambda x: value)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torchprobe.record(model, "**") as rec:
            rec.guard("**")
            assert model(torch.randn(3, 4)) is value
    assert any("recursion" in str(one.message) for one in told)


class Prompt(nn.Module):
    """Gives a parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self) -> Tensor:
        return self.weight


class Prompted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.head = Prompt(), nn.Linear(4, 2)

    def forward(self) -> Tensor:
        out: Tensor = self.head(self.prompt())
        return out


def test_a_parameter_that_is_an_output_gets_no_more_hooks_with_each_call() -> None:
    model, reports = Prompted(), list[Report]()
    parameter = model.prompt.weight
    with torchprobe.record(model, "head") as rec:
        rec.guard("prompt", on=reports.append)
        for step in range(4):
            loss = model().sum()
            (loss * math.nan if step == 3 else loss).backward()
            assert len(parameter._backward_hooks or ()) <= 1
            rec.step()
    assert not parameter._backward_hooks
    assert [(report.first.layer, report.first.kind, report.first.call) for report in reports] == [("prompt", "gradient", 3)]


def test_the_gradient_of_a_parameter_that_is_an_output_counts_once_for_each_call() -> None:
    model = Prompted()
    with torchprobe.record(model, "prompt", of="gradient") as rec:
        for _ in range(4):
            model().sum().backward()
    assert rec["prompt"].vectors == 4 * 3
    assert not model.prompt.weight._backward_hooks


def test_an_input_that_is_given_on_keeps_no_hooks() -> None:
    model, x = nn.Sequential(nn.Identity(), nn.Linear(4, 2)), torch.randn(3, 4, requires_grad=True)
    with torchprobe.record(model, "1") as rec:
        rec.guard("**")
        for _ in range(3):
            model(x).sum().backward()
    assert not x._backward_hooks


def test_no_alarm_replaces_the_files_of_another(tmp_path: Path) -> None:
    """Without ``step()`` every step is step 0; and two guards may share a folder."""
    model, bad = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.full((3, 4), math.nan)
    reports = list[Report]()
    with torchprobe.record(model) as rec:
        for layer in ("0", "1"):
            rec.guard(layer, on=reports.append, dump=tmp_path)
        for window in range(2):
            model(bad)
            rec.snapshot(2 * window)
            model(torch.randn(3, 4))
            rec.snapshot(2 * window + 1)
    files = [file for report in reports for file in report.files]
    assert len(reports) == 4 and len(set(files)) == 8 and {*map(Path, files)} == {*tmp_path.iterdir()}
    layers = [read_flight(file)[0]["report"]["events"][0]["layer"] for file in files if file.endswith("safetensors")]
    assert sorted(layers) == ["0", "0", "1", "1"]


def test_threads_do_not_share_a_batch() -> None:
    """The verdict names the batch of the thread whose call was nonfinite, whatever the other threads run meanwhile."""
    entered, other_done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                entered.set()
                other_done.wait(20)
            return x

    model, reports = nn.Sequential(Waits(), nn.Linear(4, 4)), list[Report]()
    with torchprobe.record(model, "1") as rec:
        rec.guard("1", on=reports.append)
        thread = threading.Thread(target=lambda: model(torch.full((3, 4), math.nan)))
        thread.start()
        assert entered.wait(20)
        model(torch.randn(3, 4))
        other_done.set()
        thread.join()
    assert [report.first.because[:60] for report in reports] == ["its input 'input' was nonfinite already: it is in the batch; "[:60]]


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    """Also of a layer with an empty buffer, which has no largest value; and anything else is a ValueError."""
    model, reports = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), list[Report]()
    model[0].register_buffer("nothing", torch.zeros(0))
    with torchprobe.record(model) as rec:
        rec.guard("0", on=reports.append, dump=tmp_path)
        model(torch.full((3, 4), math.nan))
    assert "largest |value| 0." in str(reports[0])
    values, _ = read_flight(next(file for file in reports[0].files if file.endswith("safetensors")))
    assert str(Report.from_dict(values["report"])).splitlines() == values["text"].splitlines()
    event = values["report"]["events"][0]
    for wrong in (
        {},
        {"events": []},
        {"events": [1]},
        {"events": [{**event, "outputs": [{}]}]},
        {"events": [{**event, "rank": {}, "inputs": 3}]},
    ):
        with pytest.raises(ValueError, match="not the report of a guard"):
            Report.from_dict({**values["report"], **wrong} if wrong else wrong)


class InPlace(nn.Module):
    """``x /= x.norm()``, as a residual block that works on its input does: afterwards the input shows what came out."""

    def __init__(self, passes: bool = False) -> None:
        super().__init__()
        self.passes = passes

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x if self.passes else x.div_(x.norm(dim=-1, keepdim=True) * scale)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(x * math.nan)

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.ReLU(inplace=True)


@pytest.mark.parametrize(
    ("network", "layers", "layer", "verdict"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), InPlace()), "**", "1", "made here"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), InPlace()), "**", "2", "made here"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), InPlace()), "2", "2", "unsure"),
        (lambda: nn.Sequential(InPlace(), nn.Linear(4, 4)), "**", "0", "unsure"),
        (lambda: nn.Sequential(nn.Linear(4, 4), Broken()), "**", "1.after", "came in"),
        (lambda: nn.Sequential(nn.Linear(4, 4), Broken(), InPlace(passes=True)), "2", "2", "came in"),
    ],
    ids=["after a layer", "after one in place", "alone", "of the batch", "an activation function", "passed on"],
)
def test_a_layer_that_writes_into_its_input_is_not_taken_for_one_that_was_given_nan(
    network: Callable[[], nn.Module], layers: str, layer: str, verdict: str
) -> None:
    model, reports = network(), list[Report]()
    if isinstance(model[0], nn.Linear):
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with torchprobe.record(model, "**") as rec, torch.no_grad():
        rec.guard(layers, on=reports.append)
        model(torch.zeros(3, 4))
        rec.step()
    assert [(report.first.layer, report.first.verdict) for report in reports] == [(layer, verdict)], str(reports[0])
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_a_compiled_layer_that_gives_its_input_back_is_unsure() -> None:
    """A graph does not count the writes to a tensor."""
    torch.compiler.reset()
    model, reports = nn.Sequential(nn.Linear(4, 4), InPlace(), nn.Linear(4, 4)), list[Report]()
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    with torchprobe.record(model, "**") as rec, torch.no_grad():
        rec.guard("**", on=reports.append)
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.zeros(3, 4))
        rec.step()
    assert (reports[0].first.layer, reports[0].first.verdict) == ("1", "unsure")
