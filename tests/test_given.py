"""From files of arrays to pages and comparisons, on the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe import cli
from torchprobe.analysis import Embeddings, ablation, evaluate, privileged_directions, split, vector_kurtosis
from torchprobe.analysis.given_files import Given
from torchprobe.analysis.modality import modality_gap
from torchprobe.common.runs import RunOptions
from torchprobe.studies.interpret.given import GivenSubject
from torchprobe.studies.interpret.inputs import Choices
from torchprobe.studies.interpret.run import interpret_given

for package in ("matplotlib", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

N, D, CLASSES = 120, 64, 4
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], undrawn: None) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        return (int(caught.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Images with an outlier feature 7, captions with an outlier feature 20, of four classes."""
    random = np.random.default_rng(0)
    y, weight = np.arange(N) % CLASSES, random.normal(size=(CLASSES, D))
    h = weight[y] + 2 * random.normal(size=(N, D))
    images, captions = h.copy(), h + random.normal(size=(N, D))
    images[:, 7] += 40
    captions[:, 20] += 60
    for name, array in {"h": images, "captions": captions, "y": y, "w": weight, "noisy": images + 2 * random.normal(size=(N, D))}.items():
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32) if array.ndim > 1 else array)
    np.savez(tmp_path / "noisy.npz", h=np.load(tmp_path / "noisy.npy"), y=y)
    return tmp_path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def test_two_files_of_numpy_to_a_page(run: Run, files: Path) -> None:
    out = files / "out"
    code, said, err = run(
        "interpret", "--embeddings", files / "h.npy", "--labels", files / "y.npy", "--head", files / "w.npy", "--out", out
    )
    assert code == 0, err
    e = Embeddings.from_arrays(np.load(files / "h.npy"), np.load(files / "y.npy"))
    weight = np.load(files / "w.npy")
    found = results(out)
    assert (found["name"], found["features"], found["given"]) == ("h", D, True)
    assert found["kurtosis"]["mean"] == pytest.approx(float(vector_kurtosis(e).mean()), rel=1e-12)
    assert found["outliers"]["indices"] == [7]
    assert found["accuracy"]["imagenet"]["accuracy"] == evaluate(weight, e).accuracy
    first, second = split(e)
    assert found["ablation"]["rows"][1]["ablated"] == ablation(weight, second, [7], "mean", reference=first).ablated
    importance = privileged_directions(weight, first.h).importance
    assert [one["importance"] for one in found["directions"]["head"]] == pytest.approx(importance.tolist(), rel=1e-6)
    assert {"layers", "concepts"} <= found["skipped"].keys() and "not a network" in found["skipped"]["layers"]
    assert "Left out: layers (the representations were given, not a network that computes them)" in said
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "120 given representations" in page and "What this page calls an image is one row of them" in page
    assert rows(out / "kurtosis.csv")[3]["image"] == "row 3 of 120"
    assert Embeddings.load(out / "embeddings" / "imagenet.safetensors").ids == e.ids


def test_representations_alone(run: Run, files: Path) -> None:
    code, _, err = run("interpret", "--embeddings", files / "h.npy", "--out", files / "out", "--name", "mine")
    found = results(files / "out")
    assert code == 0, err
    assert found["about"]["name"] == "mine" and found["skipped"]["directions"] == "no head was given"


def test_chosen_features_and_the_same_images(run: Run, files: Path) -> None:
    head = ("--head", files / "w.npy", "--labels", files / "y.npy")
    code, said, err = run(
        "interpret", "--embeddings", files / "h.npy", *head, "--features", "7,20", "--same-images", "--out", files / "out"
    )
    assert code == 0, err
    e, weight = Embeddings.from_arrays(np.load(files / "h.npy"), np.load(files / "y.npy")), np.load(files / "w.npy")
    found = results(files / "out")
    for row, how in zip(found["ablation"]["rows"], ("zero", "mean"), strict=True):
        want = ablation(weight, e, [7, 20], how)
        assert (row["accuracy"], row["ablated"], row["random_mean"]) == (want.accuracy, want.ablated, want.random_mean)
    directions = privileged_directions(weight, e)
    assert [one["importance"] for one in found["directions"]["head"]] == pytest.approx(directions.importance.tolist(), rel=1e-6)
    assert [one["alignment"] for one in found["directions"]["head"]] == pytest.approx(directions.alignment([7, 20]).tolist(), rel=1e-6)
    assert found["pruning"]["images"]["imagenet"] == N and found["chosen_features"] == [7, 20] and found["same_images"] is True
    assert "(--features): 7, 20" in said and "(--same-images)" in said


