"""Fine-tunes an image encoder with the recipe of "Interpreting CLIP", and records the kurtosis of every block meanwhile.

    python examples/finetune.py --digits                        # real handwritten digits: no download, half a minute
    python examples/finetune.py --encoder open_clip:ViT-B-32-quickgelu/openai --train imagenet/train --test imagenet/val
    torchrun --nproc-per-node 8 examples/finetune.py …          # the same run on eight GPUs
    python examples/finetune.py … --resume                      # continues an interrupted run, with the same result

The recipe: all weights are trained for 10 epochs, with AdamW, batch 256 and weight decay 0.1. The learning rate reaches 3e-5 after 500
steps of warm-up and then follows a cosine. The head starts as the zero-shot head, and sees representations of length 1.

Recording is on for the whole run. After every --window steps a window closes: it is logged to log.jsonl (and to TensorBoard with
--tensorboard) and stays in the history. The run ends with kurtosis.png, layers × steps, and index.html. Needs
torchprobe-interp[vision,report]; the digits need scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from _training import Data, Log, Process, batches, checked, digits, folders, options_of, processes, recipe_of, report
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

import torchprobe
from torchprobe.common.files import replacing
from torchprobe.encoders import ClipEncoder, Encoder, Head

# -- the recipe --------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = options_of(__doc__, epochs=10, batch=256, lr=3e-5, warmup=500, weight_decay=0.1, output="finetuned")
    parser.add_argument("--encoder", help="open_clip:…, timm:… or torchvision:…, as for torchprobe scan")
    parser.add_argument("--checkpoint", type=Path, help="a local file with its weights")
    parser.add_argument("--classnames", type=Path, help="class names for the zero-shot head, one per line, in the order of the folders")
    if parser.parse_known_args()[0].digits:  # 1,500 pictures and random weights
        parser.set_defaults(batch=100, lr=2e-3, warmup=15, window=5, save=15)
    options = checked(parser)
    if not options.digits and not options.encoder:
        parser.error("give --encoder or --digits")
    return options


def learning_rate(step: int, total: int, options: argparse.Namespace) -> float:
    """The rate of step 1 … total: a linear warm-up, then half a cosine period down to 0."""
    if step <= options.warmup:
        return options.lr * step / options.warmup
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, total - options.warmup)))


def main() -> None:
    options = arguments()
    with processes() as process:
        torch.manual_seed(options.seed)
        if options.digits:
            encoder = tiny_vit()
            data = digits(16, transforms.RandomCrop(16, padding=1))
        else:
            encoder = torchprobe.load_encoder(options.encoder, checkpoint=options.checkpoint)
            # The encoder's own preprocessing resizes and normalizes. We chose the crop before it, which keeps nearly everything.
            size = encoder.preprocess(Image.new("RGB", (512, 512))).shape[-1]
            crop = transforms.RandomResizedCrop(size, (0.9, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
            data = folders(options, transforms.Compose([crop, encoder.preprocess]), encoder.preprocess)
        encoder.to(process.device)
        model = Classifier(encoder, first_head(encoder, data.names, options))
        train(model, data, options, process, learning_rate, functional.cross_entropy)


def first_head(encoder: Encoder, names: list[str], options: argparse.Namespace) -> Head:
    """The zero-shot head if the encoder has a text tower, scaled like the logits of CLIP; otherwise random rows of equal length."""
    classes = len(names)
    if isinstance(encoder, ClipEncoder) and encoder.text is not None:
        if options.classnames:
            names = options.classnames.read_text(encoding="utf-8").splitlines()
        if len(names) != classes:
            raise SystemExit(f"{options.classnames} has {len(names)} names for {classes} classes")
        synsets = classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names)
        head = encoder.zero_shot_head(None if synsets else [name.replace("_", " ") for name in names])
        return Head(100 * head.weight, normalize=True, names=head.names)  # 100 is the logit scale of a trained CLIP
    rows = functional.normalize(torch.randn(classes, encoder.features), dim=-1)
    return Head(rows / 0.07, normalize=True, names=names)  # 1/0.07 is the logit scale of CLIP before training


def tiny_vit() -> Encoder:
    """An image tower from open_clip for pictures of 16 × 16, with random weights."""
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(image_size=16, patch_size=4, width=48, layers=4, heads=4, mlp_ratio=2.0, output_dim=32)
    return Encoder(tower, features=32, preprocess=lambda image: image, name="tiny ViT")


# -- training, with a recorder -----------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, encoder: Encoder, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def train(
    model: Classifier,
    data: Data,
    options: argparse.Namespace,
    process: Process,
    rate: Callable[[int, int, argparse.Namespace], float],
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Trains from the last checkpoint, or from the start, to the end.

    ``rate`` is called with the step, the number of steps and the options.
    """
    model.to(process.device)
    parallel = nn.parallel.DistributedDataParallel(model) if process.count > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    per_epoch = len(data.train) // options.batch
    if per_epoch == 0 or options.batch % process.count:
        raise SystemExit(f"a batch of {options.batch} must fit into {len(data.train)} images and divide by {process.count} processes")
    total = per_epoch * options.epochs

    rec = torchprobe.record(model.encoder, positions=options.positions, every=options.every, when="train")  # every block, and the output
    # With one process the recorder keeps the history. With several, a recorder without hooks keeps the merged windows of all.
    run = rec if process.count == 1 else torchprobe.record(model.encoder, positions=options.positions, every=options.every, when="train")
    step = resumed(options, process, model, optimizer, run)
    log = Log(options, process, step)

    def close_window(loss: float) -> None:
        if run is not rec:
            run.merge(rec.all_reduce())
            rec.reset()
        kurtosis = run.metrics()  # floats for any logger, one copy from the device
        run.snapshot(step)
        log.write(step, {"loss": loss, "lr": rate(step, total, options), **{f"act/{name}": value for name, value in kurtosis.items()}})
        log.say(f"step {step} of {total}: loss {loss:.3f}, vector kurtosis of the representation {kurtosis['/vector_kurtosis']:.2f}")

    accuracy = evaluate(model, data, options, process) if step == total else math.nan  # a finished run only writes its report again
    with rec:
        losses = torch.zeros(2, device=process.device)  # [sum, number] in this window
        while step < total:
            epoch, first = divmod(step, per_epoch)
            for images, labels in batches(data.train, options, process, epoch, first):
                step += 1
                torch.manual_seed(options.seed + step * process.count + process.rank)  # dropout is the same in a resumed run
                model.train()
                for group in optimizer.param_groups:
                    group["lr"] = rate(step, total, options)
                with torch.autocast(process.device.type, torch.bfloat16, enabled=options.bfloat16):
                    loss = loss_of(parallel(images.to(process.device)), labels.to(process.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses += torch.stack([loss.detach(), torch.ones_like(loss)])
                if step % options.window == 0 or step == total:
                    close_window(process.mean(losses))
                    losses.zero_()
                if step % per_epoch == 0:
                    accuracy = evaluate(model, data, options, process)  # in eval mode, so it is not recorded
                    log.write(step, {"accuracy": accuracy})
                    log.say(f"epoch {epoch + 1} of {options.epochs}: accuracy {accuracy:.3f}")
                if step % options.save == 0 or step == total:
                    save(options, process, model, optimizer, run, step)
                    log.say(f"saved step {step}")
    log.close()
    if process.rank == 0:
        report(run, model, model.encoder.name, options, accuracy)


@torch.no_grad()
def evaluate(model: Classifier, data: Data, options: argparse.Namespace, process: Process) -> float:
    """The accuracy on the test set, over all processes; nan without a test set."""
    model.eval()
    correct = torch.zeros(2, device=process.device)
    if data.test is not None:
        mine = Subset(data.test, range(process.rank, len(data.test), process.count))
        for images, labels in DataLoader(mine, options.batch, num_workers=options.workers):
            hits = model(images.to(process.device)).argmax(1) == labels.to(process.device)
            correct += torch.stack([hits.sum(), torch.tensor(len(hits), device=process.device)])
    return process.mean(correct)


# -- interrupted and resumed -------------------------------------------------------------------------------------------


def save(
    options: argparse.Namespace,
    process: Process,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: torchprobe.Recorder,
    step: int,
) -> None:
    """Saves everything that the next step depends on. The order of the images follows from the seed, so it is not saved."""
    if process.rank == 0:
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "recorder": run.state_dict()}
        state["recipe"] = recipe_of(options)
        with replacing(options.output / "checkpoint.pt") as temporary:  # never half a checkpoint
            torch.save(state, temporary)


def resumed(
    options: argparse.Namespace, process: Process, model: nn.Module, optimizer: torch.optim.Optimizer, run: torchprobe.Recorder
) -> int:
    """Loads the last checkpoint with its history and returns its step; 0 if the run starts from the beginning."""
    path = options.output / "checkpoint.pt"
    if not options.resume or not path.exists():
        return 0
    state = torch.load(path, map_location=process.device, weights_only=True)
    now, then = recipe_of(options), state["recipe"]
    if now != then:
        other = ", ".join(
            f"{name} {now.get(name)} instead of {then.get(name)}" for name in {**then, **now} if now.get(name) != then.get(name)
        )
        raise SystemExit(f"{path} has a different recipe: {other}. Resume with the same recipe, or choose another --output")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run.load_state_dict(state["recorder"])
    return int(state["step"])


if __name__ == "__main__":
    main()
