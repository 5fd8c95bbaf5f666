"""The analysis of "Interpreting CLIP" in miniature, on real handwritten digits: no download, about six minutes on two cores.

    python examples/tiny_clip.py --output tiny-clip

Three encoders are trained on scikit-learn's 1,797 digits. The first is a small CLIP, with open_clip's model and loss, on digits with
captions. The second is its image encoder, fine-tuned with supervision. The third is the same backbone, trained from scratch with
supervision.

Then the whole analysis runs on the three, as it would on ImageNet encoders: zero-shot head, outlier features, privileged directions,
pruning, ablation, concepts, effective robustness, weight interpolation and CKA. The baseline of the robustness is a line through simple
classifiers. The run ends with the path of the comparison page.

It shows that all parts work together, and not the findings of the paper. The three encoders have no outlier features (vector kurtosis
2.95; Gaussian features: 2.91), so ablation is left out. Noise averages out for the simple classifiers of the baseline, but not for the
encoders, so their effective robustness to noise is far below 0. ``torchprobe demo`` has a trained network with outlier features.

Everything is written to --output: the pictures as image folders, the shifted test sets, a small Broden, a CSV of baseline models, three
checkpoints, and a manifest for ``torchprobe interpret --suite``. Needs torchprobe-interp[all] and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from torchprobe.analysis.baseline import Baseline
from torchprobe.cli.tools import console
from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.encoders import Encoder, Head, load_encoder
from torchprobe.encoders.suite import load_suite
from torchprobe.studies.compare import Comparison, write
from torchprobe.studies.compare.report import print_comparison
from torchprobe.studies.interpret.inputs import Inputs
from torchprobe.studies.suite import run_suite

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}.", "the handwritten digit {}.", "the number {}.", "a scan of a {}.")
CAPTIONS = (*TEMPLATES, "a {ink} handwritten {}.", "the digit {}, {ink}.")
"""The captions of pictures. The last two also say how much ink there is, which no class label does."""

MODEL = "tiny-digits"
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SIZE, BATCH, TESTED = 32, 128, 500

Picture = Image.Image


# -- the data --------------------------------------------------------------------------------------------------------------


def pictures() -> tuple[list[Picture], list[int]]:
    """The digits, 32 × 32, in a fixed random order, and their labels. The last 500 are for testing."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = [Image.fromarray((data.images[i] * 255 / 16).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for i in order]
    return [image.convert("RGB") for image in images], [int(data.target[i]) for i in order]


def ink(image: Picture) -> str:
    """How much of the picture is bright. Each of the three words fits a third of the digits."""
    share = float(np.asarray(image, dtype=np.float32).mean()) / 255
    return "thin" if share < 0.287 else "plain" if share < 0.321 else "thick"


def _rotated(image: Picture, random: np.random.Generator) -> Picture:
    return image.rotate(float(random.choice([-1, 1]) * random.uniform(20, 40)), Image.Resampling.BILINEAR)


def _noisy(image: Picture, random: np.random.Generator) -> Picture:
    noise = random.normal(0, 70, (SIZE, SIZE, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def _blurred(image: Picture, random: np.random.Generator) -> Picture:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(2.0, 3.5)))


SHIFTS: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {"rotated": _rotated, "noisy": _noisy, "blurred": _blurred}


def write_folder(folder: Path, images: Sequence[Picture], labels: Sequence[int]) -> None:
    """One folder for each digit, named by its word."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / DIGITS[label] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write_concepts(folder: Path, images: Sequence[Picture], labels: Sequence[int]) -> None:
    """The test pictures as a small Broden: which digit, how much ink, and whether it has a hole or is round."""
    looped, straight = {0, 6, 8, 9}, {1, 4, 7}
    categories = {"digit": list(DIGITS), "ink": ["thin", "plain", "thick"], "shape": ["with a loop", "straight strokes", "other shape"]}
    with BrodenWriter(folder, categories, size=SIZE, image_format="png") as writer:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            shape = "with a loop" if label in looped else "straight strokes" if label in straight else "other shape"
            writer.add(f"digits/{number:04}", image, {"digit": DIGITS[label], "ink": ink(image), "shape": shape})


def write_baseline(path: Path, images: Sequence[Picture], labels: Sequence[int], tests: dict[str, Sequence[Picture]]) -> None:
    """Simple classifiers of pixels, and their accuracies in percent on the test set and on each shift.

    In every baseline the column of the unshifted accuracy is called "imagenet".
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    def pixels(images: Sequence[Picture]) -> np.ndarray:
        return np.stack([np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).ravel() / 255 for image in images])

    x, y = pixels(images[:-TESTED]), np.array(labels[:-TESTED])
    truth = np.array(labels[-TESTED:])
    inputs = {name: pixels(shifted) for name, shifted in tests.items()}
    models = [(f"{k} neighbor{'s' * (k > 1)}, {n} pictures", KNeighborsClassifier(k), n) for k in (1, 5) for n in (60, 150, 400, len(x))]
    models += [(f"logistic regression, {n} pictures", LogisticRegression(max_iter=500), n) for n in (60, 150, 400, len(x))]
    models += [(f"tree of depth {depth}", DecisionTreeClassifier(max_depth=depth, random_state=0), len(x)) for depth in (4, 6, 10)]
    models += [(f"naive Bayes, {n} pictures", GaussianNB(var_smoothing=1e-2), n) for n in (150, len(x))]
    lines = [",".join(["model", *tests])]
    for name, model, n in models:
        model.fit(x[:n], y[:n])
        accuracies = [100 * float((model.predict(inputs[shift]) == truth).mean()) for shift in tests]
        lines.append(",".join([f'"{name}"', *(f"{accuracy:.2f}" for accuracy in accuracies)]))
    path.write_text("\n".join(lines) + "\n")


