"""The callback of Lightning, with the real package: one rank and two, eager and compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import group
from torch import Tensor
from training_runs import Seen, Tagger, X, network, padded

from torchprobe.integrations.lightning import RecordActivations
from torchprobe.statistics import Moments

pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = [f"net.{i}" for i in range(6)]


def lightning_module(tokens: bool = False, fails_at: int | None = None, compiled: bool = False) -> Any:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Tagger() if tokens else network()
            if compiled:
                self.net.compile(backend="aot_eager")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == fails_at:
                raise ZeroDivisionError("planted")
            return self.net(**batch)["loss"] if tokens else self.net(batch).square().sum()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(**batch) if tokens else self.net(batch + 100)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(padded() if tokens else X, batch_size=4)

        val_dataloader = train_dataloader

    return Module()


def fit(folder: Path, epochs: int, module: Any = None, resume: Any = None, callback: Any = None, **options: Any) -> tuple[Any, Any]:
    import lightning
    from lightning.pytorch.loggers import CSVLogger

    callback = callback or RecordActivations(log_every=2)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(str(folder / "logs")),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=str(folder),
        **options,
    )
    trainer.fit(module or lightning_module(), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.lightning_module.modules())
    return trainer, callback


def test_a_fit(tmp_path: Path) -> None:
    trainer, whole = fit(tmp_path, 2)
    assert whole.recorder.layers == LAYERS
    assert whole.history.steps == [2, 4, 6, 8, 10, 12]
    assert whole.history["vectors"].tolist() == [[8.0] * 6] * 6  # two batches in a window, neither sanity checks nor validation
    assert whole.history["max"].max() < 10  # validation would show
    logged = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert set(logged[0].split(",")) >= {f"act/{layer}/{field}" for layer in LAYERS for field in Moments.metric_fields}
    assert [line.split(",")[logged[0].split(",").index("step")] for line in logged[1:]] == ["2", "4", "6", "8", "10", "12"]


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, 2)
    _, first = fit(tmp_path, 1)
    _, resumed = fit(tmp_path, 2, resume=tmp_path / "1.ckpt")
    assert first.history.steps == [2, 4, 6]
    assert resumed.history.steps == whole.history.steps
    assert np.array_equal(resumed.history.values, whole.history.values, equal_nan=True)


def test_accumulated_gradients(tmp_path: Path) -> None:
    _, accumulated = fit(tmp_path, 2, accumulate_grad_batches=2)
    assert accumulated.history.steps == [2, 4, 6]
    assert accumulated.history["vectors"].tolist() == [[16.0] * 6] * 3


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_does_not_count(tmp_path: Path, compiled: bool) -> None:
    seen_module = lightning_module(tokens=True)
    seen = Seen(seen_module.net, {f"net.blocks.{i}": block for i, block in enumerate(seen_module.net.blocks)})
    import lightning

    lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    ).fit(seen_module)
    _, recording = fit(
        tmp_path, 1, lightning_module(tokens=True, compiled=compiled), callback=RecordActivations("net.blocks.*", log_every=2)
    )
    for name in ("net.blocks.0", "net.blocks.1"):
        values, found = seen.all(name), recording.recorder.total[name]
        assert found.vectors == len(values) == sum(int(row["attention_mask"].sum()) for row in padded())
        torch.testing.assert_close(found.mean, values.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.std, values.std(0, correction=0), rtol=1e-5, atol=1e-7)


def test_a_fit_that_fails_leaves_no_hook(tmp_path: Path) -> None:
    module, callback = lightning_module(fails_at=3), RecordActivations(log_every=1)
    with pytest.raises(ZeroDivisionError, match="planted"):
        fit(tmp_path, 1, module, callback=callback)
    assert not any(m._forward_hooks for m in module.modules())
    assert callback.history.steps == [1, 2, 3]


RANKS = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_integrations_lightning as t
folder = Path({folder!r})
rank = int(os.environ["RANK"])
for name, options in (("whole", dict(epochs=2)), ("parts", dict(epochs=1)), ("parts", dict(epochs=2, resume=folder / "parts" / "1.ckpt"))):
    trainer, callback = t.fit(folder / name, devices=2, strategy="ddp", **options)
found = callback.history
merged = callback.recorder.all_reduce().total
own = callback.recorder.total["net.2"].vectors
print(json.dumps([found.steps, found["vectors"].tolist(), found["std"].tolist(), merged["net.2"].vectors, own]))
(folder / f"logged-{{rank}}").write_text("\\n".join(p.read_text() for p in sorted((folder / "whole").rglob("metrics.csv"))))
"""


@pytest.mark.slow("starts two processes that import the package")
def test_two_ranks_log_the_numbers_of_both(tmp_path: Path) -> None:
    code = RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = group(2, code)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    first, second = (json.loads(one.stdout.strip().splitlines()[-1]) for one in done)
    steps, vectors, std, merged, own = first
    assert first[:4] == second[:4]
    assert steps == [2, 4, 6]  # three steps of two ranks in an epoch
    assert vectors == [[16.0] * 6] * 3
    assert merged == 48  # of the resumed run, nothing twice and nothing lost
    assert own + second[4] == 48
    logged = (tmp_path / "logged-0").read_text().splitlines()
    head = logged[0].split(",")
    column = [float(line.split(",")[head.index("act/net.0/std")]) for line in logged[1:]]
    assert column == pytest.approx([row[0] for row in std], rel=1e-9)  # of the uninterrupted run
