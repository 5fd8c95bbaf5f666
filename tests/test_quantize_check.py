"""``torchprobe quantize-check`` from end to end: images and texts in, ranking, scales and page out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.functional import to_tensor

import torchprobe
from torchprobe.analysis.quantization import FORMATS, measure
from torchprobe.analysis.quantization.layers import simulated
from torchprobe.datasets import DatasetError, Images, image_folder
from torchprobe.encoders import Encoder
from torchprobe.statistics import Exponents
from torchprobe.studies.quantize_check import quantize_check
from torchprobe.studies.quantize_report import answer, write_quantize_check
from torchprobe.studies.scan import scan

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"nonsense")
    return folder


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[5] *= 200  # an outlier feature in the input of the second convolution
        model[2].weight[:, 5] /= 200
    return model


def encoder() -> Encoder:
    return Encoder(network(), features=16, preprocess=to_tensor, name="small").eval()


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow("compiles with inductor"))], ids=["eager", "compiled"]
)
def test_the_layer_that_breaks_is_first(photos: Path, tmp_path: Path, compiled: bool) -> None:
    made = encoder()
    if compiled:
        made.visual.compile()
    check = quantize_check(made, image_folder(photos), "int8_tensor", batch_size=5)
    first = check.rows()[0]
    assert first["layer"] == "visual.2" and first["outliers"] == "5" and first["without_db"] > first["others_db"] + 6
    assert check.keep()[0] == "visual.2" and check.seen == 12 and len(check.unreadable) == 1
    assert [row["format"] for row in check.by_format()] == list(FORMATS)
    files = write_quantize_check(check, tmp_path)
    assert set(files) == {"recording", "summary", "smoothing", "layers", "formats", "page"}
    scales = load_file(files["smoothing"])
    assert scales["visual.2.scale"].argmax() == 5 and scales["visual.2.scale"].shape == (32,)
    summary = json.loads(files["summary"].read_text())
    assert summary["keep_16_bit"] == check.keep() and summary["layers"][0]["layer"] == "visual.2"
    loaded = torchprobe.load(files["recording"])
    assert isinstance(loaded["visual.2"], Exponents) and loaded["visual.2"].exponents == check.inputs["visual.2"].exponents
    page = files["page"].read_text()
    assert "visual.2" in page and "keep it in 16 bits" in page
    torch.compiler.reset()  # otherwise the next test is told that its graphs are dropped


def test_the_forecast_of_real_activations_is_what_rounding_does(photos: Path) -> None:
    made = encoder()
    check = quantize_check(made, image_folder(photos), batch_size=5)
    caught: dict[str, torch.Tensor] = {}
    for name in ("visual.2", "visual.6"):
        made.get_submodule(name).register_forward_hook(lambda _, i, o, name=name: caught.__setitem__(name, i[0]))
    pixels = next(iter(image_folder(photos).batches(made.preprocess, 20, 1))).pixels
    with torch.no_grad():
        made(pixels)
    for form in ("int8_tensor", "int8_token", "e4m3", "mxfp8", "nvfp4"):
        found = {one.layer: one for one in check.layers[form]}["visual.2"].input
        truth = measure(caught["visual.2"], form, 1)
        assert abs(found.sqnr_db - truth.sqnr_db) < 1 or found.unsure, form


def test_no_layers_and_no_such_format(photos: Path) -> None:
    bare = Encoder(nn.Flatten(), features=768, preprocess=to_tensor)
    with pytest.raises(ValueError, match="no linear layer and no convolution"):
        quantize_check(bare, image_folder(photos))
    with pytest.raises(ValueError, match="format is one of int8_tensor"):
        quantize_check(encoder(), image_folder(photos), "int7")


def test_a_stopped_run_is_about_what_was_seen(photos: Path) -> None:
    asked = iter([False, True, True])
    check = quantize_check(encoder(), image_folder(photos), batch_size=4, stop=lambda: next(asked))
    assert check.partial and check.seen == 4 and all(not math.isnan(one.output_db) for one in check.ranked())


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    from torchprobe.cli import main

    out = tmp_path / "out"
    arguments = ["quantize-check", "timm:test_vit", "--images", str(photos), "--random-init", "--out", str(out), "--format", "e4m3"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "In e4m3" in printed and "nvfp4" in printed
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--overwrite", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "e4m3" and len(found["formats"]) == 9 and Path(found["files"]["page"]).exists()
    with pytest.raises(SystemExit) as ended:
        main(["quantize-check", "timm:test_vit"])
    assert ended.value.code == 2


def test_the_answer_counts_in_words_that_fit(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = quantize_check(Encoder(network(), features=16, preprocess=to_tensor), image_folder(photos), "int8_tensor")
    for keep, words in ((1, "1 layer of 4 falls below 20 dB: keep it"), (2, "2 layers of 4 fall below 20 dB: keep them")):
        monkeypatch.setattr(type(found), "keep", lambda self, keep=keep: ["a", "b"][:keep])
        assert f"{words} in 16 bits (a" in answer(found)


def test_the_network_is_measured_as_by_hand(photos: Path) -> None:
    made = encoder()
    check = quantize_check(made, image_folder(photos), "int8_tensor", batch_size=5)
    pixels = torch.cat([batch.pixels for batch in image_folder(photos).batches(made.preprocess, 5, 1)])
    layers, exponents = list(check.modules), {name: check.inputs[name] for name in check.modules}
    with torch.no_grad():
        plain = made(pixels).double()
        for found, rounded in ((check.network.db, layers), (check.network.kept_db, [x for x in layers if x not in check.keep()])):
            with simulated(made, rounded, "int8_tensor", exponents):
                error = made(pixels).double() - plain
            assert found == pytest.approx(10 * math.log10(plain.var(0, correction=0).sum() / (error**2).mean(0).sum()), abs=1e-3)
    assert check.network.inputs == 12 and check.network.kept_db > check.network.db
    text = answer(check)
    assert text.startswith("In int8_tensor, all 4 layers together leave ") and "(measured, 12 inputs)" in text
    assert f"With the {len(check.keep())} layer" in text


def test_a_constant_outlier_feature_does_not_hide_what_it_costs(photos: Path) -> None:
    """Its own part of the output is exact, and large; the other features are lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.GELU(), nn.Linear(256, 16))
    with torch.no_grad():
        model[1].weight[7], model[1].bias[7] = 0, 2000
    check = quantize_check(Encoder(model, features=16, preprocess=to_tensor), image_folder(photos), "int8_tensor")
    row = next(row for row in check.rows() if row["layer"] == "visual.3")
    assert row["output_db"] > 20 and row["others_db"] < 5 and row["outliers"] == "7"
    assert row["keep"] == "yes" and check.keep() == ["visual.3"] and check.network.db < 10 < check.network.kept_db
    assert "In visual.3, outlier features are a large part of the signal, and the other features keep only" in answer(check)