# -- the three encoders ----------------------------------------------------------------------------------------------------


def tensors(encoder_preprocess: Callable[[Picture], Tensor], images: Sequence[Picture]) -> Tensor:
    return torch.stack([encoder_preprocess(image) for image in images])


def moved(x: Tensor) -> Tensor:
    """The batch, shifted by up to three pixels: the only augmentation."""
    rows, columns = torch.randint(-3, 4, (2,)).tolist()
    return torch.roll(x, (rows, columns), (2, 3))


def optimize(parameters: Sequence[nn.Parameter], loss: Callable[[Tensor], Tensor], pictures: int, epochs: int, rate: float) -> None:
    """AdamW with a warm-up and a cosine schedule. ``loss`` is called with the indices of a batch."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1)
    steps = epochs * (pictures // BATCH)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    )
    for _ in range(epochs):
        for batch in torch.randperm(pictures).split(BATCH)[: pictures // BATCH]:
            optimizer.zero_grad()
            loss(batch).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


def train_clip(x: Tensor, y: Tensor, inks: Sequence[str], epochs: int) -> nn.Module:
    """A CLIP model on pictures and captions, with open_clip's model, tokenizer and loss."""
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL)
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    kinds = ("thin", "plain", "thick")
    texts = [[[template.format(word, ink=kind) for kind in kinds] for word in DIGITS] for template in CAPTIONS]
    tokens = torch.stack([torch.stack([tokenize(words) for words in of_digit]) for of_digit in texts])  # (captions, digits, inks, context)
    kind = torch.tensor([kinds.index(name) for name in inks])
    contrastive = open_clip.ClipLoss()

    def loss(batch: Tensor) -> Tensor:
        template = torch.randint(len(CAPTIONS), batch.shape)
        image, text, scale = model(moved(x[batch]), tokens[template, y[batch], kind[batch]])
        value: Tensor = contrastive(image, text, scale)
        return value

    model.train()
    optimize(list(model.parameters()), loss, len(x), epochs, 2e-3)
    return model.eval()


