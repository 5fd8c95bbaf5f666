"""The callback of the Trainer of transformers, with the real package: one rank and two, eager and compiled."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import group
from torch import Tensor, nn
from training_runs import Classifier, Seen, Tagger, X, padded

import torchprobe
from torchprobe.integrations.transformers import RecordActivations
from torchprobe.statistics import Moments

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:(?!torchprobe)")
PLAIN = [{"x": row, "labels": torch.tensor(0)} for row in X]
LAYERS = [*(f"net.{i}" for i in range(6)), ""]


class Tracker(transformers.TrainerCallback):  # type: ignore[misc]
    """Stands for W&B, TensorBoard and others: it keeps what it is given."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.logs.append((state.global_step, dict(logs)))


def trainer_of(folder: Path, model: nn.Module, data: Any, callbacks: Any, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 4,
            "lr_scheduler_type": "constant",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **options,
        }
    )
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def fit(
    folder: Path, steps: int = 6, resume: Any = None, layers: Any = None, tracker: Any = None, tokens: bool = False, **options: Any
) -> Any:
    recording = RecordActivations(layers)
    model, data = (Tagger(), padded()) if tokens else (Classifier(), PLAIN)
    trainer = trainer_of(folder, model, data, [*([tracker] if tracker else []), recording], max_steps=steps, **options)
    trainer.train(resume_from_checkpoint=resume)
    check_clean(trainer)
    return trainer, recording


def check_clean(trainer: Any) -> None:
    modules = [*trainer.model.modules(), trainer.model_wrapped]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not {"training_step", "evaluate"} & vars(trainer).keys()
    assert [type(one).__name__ for one in trainer.callback_handler.callbacks].count("_Hide") == 0


def losses(trainer: Any) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]


def test_the_loss_and_the_numbers_are_one_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = trainer_of(tmp_path / "plain", Classifier(), PLAIN, [])
    plain.train()
    capsys.readouterr()
    tracker = Tracker()
    trainer, recording = fit(tmp_path / "recorded", tracker=tracker)
    console = capsys.readouterr().out
    assert losses(trainer) == losses(plain)  # every loss, and the same
    assert [step for step, _ in losses(trainer)] == [2, 4, 6]
    keys = {f"act/{layer or 'model'}/{field}" for layer in LAYERS for field in Moments.metric_fields}
    for line in trainer.state.log_history:
        assert keys <= line.keys() if "loss" in line else not keys & line.keys()
    whole = [(step, logs) for step, logs in tracker.logs if "loss" in logs]
    assert [step for step, _ in whole] == [2, 4, 6]
    assert all(keys <= logs.keys() for _, logs in whole)
    assert [logs["act/net.2/std"] for _, logs in whole] == recording.history["std"][:, recording.history.layers.index("net.2")].tolist()
    assert len(tracker.logs) == len(trainer.state.log_history)  # one event for each record, as before
    assert "'loss'" in console and "act/" not in console
    assert [type(one).__name__ for one in trainer.callback_handler.callbacks][-1] == "PrinterCallback"
    read = json.loads((tmp_path / "recorded" / "checkpoint-4" / "trainer_state.json").read_text())
    assert "act/net.2/std" in read["log_history"][0]