def test_a_network_that_cannot_be_measured_says_why(photos: Path) -> None:
    images = image_folder(photos)
    one = quantize_check(encoder(), Images(images.paths[:1]))
    assert math.isnan(one.network.db) and answer(one).startswith(
        "In int8_token, the output of the network was not measured: it takes 2 inputs, and there was 1."
    )
    made = encoder()
    nn.utils.parametrizations.weight_norm(made.visual[6])
    assert "the weight of 'visual.6' is computed in every call" in quantize_check(made, images).network.why
    steady = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Threshold(1e6, 1.0)), features=4, preprocess=to_tensor)
    assert quantize_check(steady, images).network.why == "its outputs are all the same, or not finite"


def test_unsure_layers_are_named_and_convolutions_are_told_their_format(photos: Path) -> None:
    check = quantize_check(encoder(), image_folder(photos))
    unsure = [one.layer for one in check.layers["int8_token"] if one.input.unsure]
    assert f"unsure: {unsure[0]}" in answer(check)
    assert "see --format int8_tensor" not in answer(check)
    convolutions = Encoder(network()[:6], features=32, preprocess=to_tensor)
    assert "see --format int8_tensor" in answer(quantize_check(convolutions, image_folder(photos)))
    assert "see --format int8_tensor" not in answer(quantize_check(convolutions, image_folder(photos), "int8_tensor"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_inputs_of_layers_are_told(photos: Path, bad: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.Threshold(1e6, bad), nn.Linear(32, 8))
    check = quantize_check(Encoder(model, features=8, preprocess=to_tensor), image_folder(photos))
    bare = {row["layer"]: row for row in check.rows()}
    assert bare["visual.3"]["unsure"] == "384 values that are nan or inf were left out" and math.isnan(bare["visual.3"]["output_db"])
    assert "1 layer, such as visual.3, has no forecast." in answer(check)
    model[1].weight.data.fill_(bad)
    check = quantize_check(Encoder(model[:2], features=32, preprocess=to_tensor), image_folder(photos))
    assert answer(check) == "In int8_token, no layer has a forecast."


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(DatasetError, match="the data set is empty"):
        quantize_check(encoder(), Images([]))
    with pytest.raises(DatasetError, match="the data set is empty"):
        scan(encoder(), Images([]))
