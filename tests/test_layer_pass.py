"""One pass for representations, layers and hidden states; and layers whose features are in a dimension that has to be named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpret_sets as sets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchprobe.analysis import Embeddings, embed
from torchprobe.analysis.hidden_states import hidden_outliers
from torchprobe.datasets import image_folder, labeled_folder
from torchprobe.datasets.images import Batch
from torchprobe.encoders import Encoder
from torchprobe.recording import RecordingWarning, record, select_layers
from torchprobe.studies.interpret import interpret
from torchprobe.studies.layer_pass import LayerPass
from torchprobe.studies.scan import scan

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sets.write_classes(tmp_path / "images", each=9)


class Counting(nn.Module):
    """Colors with a token layer in between; counts the inputs that it sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patches = nn.Conv2d(3, 48, 4, stride=4)
        self.blocks = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
        self.seen: list[int] = []
        with torch.no_grad():
            self.blocks[1].bias[11] = 50

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1)


def counting() -> Encoder:
    return Encoder(Counting(), features=48, preprocess=sets.pixels, name="counting").eval()


def test_layers_and_hidden_states_cost_no_pass_of_their_own(folder: Path, tmp_path: Path) -> None:
    encoder = counting()
    found = interpret(encoder, labeled_folder(folder), tmp_path / "out", batch_size=8)
    assert found.results["layers"]["images"] == 27
    assert found.results["layers"]["hidden"].startswith("In the hidden states of 27 inputs, 1 feature stand")
    assert sorted(encoder.network.seen) == [3, 3, 8, 8, 8]  # 27 images, and the first few that show how the layers are laid out
    alone = record(encoder, ["", "visual.blocks.*"])
    with alone, torch.no_grad():
        for batch in image_folder(folder).batches(sets.pixels, 27):
            encoder(batch.pixels)
    for row in found.results["layers"]["rows"]:
        moments = alone.total[row["layer"]]
        assert row["vectors"] == moments.vectors
        assert row["vector_kurtosis"] == pytest.approx(moments.vector_kurtosis, rel=1e-5)


@pytest.mark.parametrize("asked", [1, 8, 9, 1000])
def test_the_sample_is_random_and_filled_up_to_batches(folder: Path, tmp_path: Path, asked: int) -> None:
    encoder = counting()
    found = interpret(encoder, labeled_folder(folder), tmp_path / "out", batch_size=8, layer_images=asked)
    images = found.results["layers"]["images"]
    assert images == {1: 8, 8: 8, 9: 16, 1000: 27}[asked]
    embeddings = Embeddings.load(tmp_path / "out" / "embeddings" / "imagenet.safetensors")
    first = embeddings.ids[:images]
    assert len({name.split("/")[0] for name in first}) == 3  # not the first class alone
    states = {row["layer"]: row for row in found.results["layers"]["rows"]}
    kept = embeddings.h[:images].double()
    deviation = kept - kept.mean(1, keepdim=True)
    kappa = (deviation**4).mean(1) / (deviation**2).mean(1) ** 2
    assert states[""]["vector_kurtosis"] == pytest.approx(float(kappa.mean()), rel=1e-5)


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_run_that_was_interrupted_while_it_recorded_finds_the_same(folder: Path, tmp_path: Path, batches: int) -> None:
    images = labeled_folder(folder)
    whole = interpret(counting(), images, tmp_path / "whole", batch_size=8, layer_images=16)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > batches

    with pytest.raises(KeyboardInterrupt):
        interpret(counting(), images, tmp_path / "again", batch_size=8, layer_images=16, stop=stop)
    again = interpret(counting(), images, tmp_path / "again", batch_size=8, layer_images=16, resume=True)
    assert again.results == whole.results
    encoder = counting()
    assert interpret(encoder, images, tmp_path / "again", batch_size=8, layer_images=16, resume=True).results == whole.results
    assert encoder.network.seen == []  # nothing is computed twice


def test_unreadable_images_are_counted_in_the_sample(folder: Path, tmp_path: Path) -> None:
    (folder / "blue" / "00.png").write_bytes(b"no picture")
    found = interpret(counting(), labeled_folder(folder), tmp_path / "out", batch_size=8).results["layers"]
    assert (found["images"], found["skipped"]) == (26, 1)


def test_scan_reads_the_hidden_states_in_its_only_pass(folder: Path) -> None:
    encoder, images = counting(), image_folder(folder)
    found = scan(encoder, images, batch_size=8)
    assert sorted(encoder.network.seen) == [3, 3, 8, 8, 8]
    (batch,) = images.batches(sets.pixels, 27)
    layers = select_layers(encoder, "visual.blocks.*")
    assert repr(found.hidden) == repr(hidden_outliers(encoder, [batch.pixels], layers))  # nan is not equal to itself


# -- the dimension of the features ------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A layer of its own that returns (images, features, tokens) of a shape that says nothing: 6 × 6."""

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(2)[:, :2, :18].reshape(len(images), 6, 6)
        return x + torch.arange(6.0)[:, None] * 100  # a feature is a row


class Unsure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.last = Mixed(), nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.mixed(images).sum(2))


def unsure() -> Encoder:
    return Encoder(Unsure(), features=6, preprocess=sets.pixels, name="unsure").eval()


