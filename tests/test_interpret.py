"""One encoder through the whole analysis."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import interpret_sets as sets
import pytest
import torch

from torchprobe.analysis.ablation import ablation
from torchprobe.analysis.baseline import Baseline
from torchprobe.analysis.directions import privileged_directions, split
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.kurtosis import vector_kurtosis
from torchprobe.analysis.pruning import prune
from torchprobe.analysis.robustness import effective_robustness
from torchprobe.datasets import Broden, DatasetError, Images, image_folder, labelled_folder
from torchprobe.encoders import Encoder, EncoderError, Head
from torchprobe.studies.interpret import Interpretation, interpret
from torchprobe.studies.interpret.inputs import gather

SECTIONS = {"kurtosis", "outliers", "layers", "accuracy", "robustness", "directions", "ablation", "pruning", "concepts"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interpret")
    sets.write_classes(folder / "images")
    sets.write_classes(folder / "noisy", each=6, strength=5.0, seed=5)
    sets.write_concepts(folder / "concepts")
    sets.write_baseline(folder / "baseline.csv")
    return folder


def run(data: Path, out: Path, encoder: Encoder | None = None, **options: object) -> Interpretation:
    model = encoder or sets.encoder()
    given: dict[str, object] = {
        "head": options.pop("head", None) or sets.head(model),
        "shifts": {"noisy": labelled_folder(data / "noisy", names=sets.CLASSES)},
        "broden": Broden(data / "concepts"),
        "baseline": Baseline.from_csv(data / "baseline.csv"),
        "batch_size": 8,
    }
    return interpret(model, labelled_folder(data / "images", names=sets.CLASSES), out, **given | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Interpretation:
    return run(data, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def images(whole: Interpretation) -> Embeddings:
    return Embeddings.load(whole.folder / "embeddings" / "imagenet.safetensors")


def test_every_section_is_there(whole: Interpretation) -> None:
    assert whole.results.keys() >= SECTIONS and whole.results["skipped"] == {}
    saved = json.loads((whole.folder / "results.json").read_text())
    assert saved == whole.results


def test_kurtosis_is_that_of_the_representations(whole: Interpretation, images: Embeddings) -> None:
    kappa = vector_kurtosis(images.h)
    assert whole.results["kurtosis"]["mean"] == pytest.approx(float(kappa.mean()), rel=1e-12)
    assert whole.kurtosis == pytest.approx(kappa.tolist(), rel=1e-12) and whole.ids == images.ids
    assert whole.results["outliers"]["indices"] == [sets.OUTLIER]
    assert whole.results["kurtosis"]["rotation"]["mean"] < 8 < whole.results["kurtosis"]["mean"]
    assert not {"values", "peaks"} & whole.results["kurtosis"].keys()  # those are in kurtosis.csv


def test_accuracy_and_robustness(whole: Interpretation, images: Embeddings, data: Path) -> None:
    head = sets.head(sets.encoder())
    shifted = Embeddings.load(whole.folder / "embeddings" / "noisy.safetensors")
    found = whole.results["accuracy"]
    assert found["imagenet"]["accuracy"] == evaluate(head, images).accuracy
    assert found["noisy"]["accuracy"] == evaluate(head, shifted).accuracy
    low, high = found["noisy"]["interval"]
    assert low <= found["noisy"]["accuracy"] <= high
    (row,) = whole.results["robustness"]["rows"]
    expected = effective_robustness(
        100 * found["noisy"]["accuracy"],
        100 * found["imagenet"]["accuracy"],
        shift="noisy",
        baseline=Baseline.from_csv(data / "baseline.csv"),
    )
    assert row["effective_robustness"] == pytest.approx(expected) or (math.isnan(expected) and row["effective_robustness"] is None)


def test_importance_and_evaluation_share_no_image(whole: Interpretation, images: Embeddings) -> None:
    head = sets.head(sets.encoder())
    first, second = split(images, seed=0)
    found = privileged_directions(head, first.h)
    rows = whole.results["directions"]["head"]
    assert [row["importance"] for row in rows] == pytest.approx(found.importance[: found.rank].tolist())
    curve = whole.results["pruning"]["curves"]["imagenet"]["importance"]
    for keep, accuracy in zip(curve["keep"], curve["accuracy"], strict=True):
        assert accuracy == evaluate(prune(head, found, keep), second).accuracy
    one = ablation(head, second, torch.tensor([sets.OUTLIER]), how="zero", reference=first, seed=0)
    assert whole.results["ablation"]["rows"][0]["ablated"] == one.ablated


def test_concepts_beside_their_nulls(whole: Interpretation) -> None:
    c = whole.results["concepts"]
    assert set(c["sweep"]) == {"units", "directions", "random rotation", "units, shuffled labels"}
    assert set(c["names"]["units"]) == set(sets.CLASSES)
    assert [row["unique"] for row in c["sweep"]["units, shuffled labels"] if row["threshold"] == 0.9] == [0]
    assert (whole.folder / "concepts" / "units.safetensors").is_file()


def test_tables_and_plots(whole: Interpretation) -> None:
    for name in ("kurtosis", "features", "layers", "accuracy", "robustness", "directions", "pruning", "ablation", "concepts"):
        with open(whole.folder / f"{name}.csv", newline="") as file:
            assert list(csv.DictReader(file)), name
    pngs, svgs = (sorted((whole.folder / "plots").glob(f"*.{suffix}")) for suffix in ("png", "svg"))
    assert len(pngs) == len(svgs) >= 9 and all(path.stat().st_size > 1000 for path in pngs)


def test_page_explains_and_claims_nothing(whole: Interpretation) -> None:
    page = (whole.folder / "index.html").read_text()
    for title in ("The representation", "Outlier features", "Over depth", "Accuracy", "Effective robustness", "Privileged directions",
                  "Pruning directions", "Without the outlier features", "Concepts", "How to read this"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    assert "does not show that" in page and "Not computed" not in page and "http" not in page.replace("http-equiv", "")


def test_resumed_without_running_the_encoder(whole: Interpretation, data: Path) -> None:
    model = sets.encoder()
    before = (whole.folder / "results.json").read_bytes()
    head = sets.head(model)
    model.visual.fail = True  # type: ignore[assignment]
    again = run(data, whole.folder, model, head=head, resume=True)
    assert again.results == whole.results and (whole.folder / "results.json").read_bytes() == before


def test_interrupted_and_resumed(whole: Interpretation, data: Path, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, stop=lambda: next(asked, True))
    assert not (tmp_path / "results.json").exists()
    assert run(data, tmp_path, resume=True).results == whole.results


def test_a_stage_is_computed_anew_when_its_input_changed(whole: Interpretation, data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path, broden=None)
    other = sets.head(sets.encoder())
    flipped = Head(other.weight.detach().flip(0), names=sets.CLASSES)
    second = run(data, tmp_path, broden=None, head=flipped, resume=True)
    assert second.results["accuracy"]["imagenet"]["accuracy"] != first.results["accuracy"]["imagenet"]["accuracy"]
    assert second.results["kurtosis"] == first.results["kurtosis"]


def test_images_alone(data: Path, tmp_path: Path) -> None:
    found = interpret(sets.encoder(), image_folder(data / "images"), tmp_path, layer_images=0)
    assert found.results.keys() & SECTIONS == {"kurtosis", "outliers"}
    assert found.results["skipped"].keys() == SECTIONS - {"kurtosis", "outliers"}
    assert "Not computed" in (tmp_path / "index.html").read_text()


def test_a_head_without_labels(data: Path, tmp_path: Path) -> None:
    found = interpret(sets.encoder(), image_folder(data / "images"), tmp_path, head=sets.head(sets.encoder()), layer_images=0)
    assert "directions" in found.results and "accuracy" not in found.results
    assert found.results["skipped"]["accuracy"] == "the images have no labels"


def test_published_accuracies_stand_in(data: Path, tmp_path: Path) -> None:
    published = {"imagenet": 63.32, "imagenet_r": 69.33}  # OpenAI's ViT-B/32, OpenCLIP's table of results
    found = interpret(sets.encoder(), image_folder(data / "images"), tmp_path, layer_images=0, published=published)
    (row,) = found.results["robustness"]["rows"]
    assert row["effective_robustness"] == pytest.approx(44.4, abs=0.05) and found.results["robustness"]["accuracies"] == "published"


def test_what_cannot_be_read_is_counted(data: Path, tmp_path: Path) -> None:
    folder = sets.write_classes(tmp_path / "images", each=4)
    (folder / "red" / "torn <b>.png").write_bytes((folder / "red" / "00.png").read_bytes()[:60])
    found = interpret(sets.encoder(), labelled_folder(folder), tmp_path / "out", head=sets.head(sets.encoder()), layer_images=0)
    (skipped,) = found.results["data"]["imagenet"]["skipped"]
    assert skipped["file"] == "red/torn <b>.png" and found.results["data"]["imagenet"]["images"] == 12
    page = (tmp_path / "out" / "index.html").read_text()
    assert "torn &lt;b&gt;.png" in page and "torn <b>" not in page


def test_refusals(data: Path, tmp_path: Path) -> None:
    images = image_folder(data / "images")
    with pytest.raises(ValueError, match="the head takes 5 features, but the representation of colours has 64"):
        interpret(sets.encoder(), images, tmp_path, head=Head(torch.randn(3, 5)))
    with pytest.raises(ValueError, match="the name of the unshifted images"):
        interpret(sets.encoder(), images, tmp_path, shifts={"imagenet": images})
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="could be read"):
        interpret(sets.encoder(), Images([tmp_path / "bad.png"]), tmp_path / "out")


# -- from folders and words ------------------------------------------------------------------------------------------------


def test_own_head_by_name_of_the_folders(data: Path) -> None:
    model = sets.encoder()
    own = sets.head(model)
    shuffled = Head(own.weight.detach()[[2, 0, 1]], names=("Red", "Blue", "GREEN"))
    model.head = shuffled
    images, shifts, head = gather(model, data / "images", {"noisy": data / "noisy"}, "own")
    assert head is shuffled and set(images.labels[:14]) == {1} and set(shifts["noisy"].labels[:6]) == {1}  # type: ignore[attr-defined]


def test_own_head_without_names(data: Path) -> None:
    model = sets.encoder()
    model.head = Head(sets.head(model).weight.detach())
    images, _, _ = gather(model, data / "images", {}, "auto")
    assert images.labels[0] == 0  # type: ignore[attr-defined]
    model.head = Head(torch.randn(5, sets.FEATURES))
    with pytest.raises(DatasetError, match="3 class folders, the head 5 classes without names"):
        gather(model, data / "images", {}, "own")


def test_words_that_mean_no_head(data: Path, tmp_path: Path) -> None:
    model = sets.encoder()
    with pytest.raises(EncoderError, match="no trained head"):
        gather(model, data / "images", {}, "own")
    with pytest.raises(EncoderError, match="no text tower"):
        gather(model, data / "images", {}, "zero-shot")
    assert gather(model, data / "images", {}, "auto")[2] is None
    sets.head(model).save(tmp_path / "head.safetensors")
    assert gather(model, data / "images", {}, str(tmp_path / "head.safetensors"))[2] is not None


def test_a_folder_of_imagenet_that_is_not_a_wnid(tmp_path: Path) -> None:
    sets.write_classes(tmp_path / "images", each=1)
    (tmp_path / "images" / "red").rename(tmp_path / "images" / "n01440764")
    with pytest.raises(DatasetError, match="blue is no class of imagenet"):
        gather(sets.encoder(), tmp_path / "images", {}, "none")
