"""Commands of the docs exist with their options; those about dissection, concepts and words run as written, on small stand-ins."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from broden_sets import write_trap_set
from import_sets import photo, write_json
from safetensors.torch import save_file
from torch import Tensor, nn

from torchprobe import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
UNITS = 112


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code of a language; "" for those without one."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, name, code in found if name == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each ``torchprobe …`` in a block. Those with an ellipsis are not whole."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("torchprobe ") and "…" not in line.partition("#")[0]:
                yield shlex.split(line, comments=True)[1:]


def parse(arguments: list[str]) -> None:
    command: Any = cli.cli
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.get_command(click.Context(command), name)
        assert command is not None, name
    command.make_context(command.name, arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.name)
def test_commands_have_the_options_that_the_docs_name(page: Path) -> None:
    for arguments in commands(page):
        parse(arguments)


# -- run as written ------------------------------------------------------------------------------------------------------


class Pictured(nn.Module):
    """A network with a transform: 64 × 64 pixels, from the whole picture."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @staticmethod
    def preprocess(image: Any) -> Tensor:
        import numpy as np

        return torch.from_numpy(np.array(image.convert("RGB").resize((64, 64)))).movedim(2, 0).float() / 255


class Encoder(Pictured):
    """Layers with the names that the docs use."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.visual = nn.Module()
        self.visual.layer4 = nn.Sequential(nn.Conv2d(3, UNITS, 8, stride=4), nn.ReLU())
        self.visual.blocks = nn.ModuleList(nn.Conv2d(UNITS, UNITS, 1) for _ in range(12))

    def forward(self, images: Tensor) -> Tensor:
        x = self.visual.layer4(images - 0.5)
        for block in self.visual.blocks:  # type: ignore[union-attr]
            x = block(x)
        return x.mean((2, 3))


class Labeler(Pictured):
    """Embeds captions by what they are, and images by their colors."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts])


def stand_in(name: str, *_: Any, **__: Any) -> nn.Module:
    torch.manual_seed(0)  # the same network at each load
    return Labeler(name) if name.startswith("open_clip:") else Encoder(name)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the docs take for granted."""
    monkeypatch.setattr("torchprobe.load_encoder", stand_in)
    monkeypatch.setattr("torchprobe.encoders.load_encoder", stand_in)
    monkeypatch.setattr("torchprobe.studies.demo.trained", lambda: (Encoder("demo"), None))
    monkeypatch.chdir(tmp_path)
    write_trap_set(tmp_path / "broden1_224", images=24)
    for i in range(40):
        photo(Path("photos", f"{i}.png"), i, (32, 32))
    instances: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "crack"}]}
    for i in range(6):
        photo(Path("mine/photos/a", f"{i}.jpg"), i, (40, 60))
        instances["images"].append({"id": i, "file_name": f"a/{i}.jpg", "height": 40, "width": 60})
        if i % 2:
            square = [4.0, 4.0, 30.0, 4.0, 30.0, 30.0, 4.0, 30.0]
            instances["annotations"].append({"id": i, "image_id": i, "category_id": 3, "segmentation": [square]})
    write_json(Path("mine/instances.json"), instances)
    (concepts,) = (block for block in blocks(ROOT / "docs/words.md", "") if block.startswith("# concepts.txt"))
    Path("concepts.txt").write_text(concepts)
    weights = torch.randn(2 * UNITS, UNITS)
    save_file({"W_enc": weights.T.contiguous(), "W_dec": weights, "b_enc": -torch.ones(2 * UNITS), "b_dec": torch.zeros(UNITS)},
              "sae_weights.safetensors")  # fmt: skip
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*never active")  # few pictures, untrained units
@pytest.mark.slow("runs every command and block of three pages")
@pytest.mark.parametrize("name", ["dissection.md", "concepts.md", "words.md"])
def test_the_pages_run_as_written(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("PIL", "jinja2", "matplotlib", "captum", "torchvision"):
        pytest.importorskip(package)
    page = ROOT / "docs" / name
    for arguments in commands(page):
        if "r50-finetuned/" in arguments:
            shutil.copytree("r50", "r50-finetuned")
            shutil.copy("r50/visual.layer4.csv", "conv5-result.csv")
        if arguments[0] != "layers":  # of the real network
            with pytest.raises(SystemExit) as ended:
                cli.main(arguments)
            assert ended.value.code == 0 or "--check" in arguments, (arguments, capsys.readouterr().err)  # the set has traps
    shutil.rmtree("mine/broden", ignore_errors=True)  # the same again, in Python
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, name, "exec"), names)
    assert os.path.exists("mine/broden") == (name == "concepts.md")