def vectors(folder: Path) -> Tensor:
    (batch,) = image_folder(folder).batches(sets.pixels, 100)
    return Mixed()(batch.pixels).transpose(1, 2)  # (images, tokens, features)


def test_a_layer_that_is_unsure_is_read_once_its_dimension_is_named(folder: Path) -> None:
    (batch,) = image_folder(folder).batches(sets.pixels, 100)
    with pytest.raises(ValueError, match=r"unsure which of its dimensions.*feature_dim"):
        embed(unsure(), list(batch.pixels), layer="visual.mixed", position="all")
    for given in (1, -2, {"visual.mixed": 1}, {"visual.*": 1}):
        found = embed(unsure(), list(batch.pixels), layer="visual.mixed", position="all", feature_dim=given)
        assert torch.equal(found.h, vectors(folder).flatten(0, 1))
    other = embed(unsure(), list(batch.pixels), layer="visual.mixed", position="all", feature_dim=2)
    assert not torch.equal(other.h, found.h)
    with pytest.raises(ValueError, match="name a layer"):
        embed(unsure(), list(batch.pixels), feature_dim=1)
    with pytest.raises(ValueError, match=r"no dimension feature_dim=3"):
        embed(unsure(), list(batch.pixels), layer="visual.mixed", position="all", feature_dim=3)


def test_another_dimension_is_another_representation(folder: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"layer": "visual.mixed", "position": "all", "path": tmp_path / "e.safetensors"}
    encoder = unsure()
    embed(encoder, image_folder(folder), **given, feature_dim=1)
    with pytest.raises(ValueError, match="another feature_dim"):
        embed(encoder, image_folder(folder), **given, feature_dim=2)


def of_scan(encoder: Encoder, folder: Path, tmp_path: Path, **more: Any) -> list[dict[str, Any]]:
    return scan(encoder, image_folder(folder), **more).rows()


def of_interpret(encoder: Encoder, folder: Path, tmp_path: Path, **more: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = interpret(encoder, labeled_folder(folder), tmp_path / "out", **more).results["layers"]["rows"]
    return rows


@pytest.mark.parametrize("study", [of_scan, of_interpret])
@pytest.mark.parametrize("dims", [1, {"visual.mixed": 1}])
@pytest.mark.parametrize("chosen", [{}, {"layer": "visual.mixed", "position": "mean"}])
def test_studies_take_the_dimension(study: Callable[..., Any], dims: Any, chosen: dict[str, str], folder: Path, tmp_path: Path) -> None:
    rows = {row["layer"]: row for row in study(unsure(), folder, tmp_path, layers=["visual.mixed"], feature_dim=dims, **chosen)}
    row = rows["visual.mixed"]
    h = vectors(folder).flatten(0, 1).double()
    deviation = h - h.mean(1, keepdim=True)
    kappa = (deviation**4).mean(1) / (deviation**2).mean(1) ** 2
    assert row["feature_dim"] == 1 and row["vectors"] == len(h)
    assert row["vector_kurtosis"] == pytest.approx(float(kappa.mean()), rel=1e-4)
    assert rows[""]["features"] == 6


def test_a_dimension_of_no_layer_is_refused_before_anything_runs(folder: Path, tmp_path: Path) -> None:
    for study in (of_scan, of_interpret):
        with pytest.raises(ValueError, match=r"feature_dim: 'visual\.mixt'"):
            study(unsure(), folder, tmp_path, layers=["visual.mixed"], feature_dim={"visual.mixt": 1})
    assert not (tmp_path / "out").exists()


def test_layers_that_cannot_be_told_apart_do_not_hide_the_others(folder: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.last = Mixed(), nn.Linear(6, 40)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(self.mixed(images).sum(2))

    encoder = Encoder(Both(), features=40, preprocess=sets.pixels).eval()
    (batch,) = image_folder(folder).batches(sets.pixels, 100)
    read = Batch(len(batch.names), batch.pixels, batch.names, list(range(len(batch.names))))
    layers = LayerPass(encoder, "visual.*")

    def run() -> None:
        with layers, torch.no_grad(), layers.around(read, batch.pixels):
            encoder(batch.pixels)

    with pytest.warns(RecordingWarning, match=r"visual\.mixed"):
        run()
    assert not isinstance(layers.hidden, str)
    assert [one.layer for one in layers.hidden.layers] == ["visual.last"]
    assert np.isfinite(layers.recording["visual.last"].vector_kurtosis)


@pytest.mark.parametrize("command", ["scan", "interpret"])
def test_the_dimension_on_the_command_line(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from torchprobe.cli import main

    monkeypatch.setattr("torchprobe.encoders.load_encoder", lambda *_, **__: unsure())
    arguments = [command, "toy:unsure", "--images", str(folder), "--layers", "visual.mixed", "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--feature-dim", "visual.mixed=1"])
    printed = json.loads(capsys.readouterr().out)
    assert left.value.code == 0
    rows = printed["layers"] if command == "scan" else printed["layers"]["rows"]
    assert {row["layer"]: row["feature_dim"] for row in rows} == {"visual.mixed": 1, "": -1}
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--feature-dim", "rows"])
    assert left.value.code == 2 and "LAYER=DIM" in capsys.readouterr().err
