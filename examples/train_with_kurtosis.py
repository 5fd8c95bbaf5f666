"""Layer-wise kurtosis while a network trains, on 1,797 real handwritten digits: no download, a minute on two cores.

    python examples/train_with_kurtosis.py --epochs 8

Recording is on for the whole run. Every epoch closes a window, and its numbers stay in ``rec.history``. Validation is not recorded. The
recorder is saved and resumed with the model, so an interrupted run continues its history (``--resume``). Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchprobe


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64), pixels 0 … 1, as vectors, and their labels."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def network(width: int = 128, depth: int = 4) -> nn.Sequential:
    block = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), *block, nn.Linear(width, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("digits-run"))
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / "checkpoint.pt"

    torch.manual_seed(0)
    x, y = digits()
    train, held_out = slice(0, 1500), slice(1500, None)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = 0

    with torchprobe.record(model, "*") as rec:  # every layer
        if options.resume and checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            rec.load_state_dict(saved["recorder"])
            first = saved["epoch"] + 1
        for epoch in range(first, options.epochs):
            order = torch.randperm(1500, generator=torch.Generator().manual_seed(epoch))
            for batch in order.split(100):
                loss = nn.functional.cross_entropy(model(x[train][batch]), y[train][batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with rec.paused(), torch.no_grad():  # validation is not recorded
                accuracy = (model(x[held_out]).argmax(1) == y[held_out]).float().mean().item()
            numbers = rec.metrics()  # floats for any logger, one copy from the device
            rec.snapshot(epoch)
            last = rec.layers[-1]
            print(f"epoch {epoch}: accuracy {accuracy:.3f}, vector kurtosis of layer {last} {numbers[f'{last}/vector_kurtosis']:.2f}")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recorder": rec.state_dict(), "epoch": epoch}, checkpoint
            )

    print("vector kurtosis of each layer, first and last epoch:")
    kurtosis = rec.history["vector_kurtosis"]  # (epochs, layers)
    for layer, before, after in zip(rec.layers, kurtosis[0], kurtosis[-1], strict=True):
        print(f"  {layer:>3}  {before:.2f} → {after:.2f}")
    rec.total.save(options.output / "recording.safetensors")
    print(f"saved to {options.output / 'recording.safetensors'}; torchprobe.load reads it without the model")


if __name__ == "__main__":
    main()
