"""Networks at random initialization: their batch norms have the statistics of the images, on every path of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpret_sets as sets
import pytest
import torch
from torch import Tensor, nn

from torchprobe.analysis.interpolation import recalibrate_batch_norms
from torchprobe.analysis.positions import LayerEncoder
from torchprobe.datasets import image_folder, labeled_folder
from torchprobe.encoders import Encoder
from torchprobe.studies.calibration import recalibrate_on

pytestmark = pytest.mark.usefixtures("undrawn")


class Normed(nn.Module):
    """Its batch norm sees values far from the initial statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 48, 3), nn.BatchNorm2d(48))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images * 100).mean((2, 3))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Encoder]:
    """The encoders that commands load: random, or trained ones with a batch norm that must not be touched."""
    encoders: list[Encoder] = []

    def load(name: str, checkpoint: Any = None, *, pretrained: bool = True, **_: Any) -> Encoder:
        encoders.append(Encoder(Normed(), features=48, preprocess=sets.pixels, name=name).eval())
        return encoders[-1]

    monkeypatch.setattr("torchprobe.encoders.load_encoder", load)
    return encoders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sets.write_classes(tmp_path / "images", each=6)


def command(name: str, folder: Path, tmp_path: Path, *more: str) -> list[str]:
    if name == "dissect":
        sets.write_concepts(tmp_path / "concepts", 18)
        inputs = ["--broden", str(tmp_path / "concepts"), "--layers", "visual.blocks.3", "--pictures", "0"]
    else:
        inputs = ["--images", str(folder)]
    return [name, "toy:normed", *inputs, "--out", str(tmp_path / "out"), "--device", "cpu", "--batch-size", "6", "--json", *more]


def expected(encoder: Encoder, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the first batch norm, and that of the second after it."""
    first = encoder.network.blocks[0](pictures * 100)
    normed = encoder.network.blocks[1](first)
    return first.mean((0, 2, 3)), encoder.network.blocks[2](normed).mean((0, 2, 3))


@pytest.mark.filterwarnings("ignore:.*units are never active")
@pytest.mark.parametrize("name", ["scan", "interpret", "dissect"])
def test_commands_recalibrate_random_networks_alone(name: str, made: list[Encoder], folder: Path, tmp_path: Path, capsys: Any) -> None:
    from torchprobe.cli import main

    with pytest.raises(SystemExit) as left:
        main(command(name, folder, tmp_path, "--random-init"))
    assert left.value.code == 0, capsys.readouterr().err
    network = made[0].network
    assert network.blocks[1].num_batches_tracked == 3
    if name != "dissect":
        (batch,) = image_folder(folder).batches(sets.pixels, 100)
        first, second = expected(made[0], batch.pixels)
        torch.testing.assert_close(network.blocks[1].running_mean, first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.blocks[3].running_mean, second, rtol=0.05, atol=0.02)  # in batches, not in one
        printed = json.loads(capsys.readouterr().out)
        rows = printed["layers"] if name == "scan" else printed["layers"]["rows"]
        (last,) = [row for row in rows if row["layer"] == "visual.blocks.3"]
        assert last["std"] == pytest.approx(1, abs=0.15)  # the output of the batch norm; about 1e2 with its initial statistics
    with pytest.raises(SystemExit):
        main(command(name, folder, tmp_path / "trained"))
    assert made[1].network.blocks[1].num_batches_tracked == 0


def test_the_layer_of_a_random_network_is_read_after_it_was_recalibrated(
    made: list[Encoder], folder: Path, tmp_path: Path, capsys: Any
) -> None:
    from torchprobe.cli import main

    more = ["--random-init", "--layer", "visual.blocks.1", "--position", "mean"]
    for name in ("scan", "interpret"):
        with pytest.raises(SystemExit) as left:
            main(command(name, folder, tmp_path / name, *more))
        assert left.value.code == 0, capsys.readouterr().err
        assert made[-1].network.blocks[1].num_batches_tracked == 3
    with pytest.raises(ValueError, match="no batch norm of LayerEncoder took statistics"):
        recalibrate_batch_norms(LayerEncoder(made[-1], "visual.blocks.1", "mean", torch.randn(2, 3, 12, 12)), [torch.randn(2, 3, 12, 12)])


def test_the_sample_is_random_and_its_batches_are_of_one_size(folder: Path) -> None:
    seen: list[Tensor] = []
    encoder = Encoder(Normed(), features=48, preprocess=sets.pixels).eval()
    encoder.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = labeled_folder(folder)
    assert recalibrate_on(encoder, images, batch_size=4, limit=11) == 2
    assert [len(each) for each in seen] == [4, 4]
    (batch,) = images.batches(sets.pixels, 100)
    numbers = [int((batch.pixels == picture).flatten(1).all(1).nonzero()[0, 0]) for picture in torch.cat(seen)]
    assert len({number // 6 for number in numbers}) > 1 and numbers != list(range(8))  # the folders come one after the other
    seen.clear()
    recalibrate_on(encoder, images, batch_size=100)
    assert [len(each) for each in seen] == [18]


def test_without_batch_norms_nothing_runs(folder: Path) -> None:
    encoder: Callable[..., Any] = sets.encoder()
    encoder.network.fail = True  # type: ignore[attr-defined]
    assert recalibrate_on(encoder, image_folder(folder)) == 0  # type: ignore[arg-type]