def supervise(visual: nn.Module, head: Head, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """Trains an image encoder and a head on the labels. The head sees unit vectors, as in CLIP."""

    def loss(batch: Tensor) -> Tensor:
        return functional.cross_entropy(head(visual(moved(x[batch]))), y[batch])

    visual.train()
    optimize([*visual.parameters(), *head.parameters()], loss, len(x), epochs, rate)
    visual.eval()


def save(folder: Path, name: str, encoder: nn.Module, head: Head | None) -> None:
    """Saves the weights as a checkpoint, and the head next to it."""
    save_file({key: value.contiguous() for key, value in encoder.state_dict().items()}, folder / f"{name}.safetensors")
    if head is not None:
        head.save(folder / f"{name}-head.safetensors")


def manifest(folder: Path) -> Path:
    """The three encoders as rows of a suite."""
    rows = (
        ("tiny CLIP", "zero-shot", "digits with captions", "clip.safetensors", "zero-shot"),
        ("tiny CLIP, fine-tuned", "fine-tuned", "digits with captions", "fine-tuned.safetensors", "fine-tuned-head.safetensors"),
        ("supervised from scratch", "supervised", "digits with labels", "supervised.safetensors", "supervised-head.safetensors"),
    )
    lines, source = [], f"open_clip:local-dir:{folder.resolve()}"
    for name, role, pretraining, checkpoint, head in rows:
        lines += ["[[encoder]]", f'name = "{name}"', f'role = "{role}"', f'backbone = "{MODEL}"', f'pretraining = "{pretraining}"',
                  f'source = "{source}"', f'checkpoint = "{checkpoint}"', f'head = "{head}"', ""]  # fmt: skip
    path = folder / "suite.toml"
    path.write_text("\n".join(lines))
    return path


# -- all of it -------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, limit: int | None = None) -> tuple[Encoder, list[Picture], list[int]]:
    """Writes pictures, shifts, concepts and baseline to ``folder``; returns an encoder with random weights, and the training set."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))  # for open_clip:local-dir:FOLDER
    (folder / f"{MODEL}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{MODEL}.json")
    images, labels = pictures()
    if limit is not None:
        images, labels = images[: limit - TESTED] + images[-TESTED:], labels[: limit - TESTED] + labels[-TESTED:]
    tests = {"imagenet": images[-TESTED:]}
    random = np.random.default_rng(1)
    for name, shift in SHIFTS.items():
        tests[name] = [shift(image, random) for image in images[-TESTED:]]
    write_folder(folder / "test", images[-TESTED:], labels[-TESTED:])
    for name in SHIFTS:
        write_folder(folder / "shifts" / name, tests[name], labels[-TESTED:])
    write_concepts(folder / "concepts", images[-TESTED:], labels[-TESTED:])
    write_baseline(folder / "baseline.csv", images, labels, tests)
    return load_encoder(f"open_clip:{MODEL}", pretrained=False), images[:-TESTED], labels[:-TESTED]


def train(folder: Path, epochs: int, limit: int | None = None, say: Callable[[str], None] = print) -> Path:
    """Trains the three encoders; returns the manifest."""
    started = time.monotonic()
    blank, images, labels = prepare(folder, limit)
    x, y = tensors(blank.preprocess, images), torch.tensor(labels)
    clip = train_clip(x, y, [ink(image) for image in images], epochs)
    save(folder, "clip", clip, None)
    say(f"{time.monotonic() - started:5.0f} s  trained a CLIP on {len(x)} digits with captions, {epochs} epochs")

    encoder = load_encoder(f"open_clip:{MODEL}", folder / "clip.safetensors")
    zero_shot = encoder.zero_shot_head(list(DIGITS), list(TEMPLATES))
    scale = clip.logit_scale.exp().item()
    tuned = Head(zero_shot.weight.detach() * scale, torch.zeros(len(DIGITS)), normalize=True, names=DIGITS)
    supervise(encoder.visual, tuned, x, y, max(1, epochs // 3), 3e-4)
    save(folder, "fine-tuned", encoder.visual, tuned)
    say(f"{time.monotonic() - started:5.0f} s  fine-tuned its image encoder with the labels")

    torch.manual_seed(1)
    scratch = load_encoder(f"open_clip:{MODEL}", pretrained=False)
    head = Head(
        functional.normalize(torch.randn(len(DIGITS), scratch.features)) * scale, torch.zeros(len(DIGITS)), normalize=True, names=DIGITS
    )
    supervise(scratch.visual, head, x, y, epochs, 2e-3)
    save(folder, "supervised", scratch.visual, head)
    say(f"{time.monotonic() - started:5.0f} s  trained the same backbone from scratch with the labels")
    return manifest(folder)


def study(folder: Path, suite: Path, resume: bool = False, say: Callable[[str], None] = print) -> Comparison:
    """The whole analysis of the three encoders, and their comparison, in ``folder/study``."""
    inputs = Inputs(
        images=folder / "test",
        shifts={name: folder / "shifts" / name for name in SHIFTS},
        broden=Broden(folder / "concepts"),
        baseline=Baseline.from_csv(folder / "baseline.csv"),
        templates=TEMPLATES,
    )
    found = run_suite(load_suite(suite), inputs, folder / "study", resume=resume, say=say)
    write(found, folder / "study")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("tiny-clip"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--limit", type=int, metavar="N", help="use only N digits, including the 500 for testing")
    parser.add_argument("--resume", action="store_true", help="use the encoders in --output, and continue their analysis")
    options = parser.parse_args()
    if options.limit is not None and options.limit < TESTED + BATCH:
        parser.error(f"--limit must be at least {TESTED + BATCH}: {TESTED} pictures for testing and one batch for training")
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns about random weights, which are intended
    started = time.monotonic()
    suite = options.output / "suite.toml"
    if not (options.resume and suite.exists()):
        options.output.mkdir(parents=True, exist_ok=True)
        suite = train(options.output, options.epochs, options.limit)
    found = study(options.output, suite, options.resume)
    print_comparison(found, console())
    print("A miniature: it shows the parts of the analysis, not the findings of the paper; the head of this script says why.")
    print(f"{time.monotonic() - started:.0f} s in all. The page: {options.output.resolve() / 'study' / 'index.html'}")


if __name__ == "__main__":
    main()
