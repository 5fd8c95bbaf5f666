"""The examples in examples/logging, with the real packages."""

from __future__ import annotations

import json
import math
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import Moments

EXAMPLES = Path(__file__).parents[1] / "examples" / "logging"
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def example(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / name)))


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def keys(layers: list[str]) -> set[str]:
    return {f"act/{layer}/{field}" for layer in layers for field in Moments.metric_fields}


def test_jsonl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, "to_jsonl.py", "--steps", 6, "--window", 2, "--output", tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert set(line) == {"step"} | keys(["0", "1", "2", "3", "4"])
        assert line["act/2/nonfinite"] == 0
        assert line["act/2/vector_kurtosis"] > 1
    example("to_jsonl.py").write(tmp_path / "run.jsonl", 7, {"a": math.nan, "b": math.inf, "c": 1.5})
    assert (tmp_path / "run.jsonl").read_text().endswith('\n{"step": 7, "a": null, "b": null, "c": 1.5}\n')  # JSON has no nan


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run(monkeypatch, "to_tensorboard.py", "--steps", 6, "--window", 3, "--output", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == keys(["0", "1", "2", "3", "4"])
    assert [(e.step, e.value) for e in events.Scalars("act/2/nonfinite")] == [(3, 0.0), (6, 0.0)]
    assert all(e.value > 1 for e in events.Scalars("act/4/vector_kurtosis"))


# -- Lightning -----------------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())])


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Tensor) -> Tensor:
            return self.net(batch).square().sum()

        def validation_step(self, batch: Tensor) -> None:
            self.net(batch + 100)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(X, batch_size=4)

        val_dataloader = train_dataloader

    return Module()


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    module = lightning_module()
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    callback = example("lightning_callback.py").RecordActivations

    def fit(epochs: int, resume: Any = None, **options: Any) -> Any:
        logger = CSVLogger(str(tmp_path / "logs"))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=logger,
            callbacks=[callback(every=2)],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            default_root_dir=str(tmp_path),
            **options,
        )
        trainer.fit(lightning_module(), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return trainer

    def recorded(trainer: Any) -> Any:
        (found,) = [c for c in trainer.callbacks if type(c).__name__ == "RecordActivations"]
        assert not any(m._forward_hooks for m in trainer.lightning_module.modules())
        return found.recorder

    whole = fit(2)
    rec = recorded(whole)
    layers = [f"net.{i}" for i in range(6)]
    assert rec.layers == layers
    assert rec.history.steps == [2, 4, 6, 8, 10, 12]
    assert rec.history["vectors"].tolist() == [[8.0] * 6] * 6  # two batches in a window, and no validation
    logged = (Path(whole.logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert set(logged[0].split(",")) >= keys(layers)
    first = fit(1)
    resumed = recorded(fit(2, resume=tmp_path / "1.ckpt"))
    assert recorded(first).history.steps == [2, 4, 6]
    assert resumed.history.steps == rec.history.steps
    assert torch.equal(torch.from_numpy(resumed.history["std"]), torch.from_numpy(rec.history["std"]))
    accumulated = recorded(fit(2, accumulate_grad_batches=2))
    assert accumulated.history.steps == [2, 4, 6]
    assert accumulated.history["vectors"].tolist() == [[16.0] * 6] * 3
    assert module is not None


# -- Hugging Face ----------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": out.square().sum(), "logits": out}


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    callback = example("trainer_callback.py").RecordActivations
    data = [{"x": row, "labels": torch.tensor(0)} for row in X]

    def fit(folder: str, steps: int, resume: Any = None) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            logging_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=4,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(Classifier(), arguments, train_dataset=data, eval_dataset=data)
        recording = callback(trainer)
        trainer.add_callback(recording)
        trainer.train(resume_from_checkpoint=resume)
        assert not any(m._forward_hooks for m in trainer.model.modules())
        return trainer, recording.recorder

    trainer, rec = fit("whole", 6)
    assert rec.history.steps == [2, 4, 6]
    assert rec.history["vectors"].tolist() == [[8.0] * 7] * 3  # two batches in a window, and no evaluation
    logged = [line for line in trainer.state.log_history if any(name.startswith("act/") for name in line)]
    assert [line["step"] for line in logged] == [2, 4, 6]
    assert set(logged[0]) >= keys([f"net.{i}" for i in range(6)])
    fit("parts", 4)
    _, resumed = fit("parts", 6, resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert resumed.history.steps == [2, 4, 6]
    assert torch.equal(torch.from_numpy(resumed.history["std"]), torch.from_numpy(rec.history["std"]))


# -- for every logger -------------------------------------------------------------------------------------------------------------


def test_keys_are_the_same_before_and_after_a_layer_fires_for_the_first_time() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.which = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[self.which](x)

    model = Branch()
    seen = []
    with torchprobe.record(model, "blocks.*") as rec:
        seen.append(rec.metrics())
        for step in range(3):
            model.which = step
            model(X)
            seen.append(rec.metrics())
            rec.snapshot(step)
    assert {frozenset(numbers) for numbers in seen} == {frozenset(key[4:] for key in keys(["blocks.0", "blocks.1", "blocks.2"]))}
    assert all(type(value) is float for numbers in seen for value in numbers.values())
    assert [numbers["blocks.1/nonfinite"] for numbers in seen[1:]] == pytest.approx([math.nan, 0.0, math.nan], nan_ok=True)


def test_a_layer_without_recorded_values_has_no_keys() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0).long()

    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), Counts())
    with pytest.warns(torchprobe.RecordingWarning), torchprobe.record(model) as rec:
        model(X)
    assert {name.rpartition("/")[0] for name in rec.metrics()} == {"0.0", "0.1"}