def test_a_tracker_of_the_trainer_gets_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer, recording = fit(tmp_path / "out", report_to=["tensorboard"])
    events = EventAccumulator(str(next((tmp_path / "runs").rglob("events*")).parent))
    events.Reload()
    found = {name: [(point.step, point.value) for point in events.Scalars(f"train/{name}")] for name in ("loss", "act/net.2/std")}
    assert found["loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses(trainer)]
    std = recording.history["std"][:, recording.history.layers.index("net.2")].tolist()
    assert found["act/net.2/std"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in zip((2, 4, 6), std, strict=True)]


def test_log_every_is_that_of_the_trainer() -> None:
    with pytest.raises(TypeError, match="logging_steps"):
        RecordActivations(log_every=3)


def test_windows_are_of_training_alone(tmp_path: Path) -> None:
    _, recording = fit(tmp_path)
    assert recording.history.steps == [2, 4, 6]
    assert recording.history.layers == LAYERS
    assert recording.history["vectors"].tolist() == [[8.0] * 7] * 3  # two batches, and no evaluation


def test_a_callback_that_is_added_later_and_a_second_training(tmp_path: Path) -> None:
    recording, tracker = RecordActivations("net.*", fields="std"), Tracker()
    trainer = trainer_of(tmp_path, Classifier(), PLAIN, [tracker])
    trainer.add_callback(recording)  # after the console
    trainer.train()
    assert sum("act/net.0/std" in logs for _, logs in tracker.logs) == 3
    trainer.train()
    check_clean(trainer)
    assert recording.history.steps == [2, 4, 6]
    assert sum("act/net.0/std" in logs for _, logs in tracker.logs) == 6


def test_accumulated_gradients_and_epochs(tmp_path: Path) -> None:
    _, recording = fit(tmp_path / "steps", steps=2, gradient_accumulation_steps=2)
    assert recording.history["vectors"].tolist() == [[16.0] * 7]
    trainer, recording = fit(tmp_path / "epochs", steps=-1, num_train_epochs=2, logging_strategy="epoch")
    assert recording.history.steps == [6, 12]
    assert recording.history["vectors"].tolist() == [[24.0] * 7] * 2
    assert [step for step, _ in losses(trainer)] == [6, 12]


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, recording = fit(tmp_path / "whole")
    fit(tmp_path / "parts", 4)
    shutil.move(tmp_path / "parts" / "checkpoint-4", tmp_path / "elsewhere")
    trainer, resumed = fit(tmp_path / "parts", 6, resume=str(tmp_path / "elsewhere"))
    assert resumed.history.steps == [2, 4, 6]
    assert np.array_equal(resumed.history.values, recording.history.values, equal_nan=True)
    assert losses(trainer) == losses(whole)


def test_a_resumed_training_without_a_recording(tmp_path: Path) -> None:
    trainer_of(tmp_path, Classifier(), PLAIN, [], max_steps=4).train()
    with pytest.warns(torchprobe.RecordingWarning, match="starts anew: FileNotFoundError"):
        _, recording = fit(tmp_path, 6, resume=str(tmp_path / "checkpoint-4"))
    assert recording.history.steps == [6]
    (tmp_path / "checkpoint-4" / "torchprobe-rank0.pt").write_bytes(b"damaged")
    with pytest.warns(torchprobe.RecordingWarning, match="starts anew"):
        _, recording = fit(tmp_path, 6, resume=str(tmp_path / "checkpoint-4"))
    assert recording.history.steps == [6]


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_does_not_count(tmp_path: Path, compiled: bool) -> None:
    model = Tagger()
    seen = Seen(model, {f"blocks.{i}": block for i, block in enumerate(model.blocks)})
    trainer_of(tmp_path / "seen", model, padded(), []).train()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    trainer, recording = fit(tmp_path / "recorded", layers="blocks.*", tokens=True, **options)
    assert len(losses(trainer)) == 3
    for name in ("blocks.0", "blocks.1"):
        values, found = seen.all(name), recording.recorder.total[name]
        assert found.vectors == len(values)
        torch.testing.assert_close(found.mean, values.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.std, values.std(0, correction=0), rtol=1e-5, atol=1e-7)
    assert math.isclose(recording.history["vectors"][:, 0].sum(), len(seen.all("blocks.0")))


@pytest.mark.parametrize("where", ["forward", "metrics"])
def test_a_training_that_fails_leaves_no_hook(tmp_path: Path, where: str) -> None:
    class Failing(Classifier):
        calls = 0

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            self.calls += 1
            if where == "forward" and self.calls == 3:
                raise ZeroDivisionError("planted")
            return super().forward(x, labels)

    def metrics(prediction: Any) -> dict[str, float]:
        raise ZeroDivisionError("planted")

    recording = RecordActivations()
    trainer = trainer_of(tmp_path, Failing(), PLAIN, [recording])
    trainer.compute_metrics = metrics if where == "metrics" else None
    with pytest.raises(ZeroDivisionError, match="planted"):
        trainer.train()
    check_clean(trainer)


RANKS = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_integrations_transformers as t
folder, rank = Path({folder!r}), int(os.environ["RANK"])
tracker = t.Tracker()
trainer, whole = t.fit(folder / "whole", tokens=True, layers="blocks.*", tracker=tracker, ddp_backend="gloo")
t.fit(folder / "parts", 4, tokens=True, layers="blocks.*", ddp_backend="gloo")
_, resumed = t.fit(folder / "parts", 6, tokens=True, layers="blocks.*", ddp_backend="gloo", resume=str(folder / "parts" / "checkpoint-4"))
logged = [logs["act/blocks.1/std"] for _, logs in tracker.logs if "loss" in logs]
histories = [[one.history.steps, one.history["vectors"].tolist(), one.history["std"].tolist()] for one in (whole, resumed)]
print(json.dumps([histories, logged, resumed.recorder.total["blocks.0"].vectors]))
"""


@pytest.mark.slow("starts two processes that import the package")
def test_two_ranks_log_the_numbers_of_both(tmp_path: Path) -> None:
    done = group(2, RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    (first, logged, own), (second, silent, other) = (json.loads(one.stdout.strip().splitlines()[-1]) for one in done)
    assert first == second  # both ranks know the history of both
    assert first[0] == first[1]  # resumed, and uninterrupted
    steps, vectors, std = first[0]
    counts = sum(int(row["attention_mask"].sum()) for row in padded())
    assert steps == [2, 4, 6]
    assert sum(window[0] for window in vectors) == 2 * counts == own + other  # two epochs of three steps
    assert logged == [window[1] for window in std]
    assert silent == []
    names = sorted(path.name for path in (tmp_path / "parts" / "checkpoint-4").glob("torchprobe-*"))
    assert names == ["torchprobe-rank0.pt", "torchprobe-rank1.pt"]
