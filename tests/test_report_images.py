"""A report says which images were used, how the network was shown them, and which labels it was not shown."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision.transforms import v2

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.report import write_report
from torchprobe.dissection.report_images import caption, images, outside
from torchprobe.studies.dissect import print_dissections

CROP = v2.Compose([v2.CenterCrop(40), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
WHOLE = v2.Compose([v2.Resize((40, 40)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(scope="module")
def broden(tmp_path_factory: pytest.TempPathFactory) -> Broden:
    """80 × 80: "edge" is the 10 rows at the top, "half" the left half, "middle" the 20 × 20 in the middle."""
    folder, rng = tmp_path_factory.mktemp("broden"), np.random.default_rng(0)
    with BrodenWriter(folder, {"part": ["edge", "<b>half</b>"], "object": ["middle"]}, size=None, min_frequency=0) as writer:
        for i in range(12):
            part, thing = np.zeros((80, 80), int), np.zeros((80, 80), int)
            part[:10], part[10:, :40], thing[30:50, 30:50] = 1, 2, 1
            writer.add(f"a/{i}", rng.integers(0, 256, (80, 80, 3)).astype(np.uint8), {"part": part, "object": thing})
    return Broden(folder)


def made(broden: Broden, **options: object) -> Dissection:
    torch.manual_seed(0)
    return dissect(nn.Conv2d(3, 4, 8, 8), "", broden, **{"quantile": 0.05, "top": 2, **options})[""]  # type: ignore[arg-type]


def test_what_lies_outside_is_said(broden: Broden) -> None:
    d = made(broden, preprocess=CROP)
    # The crop shows rows and columns 20 to 59. Of the half, rows 10 to 79 and columns 0 to 39, it shows 40 × 20.
    # Label maps have half the size.
    lost = {"edge": 12 * 800 // 4, "<b>half</b>": 12 * (70 * 40 - 40 * 20) // 4, "middle": 0}
    assert {label.name: int(n) for label, n in zip(d.labels, d.outside, strict=True)} == lost
    text = outside(d)
    assert f"{sum(lost.values()):,} label pixels (70 %)" in text  # 2,800 of 2,800 + 1,200
    assert "edge (100 %), <b>half</b> (71 %)." in text and "middle" not in text
    assert outside(made(broden, preprocess=WHOLE)) == ""
    by_rank = made(broden, preprocess=CROP, score="ap")
    assert (
        outside(by_rank)
        == f"The network was shown a part of the pictures: {sum(lost.values()):,} label pixels outside of it count nowhere."
    )
    d.outside = None
    assert outside(d) == ""


def test_the_images_are_said(broden: Broden) -> None:
    data, how = images(made(broden, preprocess=CROP))
    assert data == f"Data set: {broden.root.name}; 12 images; all splits; categories part, object."
    assert how.startswith("Preprocessing: Compose( CenterCrop(size=(40, 40)) ") and "\n" not in how
    assert "shows a part: rows 25.0% – 75.0%, columns 25.0% – 75.0% of a picture of 80 × 80 pixels." in how
    part = made(Broden(broden.root, "train", ["object"]), preprocess=WHOLE)
    assert f"; {len(part.images)} images; split train; category object." in images(part)[0]
    assert images(part)[1].endswith("shows the whole picture.")
    part.metadata["preprocessing"]["transform"] = "x\n y" * 999
    assert images(part)[1].startswith("Preprocessing: x yx yx") and len(images(part)[1]) < 500
    del part.metadata["preprocessing"], part.metadata["dataset"]["split"], part.metadata["dataset"]["categories"]  # a file of before
    assert images(part) == [f"Data set: {broden.root.name}; {len(part.images)} images."]
    part.metadata["dataset"] = "something else"
    assert images(part) == [] and caption(part) == ""


def test_the_page_and_the_terminal_say_it(broden: Broden, tmp_path: Path) -> None:
    d = made(broden, preprocess=CROP)
    page = write_report(d, tmp_path / "a.html").read_text(encoding="utf-8")
    notice = page.partition('<p class="notice"')[2].partition("</p>")[0]
    assert "The network was shown a part of the pictures" in notice and "&lt;b&gt;half&lt;/b&gt; (71 %)" in notice
    footer = page.partition("<footer>")[2].partition("</footer>")[0]
    assert "all splits; categories part, object." in footer and "Preprocessing: Compose( CenterCrop(size=(40, 40)) " in footer
    assert "<b>half" not in page.partition('<script type="application/json"')[0]
    null = write_report(made(broden, preprocess=CROP, shuffle_labels=0), tmp_path / "b.html").read_text(encoding="utf-8")
    assert "A null: the labels of the images were shuffled." in null and "count nowhere" in null
    assert 'class="notice"' not in write_report(made(broden, preprocess=WHOLE), tmp_path / "c.html").read_text(encoding="utf-8")
    out = io.StringIO()
    print_dissections({"": d, "again": d}, {}, Console(file=out, width=1000))
    assert out.getvalue().count(caption(d)) == 1