def test_a_shift_has_its_labels_in_its_file(run: Run, files: Path) -> None:
    arguments = ("interpret", "--embeddings", files / "h.npy", "--labels", files / "y.npy", "--head", files / "w.npy")
    (files / "standard.csv").write_text("model,imagenet,noisy\n" + "".join(f"m{i},{40 + 10 * i},{30 + 9 * i}\n" for i in range(6)))
    code, _, err = run(*arguments, "--shift", f"noisy={files}/noisy.npz:h", "--baseline", files / "standard.csv", "--out", files / "out")
    assert code == 0, err
    found = results(files / "out")
    weight, shifted = np.load(files / "w.npy"), Embeddings.from_arrays(np.load(files / "noisy.npy"), np.load(files / "y.npy"))
    assert found["accuracy"]["noisy"]["accuracy"] == evaluate(weight, shifted).accuracy
    assert found["robustness"]["rows"][0]["shift"] == "noisy"
    assert found["pruning"]["images"]["noisy"] == N  # its rows have names of their own


def test_resume_reads_what_is_the_same_and_refuses_what_is_not(run: Run, files: Path) -> None:
    arguments = ("interpret", "--labels", files / "y.npy", "--head", files / "w.npy", "--out", files / "out")
    assert run(*arguments, "--embeddings", files / "h.npy")[0] == 0
    stages = {path.name: path.stat().st_mtime_ns for path in (files / "out" / "stages").iterdir()}
    assert run(*arguments, "--embeddings", files / "h.npy", "--resume")[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in (files / "out" / "stages").iterdir()} == stages
    assert run(*arguments, "--embeddings", files / "h.npy", "--resume", "--features", "3")[0] == 0
    again = {path.name: path.stat().st_mtime_ns for path in (files / "out" / "stages").iterdir()}
    assert {name for name in stages if again[name] == stages[name]} == {"kurtosis.json", "outliers.json"}
    code, _, err = run(*arguments, "--embeddings", files / "noisy.npy", "--resume")
    assert code == 1 and "was made with another" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--embeddings", "h.npy", "--images", "."), 2, "--images need a network or pictures"),
        (("timm:vit", "--embeddings", "h.npy"), 2, "give either MODEL or --suite, or --embeddings"),
        (("timm:vit", "--images", ".", "--labels", "y.npy"), 2, "--labels is for --embeddings"),
        (("timm:vit",), 2, "Missing option '--images'"),
        (("--embeddings", "h.npy", "--random-init"), 2, "--random-init need a network"),
        (("--embeddings", "h.npy", "--head", "zero-shot"), 1, "--head zero-shot needs a network"),
        (("--embeddings", "h.npy", "--features", "7,x"), 2, "'7,x' is not a list of indices such as 442,362"),
        (("--embeddings", "h.npy", "--features", "7,7"), 2, "one twice"),
        (("--embeddings", "h.npy", "--labels", "y.npy", "--head", "w.npy", "--features", "64"), 1, "there is no feature 64"),
        (("--embeddings", "h.npy", "--labels", "w.npy"), 1, "w.npy must be whole numbers (n,)"),
        (("--embeddings", "y.npy"), 1, "y.npy must be representations (n, d)"),
        (("--embeddings", "none.npy"), 1, "no such file: none.npy"),
        (("--embeddings", "h.pt"), 1, "h.pt: arrays are read from .npy, .npz, .safetensors, .parquet"),
        (("--embeddings", "h.npy", "--shift", "noisy=y.npy"), 1, "y.npy must be representations (n, d)"),
        (("--embeddings", "h.npy", "--shift", "imagenet=noisy.npz"), 1, "'imagenet' is the name of the unshifted images"),
    ],
)
def test_what_is_refused(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(files)
    got, _, err = run("interpret", *arguments, "--out", "out")
    assert got == code and message in " ".join(err.split())
    assert not (files / "out" / "results.json").exists()


def test_rows_with_nan_are_counted_and_named(run: Run, files: Path) -> None:
    h = np.load(files / "h.npy")
    h[[3, 9]] = np.nan
    np.save(files / "h.npy", h)
    code, said, err = run(
        "interpret", "--embeddings", files / "h.npy", "--labels", files / "y.npy", "--head", files / "w.npy", "--out", files / "out"
    )
    assert code == 0, err
    assert "2 rows of 120 with nan or inf, left out of kurtosis and wrong in accuracy" in said


def test_interpret_takes_a_linear_layer_and_an_array(tmp_path: Path, undrawn: None) -> None:
    import interpret_sets as sets

    from torchprobe.datasets import labeled_folder
    from torchprobe.studies.interpret import interpret

    images, model = sets.write_classes(tmp_path / "images", each=5), sets.encoder()
    layer = nn.Linear(sets.FEATURES, len(sets.CLASSES), bias=False)
    for name, head in {"layer": layer, "array": layer.weight.detach().numpy()}.items():
        found = interpret(model, labeled_folder(images, names=sets.CLASSES), tmp_path / name, head=head, layer_images=0)
        assert found.results.accuracy is not None
        want = evaluate(layer, Embeddings.load(tmp_path / name / "embeddings" / "imagenet.safetensors"))
        assert found.results.accuracy["imagenet"].accuracy == want.accuracy


def test_compare_shows_the_gap_between_modalities(run: Run, files: Path) -> None:
    for name, modality in (("h", "image"), ("captions", "text"), ("noisy", "image")):
        assert run("interpret", "--embeddings", files / f"{name}.npy", "--modality", modality, "--out", files / f"of_{name}")[0] == 0
    code, said, err = run("compare", *(files / f"of_{name}" for name in ("h", "captions", "noisy")), "--out", files / "both")
    assert code == 0, err
    gaps, features = rows(files / "both" / "gaps.csv"), rows(files / "both" / "gap_features.csv")
    assert [row["gap"] for row in gaps] == ["h − captions", "captions − noisy"]  # not between two sets of images
    want = modality_gap(np.load(files / "h.npy"), np.load(files / "captions.npy"))
    assert float(gaps[0]["length"]) == pytest.approx(want.length, rel=1e-6) and gaps[0]["pairs"] == str(N)
    assert [(row["feature"], row["outlier"]) for row in features[:2]] == [("20", "captions"), ("7", "h")]
    assert float(gaps[0]["outlier_share"]) == pytest.approx(float(want.share[[7, 20]].sum()), rel=1e-5)
    assert "paired by their position" in said and "same kind of input (image: h, noisy; text: captions)" in " ".join(said.split())
    assert "Gaps between modalities" in (files / "both" / "index.html").read_text(encoding="utf-8")


def test_no_gap_between_models_and_none_without_a_word(run: Run, files: Path) -> None:
    for name, options in (("h", ("--modality", "image")), ("captions", ("--modality", "text", "--backbone", "other")), ("noisy", ())):
        assert run("interpret", "--embeddings", files / f"{name}.npy", *options, "--out", files / f"of_{name}")[0] == 0
    code, said, _ = run("compare", *(files / f"of_{name}" for name in ("h", "captions", "noisy")), "--out", files / "both")
    assert code == 0 and "Gaps between" not in said and not (files / "both" / "gaps.csv").exists()


def test_given_from_python(tmp_path: Path, undrawn: None) -> None:
    e = Embeddings.from_arrays(torch.randn(50, 32), torch.arange(50) % 3)
    subject = GivenSubject("mine", Given.of(e), choices=Choices(features=()))
    found = interpret_given(subject, tmp_path / "out", RunOptions())
    assert found.results.kurtosis.mean == pytest.approx(float(vector_kurtosis(e).mean())) and found.ids == e.ids
    with pytest.raises(ValueError, match="shift has 31 features, but mine has 32"):
        GivenSubject("mine", Given.of(e), {"shift": Given.of(Embeddings.from_arrays(torch.randn(5, 31)))})
