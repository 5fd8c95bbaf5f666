"""The blocks of docs/integrations.md and docs/watch.md run as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import blocks
from torch import nn
from training_runs import Classifier, X, network

import torchprobe

DOCS = Path(__file__).parents[1] / "docs"


def names() -> dict[str, Any]:
    """What the blocks take for granted."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train_step(x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "torch": torch,
        "torchprobe": torchprobe,
        "model": model,
        "optimizer": optimizer,
        "train_step": train_step,
        "loader": torch.utils.data.DataLoader(X, batch_size=4),  # type: ignore[arg-type]
        "validate": lambda model: model(X),
    }


@pytest.mark.filterwarnings("ignore")
def test_integrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "accelerate", "lightning", "tensorboard", "pandas", "pyarrow"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import accelerate
    import lightning
    import transformers
    from accelerate.state import AcceleratorState
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.net(batch).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    monkeypatch.chdir(tmp_path)
    trainer, fit, prepared, loop, writers, tables = blocks(DOCS / "integrations.md", "python")
    arguments = transformers.TrainingArguments(
        output_dir="out", max_steps=4, logging_steps=2, save_strategy="no", report_to=[], use_cpu=True
    )
    data = [{"x": row, "labels": torch.tensor(0)} for row in X]
    first = {**names(), "Trainer": transformers.Trainer, "arguments": arguments, "data": data, "model": Classifier()}
    exec(compile(trainer, "integrations.md", "exec"), first)
    assert first["recording"].history.steps == [2, 4]
    exec(compile(tables, "integrations.md", "exec"), first)
    assert first["frame"].shape == (14, 2 + len(first["recording"].history.fields))
    second = {**names(), "lightning": lightning, "module": Module(), "logger": CSVLogger("logs")}
    exec(compile(fit, "integrations.md", "exec"), second)
    assert second["recording"].history.steps == [2, 4, 6]
    AcceleratorState._reset_state(True)
    third = {**names(), "accelerator": accelerate.Accelerator(cpu=True)}
    exec(compile(prepared, "integrations.md", "exec"), third)
    assert third["recording"].history["vectors"].tolist() == [[8.0] * 7] * 3
    exec(compile(writers, "integrations.md", "exec"), {})  # none of the trackers needs to be installed for the import
    fourth = names()
    exec(compile(loop, "integrations.md", "exec"), fourth)
    assert fourth["monitor"].history.steps == [2, 4, 6]
    assert {path.name for path in tmp_path.iterdir()} >= {"run.safetensors", "checkpoint", "checkpoint.pt", "history.parquet", "runs"}


def test_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    found = {**names(), "loader": [X] * 100}
    for block in blocks(DOCS / "watch.md", "python"):
        exec(compile(block, "watch.md", "exec"), found)
    assert found["recording"].history.steps == [50, 100]
    assert isinstance(found["model"], nn.Module)
