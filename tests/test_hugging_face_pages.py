"""From a folder as save_pretrained writes it to a page, by the command line: images and texts, each with words of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import hugging_face_models as models
import interpret_sets as sets
import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")

IMAGES = ("clip", "siglip", "siglip2", "dinov2")
TEXTS = ("GPT2LMHeadModel", "BertModel", "clip")


def written(folder: Path, which: str) -> Path:
    folder.mkdir()
    if which in models.TOWERS:
        models.two_towers(folder, which)
    elif which in models.IMAGES:
        models.image_model(folder, which)
    else:
        models.language_model(folder, which)
    return folder


def command(name: str, model: Path, out: Path, *inputs: str) -> tuple[str, dict[str, Any]]:
    """The text of the page, without what is not a sentence; and the results."""
    from torchprobe.cli import main

    with pytest.raises(SystemExit) as left:
        main([name, f"hf:{model}", *inputs, "--out", str(out), "--device", "cpu", "--batch-size", "8"])
    assert left.value.code == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    plain = re.sub(r"<(style|script)\b.*?</\1>|<(?!text|tspan)[^>]+>", " ", page, flags=re.DOTALL)
    return plain, json.loads((out / ("results.json" if name == "interpret" else "summary.json")).read_text())


@pytest.mark.slow("a whole interpretation of each model")
@pytest.mark.parametrize("which", IMAGES)
def test_images(which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sets.write_classes(tmp_path / "images", each=5)
    head = ["--template", "a photo of {}"] if which in models.TOWERS else []
    page, results = command("interpret", written(tmp_path / "model", which), tmp_path / "out", "--images", str(images), *head)
    log = capsys.readouterr().err
    assert results["data"]["imagenet"]["images"] == 15 and results["layers"]["images"] == 15
    assert "vector kurtosis of an image" in page and "image" in page and "Over depth" in page
    assert "layers" not in results["skipped"] and results["layers"]["hidden"].startswith("In the hidden states of 15 inputs")
    assert ("accuracy" in results) == (which in models.TOWERS)
    assert "images: imagenet: 0 of 15 images" in log and "measures …" in log and "figures and page …" in log
    assert ("captions of the zero-shot head …" in log) == (which in models.TOWERS)
    assert "Traceback" not in log and "Note" not in log


@pytest.mark.slow("a whole interpretation of each model")
@pytest.mark.parametrize("which", TEXTS)
def test_texts(which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = models.WORDS
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 3 + i % 5)) for i in range(1, 25)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    model = written(tmp_path / "model", which)
    for name in ("interpret", "scan"):
        page, results = command(name, model, tmp_path / name, "--texts", str(tmp_path / "captions.txt"))
        printed, log = capsys.readouterr()
        assert "vector kurtosis of a text" in page and "24 texts" in page
        spoken = page.replace("--images", "").replace(str(tmp_path), "")
        assert re.findall(r"[^.\n]*\b[Ii]mages?\b[^.\n]*", spoken) == []
        assert re.findall(r".*\bimages?\b.*", printed.replace(str(tmp_path), "")) == []
        assert re.findall(r".*\bimages?\b.*", log) == [] and "24 texts" in log
        if name == "interpret":
            assert results["about"]["modality"] == "text" and results["layers"]["images"] == 24


def test_only_our_own_words_are_replaced() -> None:
    from torchprobe.rendering.page import Page, Section, Table
    from torchprobe.rendering.tables import Column
    from torchprobe.rendering.wording import worded_page

    table = Table([{"image": "image of a cat", "what": "mean over images"}], [Column("image", "image", "an image", "text"),
                                                                              Column("what", "", "", "text")])  # fmt: skip
    page = Page("scan", "hf:image-gpt", "One pass over 3 images.", sections=[Section("Images", ["In each image."], tables=[table])])
    found = worded_page(page, "text")
    assert (found.title, found.summary, found.sections[0].title) == ("hf:image-gpt", "One pass over 3 texts.", "Texts")
    assert found.sections[0].tables[0].rows == [{"image": "image of a cat", "what": "mean over texts"}]
    assert found.sections[0].tables[0].columns[0] == Column("image", "text", "a text", "text")
    assert worded_page(page, "image") is page
