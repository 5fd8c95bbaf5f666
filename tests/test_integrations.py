"""Monitor, its writers and its file; Lightning and accelerate. With the real packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import python
from torch import Tensor, nn
from training_runs import Tagger, X, network, padded

import torchprobe
from torchprobe.integrations import Monitor, packages
from torchprobe.integrations.accelerate import RecordActivations as RecordAccelerate
from torchprobe.integrations.lightning import RecordActivations as RecordLightning
from torchprobe.integrations.mlflow import metric_name, to_mlflow
from torchprobe.integrations.padding import Padding, target_mask, token_mask
from torchprobe.integrations.tensorboard import to_tensorboard
from torchprobe.integrations.wandb import to_wandb


def train(model: nn.Module, monitor: Monitor, steps: int, start: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(start, steps):
        rows = torch.arange(4) + step * 4
        model(X[rows % len(X)]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# -- Monitor -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_the_numbers_are_those_of_the_activations(compiled: bool) -> None:
    model = network()
    expected: list[Tensor] = []
    reference = network()
    train(reference, Monitor(reference, log_every=None), 2)  # the same run, without hooks
    written: list[tuple[int, Mapping[str, float]]] = []
    called = torch.compile(model, backend="aot_eager") if compiled else model
    with Monitor(called, ["0", ""], log_every=2, to=lambda numbers, step: written.append((step, numbers)), fields="all") as monitor:
        for step in range(4):
            with torch.no_grad():
                expected.append(nn.Linear.forward(model[0], X[step : step + 8]).double())
                called(X[step : step + 8])
            assert (monitor.step() is None) == (step % 2 == 0)
    assert [step for step, _ in written] == [2, 4] == monitor.history.steps
    for (_, numbers), window in zip(written, (expected[:2], expected[2:]), strict=True):
        values = torch.cat(window)
        centered = values - values.mean(1, keepdim=True)
        kurtosis = centered.pow(4).mean(1) / centered.pow(2).mean(1) ** 2
        assert numbers["act/0/vectors"] == 16
        assert numbers["act/0/abs_max"] == pytest.approx(values.abs().max().item(), rel=1e-6)
        assert numbers["act/0/vector_kurtosis"] == pytest.approx(kurtosis.mean().item(), rel=1e-5)
        assert numbers["act/model/vectors"] == 16
    assert hooks(model) == 0


def test_keys_have_no_empty_component_and_no_two_meanings() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    for model, root in ((network(), "model"), (Named(), "whole-model")):
        with Monitor(model, lambda name, module: name.count(".") == 0, log_every=1, of=("output", "gradient"), fields="std") as monitor:
            model(X).sum().backward()
            numbers = monitor.step()
        assert numbers is not None
        assert {f"act/{root}/std", f"act/{root}@gradient/std"} <= numbers.keys()
        assert len(numbers) == 2 * (7 if root == "model" else 2)
        assert all(all(part for part in key.split("/")) for key in numbers)


def test_a_writer_that_fails_ends_no_run() -> None:
    def broken(numbers: Mapping[str, float], step: int) -> None:
        raise ConnectionError("no network")

    model, kept = network(), list[int]()
    with (
        pytest.warns(torchprobe.RecordingWarning, match="broken did not write the numbers: ConnectionError: no network") as found,
        Monitor(model, log_every=1, to=[broken, lambda numbers, step: kept.append(step)]) as monitor,
    ):
        train(model, monitor, 3)
    assert kept == [1, 2, 3]
    assert len(found) == 1  # told once


def test_hooks_are_removed_when_the_run_fails() -> None:
    model = network()
    monitor = Monitor(model, log_every=1)

    def fail() -> None:
        with monitor:
            assert hooks(model) > 0
            train(model, monitor, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert hooks(model) == 0
    monitor.stop()  # a second time


@pytest.mark.parametrize(("value", "match"), [(0, "log_every"), (True, "log_every"), (1.5, "log_every")])
def test_what_is_refused(value: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        Monitor(network(), log_every=value)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Monitor(network(), save=tmp_path / "nowhere" / "run.safetensors")


def test_the_file_holds_the_total_and_the_history(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "run.safetensors"
    with Monitor(model, log_every=2, save=path) as monitor:
        train(model, monitor, 4)
        early = torchprobe.load(path)  # written while it runs
        train(model, monitor, 7, start=4)
    late = torchprobe.load(path)
    assert early.history.steps[0] == 2
    assert late.history.steps == [2, 4, 6]
    assert np.array_equal(late.history.values, monitor.history.values, equal_nan=True)
    assert {row["vectors"] for row in late.rows()} == {7 * 4.0}  # with the steps after the last window
    assert os.listdir(tmp_path) == ["run.safetensors"]


@pytest.mark.parametrize("steps", [1, 5])
def test_the_file_has_the_steps_after_the_last_window_of_a_run_that_fails(tmp_path: Path, steps: int) -> None:
    model, path = network(), tmp_path / "run.safetensors"
    monitor = Monitor(model, log_every=4, save=path)
    train(model, monitor.start(), steps)
    error = RuntimeError("out of memory")
    monitor.__exit__(type(error), error, None)  # the end of a block in which it was raised
    assert {row["vectors"] for row in torchprobe.load(path).rows()} == {4.0 * steps}
    path.unlink()
    monitor.stop()
    assert not path.exists()  # a second end does nothing


def test_a_run_that_fails_before_its_first_step_leaves_the_file_of_another_one(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    path.write_text("of another run")
    model = network()
    with pytest.raises(RuntimeError, match="no data"), Monitor(model, log_every=4, save=path):
        raise RuntimeError("no data")
    assert path.read_text() == "of another run"


def test_a_disk_that_is_full_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchprobe.recording.Recording.save", full)
    model = network()
    with (
        pytest.warns(torchprobe.RecordingWarning, match="was not written to .*run.safetensors: OSError"),
        Monitor(model, log_every=1, save=tmp_path / "run.safetensors") as monitor,
    ):
        train(model, monitor, 2)
    assert monitor.history.steps == [1, 2]


def test_writing_takes_about_one_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("torchprobe.integrations.monitor.time.monotonic", lambda: clock[0])
    saved: list[float] = []

    def save(self: Any, path: Any) -> None:
        saved.append(clock[0])
        clock[0] += 2.0  # seconds that writing takes

    monkeypatch.setattr("torchprobe.recording.Recording.save", save)
    model = network()
    with Monitor(model, log_every=1, save=tmp_path / "run.safetensors") as monitor:
        model(X)
        for _ in range(500):
            clock[0] += 1.0
            monitor.log(monitor.count + 1)
    assert saved == [1.0, 203.0, 405.0, 506.0]  # the last one at the end
    assert monitor.history.steps[-1] == 500


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole_model, model = network(), network()
    with Monitor(whole_model, log_every=2) as whole:
        train(whole_model, whole, 8)
    with Monitor(model, log_every=2) as first:
        train(model, first, 5)  # in the midst of a window
        torch.save(first.state_dict(), tmp_path / "state.pt")
    with Monitor(model, log_every=2) as second:
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        train(model, second, 8, start=5)
    assert second.history.steps == [2, 4, 6, 8]
    assert np.array_equal(second.history.values, whole.history.values, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "format"),
        ({"ranks": 3}, "format"),
        ({"last": -1}, "last"),
        ({"count": "many"}, "count"),
        ({"ranks": [{}]}, "recorder"),
        ({"history": {}}, "history"),
    ],
)
def test_states_that_cannot_be_right(change: dict[str, Any], match: str) -> None:
    model = network()
    with Monitor(model, log_every=2) as monitor:
        train(model, monitor, 2)
    state = {**monitor.state_dict(), **change}
    before = monitor.history.values.copy()
    with pytest.raises(ValueError, match=match):
        monitor.load_state_dict(state)
    with pytest.warns(torchprobe.RecordingWarning, match="starts anew"):
        monitor.resume(state, "the checkpoint")
    assert np.array_equal(monitor.history.values, before, equal_nan=True)


def test_states_of_ranks_that_are_gone_are_not_lost() -> None:
    states = []
    for rank in range(3):
        model = network()
        with Monitor(model, log_every=2) as one:
            train(model, one, 3 + rank)
        states.append(one.state_dict())
    model = network()
    with Monitor(model, log_every=2) as monitor:
        model(X)
        monitor.load_state_dicts([states[0], *states], 3)
        assert {row["vectors"] for row in monitor.recorder.total.rows()} == {4.0 * (3 + 4 + 5)}
        assert monitor.history.steps == [2]  # of the first rank: windows of several cannot be joined
        monitor.load_state_dicts([states[0]], 0)  # a rank that was not there
        assert monitor.recorder.total["0"].vectors == 0 and monitor.count == 3
        model(X)


# -- packages --------------------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for call in (to_wandb, to_mlflow):
        with pytest.raises(ModuleNotFoundError, match="needs .*: pip install"):
            call()
    monkeypatch.setattr("torchprobe.integrations.lightning._CALLBACK", object)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ModuleNotFoundError, match="pip install lightning"):
        RecordLightning()


def test_what_a_package_lacks_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    for find in (lambda: packages.require("half_there", "it"), lambda: packages.base_class("Callback", "half_there")):
        with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
            find()


def test_importing_the_integrations_imports_no_framework() -> None:
    code = """
