"""Real CLIP representations through the command line, against numbers that were computed from them by other code, in float64.

TORCHPROBE_GOLDEN names the folder that holds ``clip/``: embeddings of 500 COCO images and captions by OpenAI's ViT-B/16 and by a random
initialization (github.com/Weixin-Liang/Modality-Gap), text heads of ViT-B/32 and RN50 (facebookresearch/Detic, VLPart), the projections of
ViT-L/14 (gligen/GLIGEN), means over images (AI4LIFE-GROUP/SpLiCE) and over ratings (LAION-AI/aesthetic-predictor).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import stop_drawing

from torchprobe import cli

for package in ("matplotlib", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

CLIP = Path(os.environ.get("TORCHPROBE_GOLDEN", ""), "clip")
pytestmark = [
    pytest.mark.skipif(not CLIP.is_dir(), reason="TORCHPROBE_GOLDEN does not name the folder with representations of CLIP"),
    pytest.mark.usefixtures("undrawn"),
]
B16, RANDOM = "openai_vit_b16_coco500.npz", "random_vit_b16_coco500.npz"


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert not caught.value.code


def interpret(out: Path, file: str | Path, *options: object) -> dict[str, Any]:
    call("interpret", "--embeddings", file if isinstance(file, Path) else f"{CLIP}/{file}", "--out", out, *options)
    return dict(json.loads((out / "results.json").read_text(encoding="utf-8")))


def features(found: dict[str, Any], key: str = "relative_size") -> list[int]:
    """The features, the largest first."""
    return [row["feature"] for row in sorted(found["outliers"]["rows"], key=lambda row: -row[key])]


def size(found: dict[str, Any], feature: int) -> float:
    return float(next(row["relative_size"] for row in found["outliers"]["rows"] if row["feature"] == feature))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """The images with the captions as the head, for some features."""
    folder = tmp_path_factory.mktemp("b16")
    np.save(folder / "y.npy", np.arange(500))
    known: dict[str, tuple[dict[str, Any], Path]] = {}

    def of(chosen: str) -> tuple[dict[str, Any], Path]:
        if chosen not in known:
            head = ("--head", f"{CLIP}/{B16}:captions", "--labels", folder / "y.npy", "--same-images", "--features", chosen)
            with pytest.MonkeyPatch.context() as patch:
                stop_drawing(patch)
                known[chosen] = interpret(folder / chosen, f"{B16}:images", *head), folder / chosen
        return known[chosen]

    return of


@pytest.mark.slow("runs of 500 images with 500 classes")
def test_images_of_b16_with_captions_as_the_head(images: Callable[[str], tuple[dict[str, Any], Path]]) -> None:
    found, folder = images("442")
    kurtosis = found["kurtosis"]
    assert kurtosis["median"] == pytest.approx(85.628, abs=5e-4)
    assert kurtosis["interval"] == pytest.approx([84.8, 89.8], abs=0.2)  # a percentile bootstrap; ours is a little wider
    assert kurtosis["mean"] == pytest.approx(87.240, abs=5e-4) and kurtosis["centred"] == pytest.approx(6.836, abs=5e-4)
    assert kurtosis["rotation"]["mean"] == pytest.approx(2.95, abs=0.02)
    assert features(found)[:5] == [442, 244, 251, 376, 362] and 442 in found["outliers"]["indices"]
    assert [size(found, feature) for feature in (442, 244, 362)] == pytest.approx([24.1, 4.9, 3.7], abs=0.06)
    accuracy = found["accuracy"]["imagenet"]
    assert (accuracy["accuracy"], accuracy["top5"], found["directions"]["rank"]) == (0.552, 0.808, 500)
    directions = sorted(found["directions"]["head"], key=lambda one: -one["importance"])
    importance = [one["importance"] for one in directions]
    assert importance[:3] == pytest.approx([3.628, 0.552, 0.268], abs=5e-4) and importance[0] / sum(importance) == pytest.approx(
        0.32, abs=5e-3
    )
    assert directions[0]["alignment"] == pytest.approx(0.031, abs=5e-4)
    curves = found["pruning"]["curves"]["imagenet"]
    at = [curves["importance"]["keep"].index(share) for share in (0.1, 0.2, 0.3, 0.5, 1.0)]
    assert [curves["importance"]["accuracy"][i] for i in at] == [0.354, 0.478, 0.530, 0.556, 0.552]
    assert [curves["random"]["accuracy"][i] for i in at] == pytest.approx([0.034, 0.104, 0.192, 0.288, 0.552], abs=0.06)
    zero, mean = found["ablation"]["rows"]
    assert (zero["ablated"], mean["ablated"]) == (0.506, 0.554)
    assert 0.54 < zero["random_low"] < zero["random_high"] < 0.572 and "vector_kurtosis" in (folder / "kurtosis.csv").read_text()


@pytest.mark.slow("runs of 500 images with 500 classes")
def test_the_text_outlier_lies_along_the_first_direction(images: Callable[[str], tuple[dict[str, Any], Path]]) -> None:
    both, text = images("442,362")[0], images("362")[0]
    assert [row["ablated"] for row in both["ablation"]["rows"]] == [0.442, 0.554]
    first = max(text["directions"]["head"], key=lambda one: one["importance"])
    assert first["alignment"] == pytest.approx(0.689, abs=5e-4)


@pytest.mark.slow("several runs")
def test_images_against_captions_and_trained_against_random(tmp_path: Path) -> None:
    names = []
    for file, pretraining in ((B16, "openai"), (RANDOM, "none")):
        for array, modality in (("images", "image"), ("captions", "text")):
            about = ("--modality", modality, "--backbone", "ViT-B-16", "--pretraining", pretraining, "--name", f"{pretraining} {array}")
            names.append(tmp_path / f"{pretraining}-{array}")
            found = interpret(names[-1], f"{file}:{array}", *about)
            want = {"openai-images": 87.240, "openai-captions": 76.993, "none-images": 2.942}.get(names[-1].name)
            assert want is None or found["kurtosis"]["mean"] == pytest.approx(want, abs=5e-4)
            if pretraining == "none":
                assert found["outliers"]["indices"] == []
            elif array == "captions":
                assert features(found)[0] == 362 and size(found, 362) == pytest.approx(20.9, abs=0.05)
    call("compare", *names, "--out", tmp_path / "both")
    with (tmp_path / "both" / "gaps.csv").open(newline="", encoding="utf-8") as file:
        trained, random = csv.DictReader(file)
    with (tmp_path / "both" / "gap_features.csv").open(newline="", encoding="utf-8") as file:
        carrying = [row for row in csv.DictReader(file) if row["gap"] == trained["gap"]]
    for row, source in ((trained, B16), (random, RANDOM)):
        with np.load(CLIP / source, allow_pickle=False) as arrays:
            x, y = (arrays[name].astype(np.float64) for name in ("images", "captions"))
        difference = (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(0) - (y / np.linalg.norm(y, axis=1, keepdims=True)).mean(0)
        assert float(row["length"]) == pytest.approx(np.linalg.norm(difference), rel=1e-6)
        assert float(row["low"]) < float(row["length"]) < float(row["high"]) and row["pairs"] == "500"
    # The trained gap lies along the two outlier features; the random one is longer, and spread over all features.
    assert [row["feature"] for row in carrying[:2]] == ["442", "362"] and float(carrying[1]["cumulative"]) > 0.68
    assert (trained["half"], random["half"]) == ("2", "70") and float(random["length"]) > float(trained["length"])
    assert "Gaps between modalities" in (tmp_path / "both" / "index.html").read_text(encoding="utf-8")


def test_seven_images_of_b32(tmp_path: Path) -> None:
    found = interpret(tmp_path, "openai_vit_b32_seven_images.npz")
    assert found["kurtosis"]["mean"] == pytest.approx(122.4, abs=0.05)
    assert features(found)[0] == 92 and size(found, 92) == pytest.approx(27.9, abs=0.05)


@pytest.mark.slow("several runs")
def test_text_heads(tmp_path: Path) -> None:
    head = f"{CLIP}/openai_vit_b32_text_heads.npz:lvis"
    found = interpret(tmp_path / "b32", "openai_vit_b32_text_heads.npz:lvis", "--head", head, "--modality", "text")
    assert found["kurtosis"]["mean"] == pytest.approx(95.3, abs=0.05)
    assert {*features(found)[:2]} == {133, 312} and size(found, features(found)[0]) == pytest.approx(24.3, abs=0.05)
    energy = [one["singular_value"] ** 2 for one in found["directions"]["head"]]
    assert energy[0] / sum(energy) == pytest.approx(0.75, abs=5e-3)
    found = interpret(tmp_path / "rn50", "openai_rn50_text_heads.npz:lvis", "--modality", "text")
    assert found["kurtosis"]["mean"] == pytest.approx(350, abs=0.5)
    assert features(found)[0] == 222 and size(found, 222) == pytest.approx(49.8, abs=0.05)


@pytest.mark.slow("several runs")
def test_the_index_of_the_outlier_is_a_fingerprint(tmp_path: Path) -> None:
    for name, want in {"vit_b32": [92], "vit_l14": [644, 413]}.items():
        assert features(interpret(tmp_path / name, f"aesthetic_rating_means.npz:{name}"))[: len(want)] == want
    with np.load(CLIP / "mean_image_embeddings.npz", allow_pickle=False) as means:
        for name, want in {
            "clip_RN50_image": [526],
            "clip_ViTB16_image": [442],
            "clip_ViTB32_image": [92],
            "open_clip_ViTB32_image": [307, 152],
        }.items():
            np.save(tmp_path / "mean.npy", means[name][None])
            assert features(interpret(tmp_path / name, tmp_path / "mean.npy"))[: len(want)] == want
    with np.load(CLIP / "openai_vit_l14_projections.npz", allow_pickle=False) as projections:
        for name, rows in {"image": [644, 413, 131, 463], "text": [316, 440]}.items():  # the rows of the largest norm
            np.save(tmp_path / "columns.npy", projections[name].T)
            assert features(interpret(tmp_path / name, tmp_path / "columns.npy"), "energy_share")[: len(rows)] == rows
