"""Records every block of a ``LightningModule``, logs to the loggers of the trainer, and resumes with its history.

python examples/logging/lightning_callback.py --output runs/lightning
torchprobe watch runs/lightning/run.safetensors

Needs ``pip install lightning``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from torchprobe.integrations.lightning import RecordActivations


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))

    def training_step(self, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), x[:, :4].argmax(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=10, help="steps in a window")
    parser.add_argument("--output", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    recording = RecordActivations(log_every=options.window, save=options.output / "run.safetensors")
    trainer = lightning.Trainer(
        max_steps=options.steps,
        callbacks=[recording],
        logger=CSVLogger(str(options.output)),
        default_root_dir=str(options.output),
        accelerator="cpu",
        enable_progress_bar=False,
    )
    loader = torch.utils.data.DataLoader(torch.randn(32 * options.steps, 16), batch_size=32)  # your data
    trainer.fit(Module(), loader)
    print(recording.history)


if __name__ == "__main__":
    main()