import sys
import torchprobe, torchprobe.integrations
import torchprobe.integrations.accelerate, torchprobe.integrations.wandb
import torchprobe.integrations.mlflow, torchprobe.integrations.tensorboard
heavy = {"lightning", "pytorch_lightning", "transformers", "accelerate", "wandb", "mlflow", "tensorboard", "pandas", "pyarrow"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""
    assert python(code).stdout.strip() == "[]"


# -- writers ---------------------------------------------------------------------------------------------------------------------


def run(writer: Any, steps: int = 4) -> Monitor:
    model = network()
    with Monitor(model, log_every=2, to=writer) as monitor:
        train(model, monitor, steps)
    return monitor


def expected(monitor: Monitor, layer: str, field: str) -> list[float]:
    return monitor.history[field][:, monitor.history.layers.index(layer)].tolist()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    monitor = run(to_tensorboard(tmp_path / "own"))
    with SummaryWriter(tmp_path / "mine") as mine:
        run(to_tensorboard(mine))
        mine.add_scalar("after", 1.0, 1)  # it is still open
    for folder in ("own", "mine"):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        points = events.Scalars("act/2/vector_kurtosis")
        assert [point.step for point in points] == [2, 4]
        assert [point.value for point in points] == pytest.approx(expected(monitor, "2", "vector_kurtosis"), rel=1e-6)
        assert "act/model/std" in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as active:
        monitor = run(to_mlflow())
    points = mlflow.MlflowClient().get_metric_history(active.info.run_id, "act/model/std")
    assert [point.step for point in points] == [2, 4]
    assert [point.value for point in points] == expected(monitor, "", "std")


def test_mlflow_gets_no_more_than_it_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    sent: list[dict[str, float]] = []
    monkeypatch.setattr("mlflow.log_metrics", lambda metrics, step, run_id: sent.append(metrics))
    numbers = {f"act/{i}@gradient/std": float(i) for i in range(2500)}
    to_mlflow("run")(numbers, 3)
    assert [len(some) for some in sent] == [1000, 1000, 500]
    assert {key: value for some in sent for key, value in some.items()} == {metric_name(key): value for key, value in numbers.items()}


@pytest.mark.filterwarnings("ignore")
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.warns(torchprobe.RecordingWarning, match="no run of wandb is active"):
        run(to_wandb())
    logged: list[dict[str, float]] = []
    active = wandb.init(mode="offline", dir=tmp_path, project="test")
    try:
        original = active.log
        monkeypatch.setattr(active, "log", lambda data, *args, **kwargs: (logged.append(data), original(data, *args, **kwargs)))
        for _ in range(9):
            active.log({"loss": 1.0})  # the step of the run is ahead of ours
        monitor = run(to_wandb())
        last = dict(active.summary)
    finally:
        active.finish()
    ours = [line for line in logged if "act/step" in line]
    assert [line["act/step"] for line in ours] == [2, 4]
    assert [line["act/2/std"] for line in ours] == expected(monitor, "2", "std")
    assert last["act/2/std"] == ours[-1]["act/2/std"]  # it arrived, though 9 steps of the run were logged before
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


# -- padding ---------------------------------------------------------------------------------------------------------------------


def test_which_tensors_are_masks_of_tokens() -> None:
    ids, ones = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    assert token_mask({"input_ids": ids, "attention_mask": ones}).dtype == torch.bool  # type: ignore[union-attr]
    assert token_mask({"inputs_embeds": torch.zeros(2, 5, 3), "attention_mask": ones}) is not None
    assert token_mask({"attention_mask": ones}) is None
    assert token_mask({"input_ids": ids, "attention_mask": torch.ones(2, 1, 5, 5)}) is None
    assert token_mask({"input_features": torch.zeros(2, 80, 5), "attention_mask": ones}) is None
    assert token_mask({"input_ids": ids, "attention_mask": torch.ones(2, 9)}) is None
    labels = torch.tensor([[1, -100], [3, 4]])
    assert target_mask({"labels": labels}).tolist() == [[True, False], [True, True]]  # type: ignore[union-attr]
    assert target_mask({"labels": torch.tensor([1, 0])}) is None
    assert target_mask({"labels": labels, "decoder_attention_mask": torch.tensor([[1, 1], [0, 1]])}).tolist() == [
        [True, True],
        [False, True],
    ]  # type: ignore[union-attr]


def test_a_batch_without_a_mask_counts_whole() -> None:
    model = Tagger()
    batch = {key: torch.stack([row[key] for row in padded(4)]) for key in ("input_ids", "attention_mask")}
    with torchprobe.record(model, "blocks.*") as rec:
        padding = Padding(model, rec)
        handle = padding.place(model)
        model(**batch)
        assert rec["blocks.0"].vectors == int(batch["attention_mask"].sum())
        model(batch["input_ids"])
        assert rec["blocks.0"].vectors == int(batch["attention_mask"].sum()) + 28
        model(batch["input_ids"], batch["attention_mask"])  # by position
        assert rec["blocks.0"].vectors == 2 * int(batch["attention_mask"].sum()) + 28
        handle.remove()


def test_towers_of_images_count_whole_and_decoders_have_their_own_mask() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**small, "vocab_size": 30, "max_position_embeddings": 8},
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    ).eval()
    ids, mask = torch.randint(1, 20, (3, 5)), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    layers = ["text_model.encoder.layers.*", "vision_model.encoder.layers.*"]
    with torchprobe.record(clip, layers) as rec, torch.no_grad():
        handle = Padding(clip, rec).place(clip)
        clip(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(3, 3, 8, 8))
        handle.remove()
    assert {row["layer"].partition("_")[0]: row["vectors"] for row in rec.rows()} == {"text": 10.0, "vision": 15.0}

    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()
    labels = torch.tensor([[4, 5, -100, -100, -100], [4, -100, -100, -100, -100], [1, 2, 3, 4, -100]])  # as many as tokens of the encoder
    with torchprobe.record(t5, ["encoder.block.*", "decoder.block.*", "lm_head"]) as rec, torch.no_grad():
        handle = Padding(t5, rec).place(t5)
        t5(input_ids=ids, attention_mask=mask, labels=labels)
        handle.remove()
    assert {row["layer"].partition(".")[0]: row["vectors"] for row in rec.rows()} == {"encoder": 10.0, "decoder": 7.0, "lm_head": 7.0}


