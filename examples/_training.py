"""What the training examples share, except the loop: options, images, processes, the log, and the report at the end."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder

import torchprobe
from torchprobe.common.files import replacing
from torchprobe.rendering import plots
from torchprobe.rendering.page import Fact, Page, Picture, Section, Table, write
from torchprobe.rendering.tables import LAYER_COLUMNS, number

Transform = Callable[[Any], Tensor]


# -- options -----------------------------------------------------------------------------------------------------------


def options_of(description: str | None, **recipe: Any) -> argparse.ArgumentParser:
    """The options that all recipes share; ``recipe`` holds the defaults of one."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits and a small network; needs no folders")
    parser.add_argument("--train", type=Path, help="a folder with one folder of images for each class")
    parser.add_argument("--test", type=Path, help="the same, for testing")
    for name in ("epochs", "batch", "warmup"):
        parser.add_argument(f"--{name}", type=int, help="over all processes" if name == "batch" else None)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--window", type=int, default=100, help="steps in one window, which is one column of the history")
    parser.add_argument("--save", type=int, default=500, help="steps between checkpoints, a multiple of --window")
    parser.add_argument("--every", type=int, default=1, help="record every n-th step of a window")
    parser.add_argument("--positions", default="all", choices=("all", "class", "patch", "mean"), help="which positions count as vectors")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.set_defaults(**{**recipe, "output": Path(recipe["output"])})
    return parser


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if not options.digits and not options.train:
        parser.error("give --train or --digits")
    if options.save % options.window:
        parser.error(f"--save {options.save} is not a multiple of --window {options.window}")
    return options


def recipe_of(options: argparse.Namespace) -> dict[str, str]:
    """The options that determine what is learned and recorded."""
    return {name: str(value) for name, value in vars(options).items() if name not in ("resume", "output", "save", "workers", "tensorboard")}


# -- the images --------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    train: Augmented
    test: Dataset[tuple[Tensor, int]] | None
    names: list[str]  # of the classes


class Augmented(Dataset[tuple[Tensor, int]]):
    """A data set with a random transform that depends only on seed, epoch and image, so resumed and parallel runs see the same."""

    def __init__(self, images: Any, transform: Transform) -> None:
        self.images, self.transform = images, transform
        self.seed = self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 1_000_003 + self.epoch) * len(self) + index)
            return self.transform(image), label


def batches(images: Augmented, options: argparse.Namespace, process: Process, epoch: int, first: int) -> DataLoader[Any]:
    """This process's part of the batches of an epoch, from batch number ``first``. An incomplete last batch is left out."""
    images.seed, images.epoch = options.seed, epoch
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed + epoch))
    whole = [batch[process.rank :: process.count].tolist() for batch in order.split(options.batch) if len(batch) == options.batch]
    return DataLoader(images, batch_sampler=whole[first:], num_workers=options.workers, pin_memory=process.device.type == "cuda")


def digits(size: int, transform: Transform) -> Data:
    """scikit-learn's 1,797 handwritten digits (3, size, size), values −1 … 1. The last 297 are the test set."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    pictures = functional.interpolate(pictures, (size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(found.target)
    train, test = TensorDataset(pictures[:1500], labels[:1500]), TensorDataset(pictures[1500:], labels[1500:])
    return Data(Augmented(train, transform), test, [str(name) for name in found.target_names])


def folders(options: argparse.Namespace, transform: Transform, test_transform: Transform) -> Data:
    """Folders of images, one for each class."""
    train = ImageFolder(options.train)
    test = ImageFolder(options.test, transform=test_transform) if options.test else None
    if test is not None and test.classes != train.classes:
        differences = sorted({*test.classes} ^ {*train.classes})
        raise SystemExit(f"{options.test} and {options.train} have different classes: {differences[:5]} …")
    return Data(Augmented(train, transform), test, train.classes)


# -- one process, or several under torchrun ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    device: torch.device
    rank: int = 0
    count: int = 1

    def mean(self, sums: Tensor) -> float:
        """The mean over all processes, from this process's ``[sum, number]``; nan if there are no values."""
        if self.count > 1:
            distributed.all_reduce(sums)
        total, n = sums.tolist()
        return total / n if n else math.nan


@contextlib.contextmanager
def processes() -> Iterator[Process]:
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if "RANK" not in os.environ:
        yield Process(device)
        return
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Process(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


# -- the log and the report --------------------------------------------------------------------------------------------


class Log:
    """A line of JSON for every window and epoch, on the first process. A resumed run first removes the lines after its checkpoint."""

    def __init__(self, options: argparse.Namespace, process: Process, step: int) -> None:
        self.first, self.path, self.board = process.rank == 0, options.output / "log.jsonl", None
        if not self.first:
            return
        options.output.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
        with replacing(self.path) as temporary:
            temporary.write_text("".join(line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= step))
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(options.output), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if self.first:
            plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # JSON has no nan
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **plain}) + "\n")
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)


def report(run: torchprobe.Recorder, model: nn.Module, title: str, options: argparse.Namespace, accuracy: float) -> None:
    """Writes the weights, the recording, the picture and the page."""
    save_file(model.state_dict(), options.output / "model.safetensors")
    run.save(options.output / "recording.safetensors")  # torchprobe.load reads it without the model
    plots.write(run.history.plot(), options.output / "kurtosis.png")
    kurtosis = run.history["vector_kurtosis"][:, run.history.layers.index("")]
    shown = dict.fromkeys([run.layers[(len(run.layers) - 1) // 2], ""])
    page = Page(
        kind="training",
        title=title,
        summary=f"Vector kurtosis of every block in {run.history.steps[-1]:,} steps of training; positions: {options.positions}.",
        facts=[
            Fact("accuracy", number(accuracy), "on the test set, after the last epoch"),
            Fact(
                "vector kurtosis",
                number(float(kurtosis[-1])),
                f"of the representation, last window; {number(float(kurtosis[0]))} in the first",
            ),
            Fact("windows", number(len(run.history)), f"of {options.window} steps"),
        ],
        sections=[
            Section(
                "Layers over steps",
                ["Kurtosis across the features of one vector; mean over the vectors of a window. Hatched: the layer did not run."],
                [Picture(lambda width: run.history.plot(width=width), "heat map of the vector kurtosis, layers by steps")],
            ),
            Section(
                "One layer over steps",
                ["The distribution over the vectors of a window. Where the mean lies far above the median, a few vectors cause it."],
                [
                    Picture(
                        lambda width, layer=layer: run.history.plot_layer(layer, width=width), f"distribution over time, layer {layer!r}"
                    )
                    for layer in shown
                ],
            ),
            Section(
                "Depth",
                ["The last window, in front of the range and the mean of all windows."],
                [Picture(lambda width: run.plot(width=width), "vector kurtosis over depth")],
                [Table(run.total.rows(), LAYER_COLUMNS, "All windows together.")],
            ),
        ],
        footer=[f"torchprobe {torchprobe.__version__}, torch {torch.__version__}"],
    )
    print(write(page, options.output / "index.html"))
