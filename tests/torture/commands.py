"""The commands that are tortured: what each reads, and how it is run. One entry for each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import interpret_sets
import words_sets
from broden_sets import write_trap_set
from dissection_models import Net, preprocess
from PIL import Image

from torchprobe.analysis import embed
from torchprobe.analysis.robustness import Baseline
from torchprobe.datasets import Broden, image_folder, labeled_folder
from torchprobe.dissection import dissect
from torchprobe.studies.dissect import dissect_folder, write_pages
from torchprobe.studies.interpret import interpret
from torchprobe.studies.scan import scan
from torchprobe.studies.scan_report import write_scan
from torchprobe.studies.segment import find_dissections, segment_folder
from torchprobe.studies.words import words_folder, write_word_pages

PAUSE = 0.02
"""Seconds between batches: most of a run is then spent between two of them, when a checkpoint has just been written."""


@dataclass(frozen=True)
class Command:
    """A command.

    ``prepare``: writes its inputs to a folder. ``run``: (inputs, out, resume). ``pictures``: globs of inputs that may be replaced by other
    pictures. ``ranks``: processes that share a run. ``partial``: Ctrl-C ends it with results about what it saw, as documented.
    """

    prepare: Callable[[Path], object]
    run: Callable[[Path, Path, bool], object]
    pictures: tuple[str, ...]
    ranks: int = 1
    partial: bool = False


def pause(*progress: object) -> None:
    time.sleep(PAUSE)


def paint(path: Path, moments: random.Random) -> None:
    """Another picture of the same size and type in the place of one; a label map gets a pixel of label 1."""
    with Image.open(path) as picture:
        changed = picture.convert("RGB")
    is_map = path.suffix == ".png" and path.with_name("_".join(path.name.split("_")[:2]) + ".jpg").exists()
    changed.putpixel((0, 0), (1, 0, 0) if is_map else (moments.randrange(256), 255, moments.randrange(256)))
    changed.save(path)


# -- dissect -----------------------------------------------------------------------------------------------------------------


def _broden(folder: Path) -> None:
    write_trap_set(folder / "broden", images=24)


def _dissect(inputs: Path, out: Path, resume: bool, **options: Any) -> None:
    net, broden = Net(), Broden(inputs / "broden")
    net.preprocess = preprocess  # type: ignore[assignment]

    def pages(results: Any) -> None:
        write_pages(out, results, broden, net, top_images=2, progress=pause)

    settings = {"batch_size": 3, "top": 4, "quantile": 0.05, "preprocess": preprocess, "checkpoint_every": 0.0}
    dissect_folder(net, broden, ["conv", "norm"], out, resume=resume, pages=pages, progress=pause, **{**settings, **options})


def _estimated(inputs: Path, out: Path, resume: bool) -> None:
    _dissect(inputs, out, resume, memory=4_000, iou_permutations=3)


# -- words -------------------------------------------------------------------------------------------------------------------


def _words(inputs: Path, out: Path, resume: bool) -> None:
    images, model = image_folder(inputs / "photos"), words_sets.PlantedUnits([0, 2, 5])

    def pages(results: Any) -> None:
        write_word_pages(out, results, images, top_images=2, progress=pause)

    options = {"templates": ["{}"], "preprocess": words_sets.preprocess, "permutations": 9, "batch_size": 8, "checkpoint_every": 0.0}
    labeler = words_sets.PlantedClip()
    words_folder(
        model, images, ["maps", "pool"], out, labeler, words_sets.WORDS, resume=resume, pages=pages, progress=pause, **options
    )  # fmt: skip


# -- segment -----------------------------------------------------------------------------------------------------------------


def _pictures(folder: Path) -> None:
    _broden(folder)
    net, broden = Net(), Broden(folder / "broden")
    found = dissect(net, "conv", broden, batch_size=3, top=4, quantile=0.05, preprocess=preprocess)
    found["conv"].save(folder / "conv.safetensors")
    (folder / "new").mkdir()
    for number in range(8):
        broden.image(number).save(folder / "new" / f"{number}.png")


def _segment(inputs: Path, out: Path, resume: bool) -> None:
    found = find_dissections(inputs / "conv.safetensors")
    segment_folder(found, Net(), [inputs / "new"], out, maps=True, progress=pause, preprocess=preprocess)


# -- embed, interpret, scan --------------------------------------------------------------------------------------------------


def _classes(folder: Path) -> None:
    interpret_sets.write_classes(folder / "images")
    interpret_sets.write_classes(folder / "noisy", each=6, strength=5.0, seed=5)
    interpret_sets.write_concepts(folder / "concepts")
    interpret_sets.write_baseline(folder / "baseline.csv")


def _embed(inputs: Path, out: Path, resume: bool) -> None:
    out.mkdir(exist_ok=True)
    data = labeled_folder(inputs / "images", names=interpret_sets.CLASSES)
    embed(interpret_sets.encoder(), data, batch_size=4, path=out / "embeddings.safetensors", resume=resume, progress=pause)


def _interpret(inputs: Path, out: Path, resume: bool) -> None:
    model = interpret_sets.encoder()
    interpret(
        model, labeled_folder(inputs / "images", names=interpret_sets.CLASSES), out, head=interpret_sets.head(model),
        shifts={"noisy": labeled_folder(inputs / "noisy", names=interpret_sets.CLASSES)}, broden=Broden(inputs / "concepts"),
        baseline=Baseline.from_csv(inputs / "baseline.csv"), batch_size=8, resume=resume, progress=pause,
    )  # fmt: skip


def _scan(inputs: Path, out: Path, resume: bool) -> None:
    write_scan(scan(interpret_sets.encoder(), image_folder(inputs / "images"), batch_size=4, progress=pause), out)


COMMANDS = {
    "dissect": Command(_broden, _dissect, ("broden/images/*/*.jpg", "broden/images/*/*.png")),
    "dissect-estimated": Command(_broden, _estimated, ("broden/images/*/*.jpg", "broden/images/*/*.png")),
    "dissect-ranks": Command(_broden, _dissect, ("broden/images/*/*.jpg",), ranks=2),
    "dissect-estimated-ranks": Command(_broden, _estimated, ("broden/images/*/*.jpg",), ranks=2),
    "words": Command(lambda folder: words_sets.write_images(folder / "photos", 48), _words, ("photos/*.png",)),
    "words-ranks": Command(lambda folder: words_sets.write_images(folder / "photos", 48), _words, ("photos/*.png",), ranks=2),
    "segment": Command(_pictures, _segment, ("new/*.png",)),
    "embed": Command(_classes, _embed, ("images/*/*.png",)),
    "interpret": Command(_classes, _interpret, ("images/*/*.png", "noisy/*/*.png", "concepts/images/mine/*.png")),
    "scan": Command(_classes, _scan, ("images/*/*.png",), partial=True),
}
