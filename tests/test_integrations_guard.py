"""A guard in a Monitor and in the callbacks: told at once, with the number of the step of the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMPILER_WARNINGS
from torch import Tensor, nn
from training_runs import Classifier, X, network

from torchprobe.integrations import Monitor
from torchprobe.recording import NonfiniteError

BAD = 5
"""The step, counted from 0, at which a layer makes nan. Windows are longer."""


class Breaks(nn.Module):
    """Makes nan in one call of the training."""

    def __init__(self, calls: int = 0) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == BAD + 1:
                return x * torch.nan
        return x


def broken(calls: int = 0) -> nn.Module:
    return nn.Sequential(network(), Breaks(calls))


def train(model: nn.Module, monitor: Monitor, steps: int) -> None:
    for _ in range(steps):
        model(X[:4]).sum().backward()
        monitor.step()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_monitor_tells_the_step_at_once() -> None:
    model, told = broken(), list[Any]()
    with Monitor(model, ["0", "1"], log_every=50, guard={"on": lambda report: told.append((report, monitor.count))}) as monitor:
        train(model, monitor, 8)
    ((report, at),) = told
    assert (report.first.step, report.first.layer, at) == (BAD, "1", BAD + 1)


@COMPILER_WARNINGS
@pytest.mark.slow("compiles with inductor")
def test_a_monitor_around_a_compiled_model_tells_the_step_at_once() -> None:
    torch.compiler.reset()
    model, told = network(), list[Any]()
    with Monitor(model, ["0", "2"], log_every=50, guard={"on": lambda report: told.append((report, monitor.count))}) as monitor:
        compiled = torch.compile(model)
        for step in range(8):
            rows = X[:4].clone()
            rows[1] = torch.nan if step == BAD else rows[1]
            compiled(rows).sum().backward()
            monitor.step()
    report, at = told[0]
    assert (report.first.step, report.first.layer, report.first.verdict, report.first.rows, at) == (BAD, "0", "came in", (1,), BAD + 1)


def test_a_monitor_that_raises_ends_the_run_at_the_step() -> None:
    model = broken()
    with pytest.raises(NonfiniteError) as found, Monitor(model, log_every=50, guard={"on": "raise"}) as monitor:
        train(model, monitor, 8)
    assert found.value.report.first.step == BAD and monitor.count == BAD + 1 and hooks(model) == 0


def test_a_resumed_monitor_names_the_step_of_the_whole_run() -> None:
    model = broken()
    with Monitor(model, log_every=2, guard=True) as monitor:
        train(model, monitor, BAD)
        state = monitor.state_dict()
    told = list[Any]()
    again = Monitor(model, log_every=2, guard={"on": told.append})
    again.load_state_dict(state)
    with again:
        train(model, again, 1)
    assert [report.first.step for report in told] == [BAD]


def test_every_nth_step_is_read_with_all_its_calls() -> None:
    model = network()
    with Monitor(model, "0", log_every=None, every=2) as monitor:
        for _ in range(4):
            for _ in range(3):
                model(X[:4])
            monitor.step()
    assert monitor.recorder["0"].vectors == 2 * 3 * 4


@pytest.mark.filterwarnings("ignore:(?!torchprobe)")
@pytest.mark.parametrize("on", ["call", "raise"])
def test_the_trainer_of_transformers(tmp_path: Path, on: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from torchprobe.integrations.transformers import RecordActivations

    told, model = list[Any](), Classifier()
    model.net = broken()
    tell = lambda report: told.append((report.first, trainer.state.global_step))  # noqa: E731
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, logging_steps=50, per_device_train_batch_size=4,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callbacks = [RecordActivations(["net.*"], guard={"on": tell if on == "call" else "raise"})]
    data = [{"x": row, "labels": torch.tensor(0)} for row in X]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    if on == "raise":
        with pytest.raises(NonfiniteError) as found:
            trainer.train()
        assert found.value.report.first.step == BAD and trainer.state.global_step == BAD + 1
    else:
        trainer.train()
        ((first, at),) = told
        assert (first.step, first.layer, at) == (BAD, "net.1", BAD + 1)
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:(?!torchprobe)")
@pytest.mark.parametrize("on", ["call", "raise"])
def test_lightning(tmp_path: Path, on: str) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from torchprobe.integrations.lightning import RecordActivations

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = broken()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    told, module = list[Any](), Module()
    guard = {"on": lambda report: told.append((report.first, trainer.global_step))} if on == "call" else {"on": "raise"}
    trainer = lightning.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[RecordActivations(["net.0", "net.1"], guard=guard)], default_root_dir=str(tmp_path),
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(X, 4)
    if on == "raise":
        with pytest.raises(NonfiniteError) as found:
            trainer.fit(module, loader)
        assert found.value.report.first.step == BAD and trainer.global_step == BAD + 1
    else:
        trainer.fit(module, loader)
        ((first, at),) = told
        assert (first.step, first.layer, at) == (BAD, "net.1", BAD + 1)
    assert hooks(module) == 0