def test_a_statistic_without_masks_is_recorded_with_a_warning() -> None:
    class Calls(torchprobe.statistics.Norms):
        def update(self, x: Tensor, feature_dim: int = -1) -> None:  # type: ignore[override]
            super().update(x, feature_dim)

    model = Tagger()
    batch = {key: torch.stack([row[key] for row in padded(4)]) for key in ("input_ids", "attention_mask")}
    with torchprobe.record(model, "blocks.*", statistic=Calls) as rec:
        with pytest.warns(torchprobe.RecordingWarning, match="padding counts, because its mask cannot be used: Calls.update takes no mask"):
            padding = Padding(model, rec)
        padding.batch(batch)
        model(**batch)
        padding.batch(batch)  # told once
        model(**batch)
    assert rec["blocks.0"].vectors == 2 * 28


def test_threads_that_share_a_batch_cannot_have_masks() -> None:
    model = Tagger()
    with pytest.warns(torchprobe.RecordingWarning, match="padding counts.*DataParallel divides a batch"):
        Padding(nn.DataParallel(model), torchprobe.record(model, "blocks.*"))


# -- accelerate ------------------------------------------------------------------------------------------------------------------


def accelerated(folder: Path, steps: int, resume: Path | None = None, compiled: bool = False, accumulate: int = 1) -> Any:
    """Trains with accelerate, and validates after every second step."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    backend = {"dynamo_backend": "aot_eager"} if compiled else {}
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **backend)
    model = Tagger()
    loader = torch.utils.data.DataLoader(padded(), batch_size=4)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), loader)
    logged: list[tuple[int, dict[str, float]]] = []
    accelerator.log = lambda values, step=None, **_: logged.append((step, values))
    with RecordAccelerate(accelerator, model, "blocks.*", log_every=2) as recording:
        if resume is not None:
            accelerator.load_state(resume)
        for batch in [*loader][recording.monitor.count * accumulate :][: (steps - recording.monitor.count) * accumulate]:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
            recording.step()
            with recording.paused():
                model(**{**batch, "input_ids": batch["input_ids"] * 0})
        accelerator.save_state(folder)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    return recording, logged


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_accelerate(tmp_path: Path, compiled: bool) -> None:
    recording, logged = accelerated(tmp_path / "whole", 6, compiled=compiled)
    counts = [int(row["attention_mask"].sum()) for row in padded()]
    assert recording.history["vectors"].tolist() == [[float(sum(counts[at : at + 8]))] * 2 for at in (0, 8, 16)]
    assert [step for step, _ in logged] == [2, 4, 6]
    assert [values["act/blocks.1/std"] for _, values in logged] == recording.history["std"][:, 1].tolist()
    accelerated(tmp_path / "half", 3, compiled=compiled)
    resumed, _ = accelerated(tmp_path / "end", 6, resume=tmp_path / "half", compiled=compiled)
    assert resumed.history.steps == [2, 4, 6]
    assert np.array_equal(resumed.history.values, recording.history.values, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_accelerate_accumulates(tmp_path: Path) -> None:
    recording, logged = accelerated(tmp_path, 3, accumulate=2)
    counts = [int(row["attention_mask"].sum()) for row in padded()]
    assert [step for step, _ in logged] == [2]
    assert recording.history["vectors"].tolist() == [[float(sum(counts[:16]))] * 2]
    assert recording.recorder["blocks.0"].vectors == sum(counts[16:])  # the window that has begun
