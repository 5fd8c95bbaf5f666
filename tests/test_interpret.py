"""One encoder through the whole analysis."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import interpret_sets as sets
import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.analysis.ablation import ablation
from torchprobe.analysis.baseline import Baseline
from torchprobe.analysis.directions import privileged_directions, split
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.kurtosis import vector_kurtosis
from torchprobe.analysis.pruning import prune
from torchprobe.analysis.robustness import effective_robustness, robustness
from torchprobe.common.folders import OtherRunError
from torchprobe.common.records import decode
from torchprobe.common.runs import RunWarning
from torchprobe.datasets import Broden, DatasetError, Images, image_folder, labeled_folder
from torchprobe.encoders import Encoder, EncoderError, Head
from torchprobe.studies.compare import load_results
from torchprobe.studies.interpret import Interpretation, interpret
from torchprobe.studies.interpret.accuracy import (
    Robustness,
    ShiftRow,
    effective_robustness_along,
    measure_robustness,
    robustness_section,
)
from torchprobe.studies.interpret.concepts import HEADLINE, Concepts, Detector, SweepRow, concepts_section
from torchprobe.studies.interpret.headline import facts
from torchprobe.studies.interpret.image_sets import is_imagenet
from torchprobe.studies.interpret.inputs import Inputs
from torchprobe.studies.interpret.results import Stages

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
        "shifts": {"noisy": labeled_folder(data / "noisy", names=sets.CLASSES)},
        "broden": Broden(data / "concepts"),
        "baseline": Baseline.from_csv(data / "baseline.csv"),
        "batch_size": 8,
    }
    return interpret(model, labeled_folder(data / "images", names=sets.CLASSES), out, **given | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Interpretation:
    return run(data, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def images(whole: Interpretation) -> Embeddings:
    return Embeddings.load(whole.folder / "embeddings" / "imagenet.safetensors")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, which is made before, has them; drawing is most of the time."""
    monkeypatch.setattr("torchprobe.studies.interpret.report.write_figures", lambda *_: None)


def test_every_section_is_there(whole: Interpretation) -> None:
    assert whole.results.keys() >= SECTIONS and whole.results["skipped"].keys() == {"provenance"}  # the network has no residual stream
    saved = json.loads((whole.folder / "results.json").read_text())
    assert set(saved) - set(whole.results) == {"checksum", "tables"}
    assert {key: saved[key] for key in whole.results} == whole.results


def test_kurtosis_is_that_of_the_representations(whole: Interpretation, images: Embeddings) -> None:
    kappa = vector_kurtosis(images.h)
    assert whole.results["kurtosis"]["mean"] == pytest.approx(float(kappa.mean()), rel=1e-12)
    by_name = dict(zip(images.ids, kappa.tolist(), strict=True))
    assert whole.ids == sorted(images.ids) != images.ids  # results are in the order of the folder, representations in a random one
    assert whole.kurtosis == pytest.approx([by_name[name] for name in whole.ids], rel=1e-12)
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
    assert low <= found["noisy"]["accuracy"] <= high and high - low > 0.05  # also if every image is right
    by_image = load_results(whole.folder).correct_under_shift["noisy"]
    assert by_image == whole.correct_under_shift["noisy"] and list(by_image) == shifted.ids
    assert sum(by_image.values()) == round(found["noisy"]["accuracy"] * len(by_image))
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
    for name, best in c["best"].items():  # the pairs of the largest gain say whether they count
        encoded = whole.concepts[name].encoded(0.9)
        numbers = {label.name: i for i, label in enumerate(whole.concepts[name].labels)}
        assert [row["encodes"] for row in best] == [bool(encoded[row["unit"], numbers[row["label"]]]) for row in best]
    page = (whole.folder / "index.html").read_text(encoding="utf-8")
    assert "significance decides" in page and '<td class="encodes short">yes</td>' in page
    assert (whole.folder / "concepts" / "units.safetensors").is_file()


def test_a_large_gain_that_does_not_count_is_marked() -> None:
    row = Detector(3, "sea", "scene", 0.99, 0.01, 0.98, 0.2, False)
    sweep = {"units": [SweepRow(HEADLINE, 0, 0, 0.0, math.nan, [1])]}
    section = concepts_section(Concepts(10, 1, HEADLINE, sweep, {"units": []}, {"units": [row, replace(row, encodes=None)]}))
    assert [shown["encodes"] for shown in section.tables[1].rows] == ["no", ""]


def test_tables_and_plots(whole: Interpretation) -> None:
    for name in ("kurtosis", "features", "layers", "accuracy", "robustness", "directions", "pruning", "ablation", "concepts"):
        with open(whole.folder / f"{name}.csv", newline="") as file:
            assert list(csv.DictReader(file)), name
    pngs, svgs = (sorted((whole.folder / "figures").glob(f"*.{suffix}")) for suffix in ("png", "svg"))
    assert len(pngs) == len(svgs) >= 9 and all(path.stat().st_size > 1000 for path in pngs)


def test_page_explains_and_claims_nothing(whole: Interpretation) -> None:
    page = (whole.folder / "index.html").read_text()
    for title in ("The representation", "Outlier features", "Over depth", "Accuracy", "Effective robustness", "Privileged directions",
                  "Pruning directions", "Without the outlier features", "Concepts", "How to read this"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    assert (
        "does not show that" in page and len(re.findall(r'<td class="section', page)) == 1 and "http" not in page.replace("http-equiv", "")
    )


@pytest.mark.usefixtures("undrawn")
def test_resumed_without_running_the_encoder(whole: Interpretation, data: Path) -> None:
    model = sets.encoder()
    before = (whole.folder / "results.json").read_bytes()
    head = sets.head(model)
    model.visual.fail = True  # type: ignore[assignment]
    again = run(data, whole.folder, model, head=head, resume=True)
    assert again.results == whole.results and (whole.folder / "results.json").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_interrupted_and_resumed(whole: Interpretation, data: Path, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, stop=lambda: next(asked, True))
    assert not (tmp_path / "results.json").exists()
    assert run(data, tmp_path, resume=True).results == whole.results


@pytest.mark.usefixtures("undrawn")
def test_a_stage_is_computed_anew_when_its_input_changed(whole: Interpretation, data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path, broden=None)
    other = sets.head(sets.encoder())
    flipped = Head(other.weight.detach().flip(0), names=sets.CLASSES)
    with pytest.warns(RunWarning, match="kurtosis, and what else depends on it, is computed again, because of another head"):
        second = run(data, tmp_path, broden=None, head=flipped, resume=True)
    assert second.results["accuracy"]["imagenet"]["accuracy"] != first.results["accuracy"]["imagenet"]["accuracy"]
    assert second.results["kurtosis"] == first.results["kurtosis"]


def test_images_alone(data: Path, tmp_path: Path) -> None:
    found = interpret(sets.encoder(), image_folder(data / "images"), tmp_path, layer_images=0)
    assert found.results.keys() & SECTIONS == {"kurtosis", "outliers"}
    assert found.results["skipped"].keys() == {"provenance"} | SECTIONS - {"kurtosis", "outliers"}
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


def test_pruning_sees_no_image_that_measured_importance_under_any_shift(whole: Interpretation, images: Embeddings) -> None:
    first, _ = split(images, seed=0)
    noisy = Embeddings.load(whole.folder / "embeddings" / "noisy.safetensors")  # named as the images are
    rest = noisy.select([name not in set(first.ids) for name in noisy.ids])
    assert 0 < len(rest) < len(noisy)
    found = whole.results["pruning"]
    assert found["images"]["noisy"] == len(rest)
    assert found["curves"]["noisy"]["importance"]["accuracy"][-1] == evaluate(sets.head(sets.encoder()), rest).accuracy


@pytest.mark.usefixtures("undrawn")
def test_unshifted_accuracy_on_the_classes_of_the_shift(data: Path, images: Embeddings, tmp_path: Path) -> None:
    """With imagenet_classes="subset" that is the x axis, along pruning too, and rows that stand for one class do so on both axes."""
    x = np.linspace(40.0, 90.0, 6)
    columns = {"imagenet": x, "imagenet_r": 0.7 * x + np.arange(6) % 2, "imagenet_on_r_classes": x + 5}
    shift = replace(labeled_folder(data / "noisy", names=sets.CLASSES), classes=(0, 1), groups={0: (0, 1)})
    blue_and_green = [i for i, label in enumerate(shift.labels) if label < 2]
    shift = replace(shift, paths=[shift.paths[i] for i in blue_and_green], labels=[0 for _ in blue_and_green])
    options = {"shifts": {"imagenet_r": shift}, "baseline": Baseline(columns), "broden": None, "layer_images": 0}
    results = run(data, tmp_path, **options, imagenet_classes="subset").results  # type: ignore[arg-type]
    head, one = sets.head(sets.encoder()), replace(images, classes=(0, 1), groups={0: (0, 1)})
    assert results["accuracy"]["imagenet_on_r_classes"]["accuracy"] == evaluate(head, one).accuracy == 1.0  # both rows are right
    plain = Baseline(columns | {"imagenet_on_r_classes": x + 5})
    assert results["robustness"]["rows"][0]["x"] == "subset" and results["robustness"]["rows"][0]["imagenet"] == 100
    base = [50.0, 0.0, 100.0]
    along = effective_robustness_along([40.0, 40.0, 40.0], base, "imagenet_r", "subset", plain)
    assert along[0] == effective_robustness(40.0, 50.0, shift="imagenet_r", imagenet_classes="subset", baseline=plain)
    assert np.isnan(along[1:]).all()


def test_effective_robustness_at_random_is_that_of_each_draw(whole: Interpretation) -> None:
    for name, orders in whole.results["pruning"]["robustness"].items():
        for curve in (orders["random"],):
            for value, low, high in zip(curve["effective_robustness"], curve["low"], curve["high"], strict=True):
                assert value is None or low <= value <= high, name


def test_shifts_without_standard_models_are_told() -> None:
    known = {"imagenet": 63.32, "imagenet_r": 69.33}
    found = measure_robustness(known | {"rotated": 50.0}, ["imagenet_r", "rotated"], "full", None, "measured")
    assert [row.shift for row in found.rows] == ["imagenet_r"] and "no standard models" in found.left_out["rotated"]
    found = measure_robustness(known | {"imagenet_v2": 55.9}, ["imagenet_r", "imagenet_v2"], "subset", None, "published")
    assert [row.shift for row in found.rows] == ["imagenet_v2"] and "imagenet_on_r_classes" in found.left_out["imagenet_r"]
    near_chance = {"imagenet": 0.1, "imagenet_v2": 0.1}  # these are not fractions
    assert measure_robustness(near_chance, ["imagenet_v2"], "full", None, "measured").rows


def headline(whole: Interpretation, robust: Robustness) -> str:
    return next(fact.note for fact in facts(replace(whole.results, robustness=robust)) if fact.label == "Effective robustness")


def test_the_page_gives_the_mean_robustness_with_its_interval(whole: Interpretation) -> None:
    accuracies = {"imagenet": 70.0, "imagenet_v2": 60.0, "imagenet_r": 50.0}
    found = measure_robustness(accuracies, ["imagenet_v2", "imagenet_r"], "full", None, "measured", dict.fromkeys(accuracies, 400))
    expected = robustness(accuracies, images=dict.fromkeys(accuracies, 400)).mean
    assert (found.mean_interval, found.mean_line_interval) == (expected.interval, expected.line_interval)
    assert found.correlation == expected.correlation.tolist() and found.mean()[0] == pytest.approx(expected.effective_robustness)
    (text,) = [one for one in robustness_section(found).paragraphs if "mean over these 2 shifts" in one]
    ends = [f"{end:.3g}" for end in (*expected.interval, *expected.line_interval)]
    assert f"{ends[0]} to {ends[1]}" in text.replace("−", "-") and f"{ends[2]} to {ends[3]}" in text.replace("−", "-")
    few = measure_robustness(accuracies, ["imagenet_v2", "imagenet_r"], "full", None, "measured", dict.fromkeys(accuracies, 7))
    assert any("withheld" in one for one in robustness_section(few).paragraphs)
    for known, expected_text in ((found, f"95% interval {ends[0]} … {ends[1]}"), (few, "no interval: 7 images")):  # also in the headline
        assert expected_text in headline(whole, known)
    assert "imagenet_v2; 95% interval" in headline(whole, replace(found, rows=found.rows[:1]))
    assert not any("mean over" in one for one in robustness_section(replace(found, rows=found.rows[:1])).paragraphs)


def test_mean_robustness_leaves_out_what_there_is_not() -> None:
    table = robustness({"imagenet": 60.0, "imagenet_v2": 50.0, "imagenet_r": 40.0})
    row = decode(ShiftRow, table.rows()[0])
    values = (("a", 4.0), ("b", math.nan), ("c", -1.0), ("mean", 99.0))
    rows = [replace(row, shift=name, effective_robustness=value) for name, value in values]
    found = Robustness(rows, math.nan, "full", "measured", "", {})
    assert found.mean() == (1.5, 2) and found.by_shift() == {"a": 4.0, "c": -1.0}
    mean, shifts = replace(found, rows=rows[1:2]).mean()
    assert math.isnan(mean) and shifts == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_images(data: Path, tmp_path: Path, count: int) -> None:
    all_of_them = labeled_folder(data / "images", names=sets.CLASSES)
    few = replace(all_of_them, paths=all_of_them.paths[:count], labels=all_of_them.labels[:count])
    found = interpret(sets.encoder(), few, tmp_path, head=sets.head(sets.encoder()), layer_images=1).results
    assert found["accuracy"]["imagenet"]["images"] == count
    if count == 1:
        assert "too few to split" in found["skipped"]["directions"] == found["skipped"]["pruning"]
    assert (tmp_path / "index.html").is_file()


def test_heads_that_say_little(data: Path, tmp_path: Path) -> None:
    images = labeled_folder(data / "images")
    alike = interpret(sets.encoder(), images, tmp_path / "alike", head=Head(torch.ones(3, sets.FEATURES)), layer_images=0).results
    assert alike["directions"]["centred"] == [] and alike["directions"]["rank"] == 1
    zeros = interpret(sets.encoder(), images, tmp_path / "zeros", head=Head(torch.zeros(3, sets.FEATURES)), layer_images=0).results
    assert "all 192 weights of the head are 0" in zeros["skipped"]["directions"] and "accuracy" in zeros


def test_unlabeled_shift_is_left_out(data: Path, tmp_path: Path) -> None:
    found = run(data, tmp_path, shifts={"noisy": image_folder(data / "noisy")}, broden=None, layer_images=0).results
    assert set(found["accuracy"]) == {"imagenet"} and set(found["pruning"]["curves"]) == {"imagenet"}
    assert "robustness" in found["skipped"]


def test_narrow_representation_has_no_outlier_feature(data: Path, tmp_path: Path) -> None:
    narrow = Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), features=3, preprocess=sets.pixels, name="narrow")
    head = Head(torch.eye(3)[[2, 1, 0]])
    found = interpret(narrow, labeled_folder(data / "images"), tmp_path, head=head, layer_images=0).results
    assert "3 features are too few for one of them to stand out" in found["skipped"]["ablation"]
    assert found["outliers"]["rows"][0]["outlier_share"] is None
    assert "3 features are too few" in (tmp_path / "index.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_remarks_on_folders_reach_the_page(data: Path, tmp_path: Path) -> None:
    folder = sets.write_classes(tmp_path / "images", each=3)
    (folder / "red" / "notes <b>.txt").write_text("x")
    (folder / "loose.png").write_bytes((folder / "red" / "00.png").read_bytes())
    images = Inputs(folder).subject(sets.encoder(), "none").images
    found = interpret(sets.encoder(), images, tmp_path / "out", layer_images=0).results
    assert found["data"]["imagenet"]["remarks"] == ["left out: 1 file that is not an image", "1 image outside the class folders left out"]
    assert "1 image outside the class folders" in (tmp_path / "out" / "index.html").read_text()


def test_a_layer_that_never_fired_is_told(data: Path, tmp_path: Path) -> None:
    model = sets.encoder()
    model.visual.unused = nn.Linear(3, 3)
    found = interpret(model, image_folder(data / "images"), tmp_path, layers=(name for name in ("visual.mix", "visual.unused")))
    assert [row["layer"] for row in found.results["layers"]["rows"]] == ["visual.mix", ""]
    assert any("visual.unused" in remark for remark in found.results["layers"]["remarks"])
    assert "visual.unused" in (tmp_path / "index.html").read_text()


def test_names_of_sets_that_are_one_file_name(data: Path, tmp_path: Path) -> None:
    shifts = {
        "a:b": labeled_folder(data / "noisy"),
        "a/b": labeled_folder(data / "images"),
        "imagenet$<i>\n": labeled_folder(data / "noisy"),
    }
    options = {"shifts": shifts, "broden": None, "layer_images": 0}
    first = run(data, tmp_path, **options)  # type: ignore[arg-type]
    assert len(list((tmp_path / "embeddings").iterdir())) == 4
    assert run(data, tmp_path, **options, resume=True).results == first.results  # type: ignore[arg-type]
    assert "<i>" not in (tmp_path / "index.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_what_an_earlier_run_left_is_no_part_of_a_smaller_one(whole: Interpretation, data: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "again")
    with pytest.raises(OtherRunError, match="again holds the results of torchprobe interpret of .*: continue it with --resume"):
        interpret(sets.encoder(), image_folder(data / "images"), tmp_path / "again", layer_images=0)
    (tmp_path / "again" / "mine.csv").write_text("mine")
    interpret(sets.encoder(), image_folder(data / "images"), tmp_path / "again", layer_images=0, overwrite=True)
    assert {path.stem for path in (tmp_path / "again").glob("*.csv")} == {"kurtosis", "features", "mine"}
    assert not (tmp_path / "again" / "concepts").exists() and not (tmp_path / "again" / "embeddings" / "noisy.safetensors").exists()


@pytest.mark.usefixtures("undrawn")
def test_lost_files_are_made_again(whole: Interpretation, data: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "again")
    (tmp_path / "again" / "concepts" / "units.safetensors").unlink()
    (tmp_path / "again" / "stages" / "kurtosis.json").write_text("{")
    assert run(data, tmp_path / "again", resume=True).results == whole.results


@pytest.mark.usefixtures("undrawn")
def test_what_a_stage_depends_on_is_among_its_facts(whole: Interpretation, data: Path, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "again")
    changed = Baseline({"imagenet": [40.0, 60.0, 90.0], "noisy": [10.0, 20.0, 60.0]})
    with pytest.warns(RunWarning) as told:
        second = run(data, tmp_path / "again", resume=True, baseline=changed, layer_images=5, layers="visual.mix").results
    assert len(told) == 2 and "another baseline: imagenet" in str(told[0].message) and "another count: 1024" in str(told[1].message)
    assert second["robustness"]["rows"] != whole.results["robustness"]["rows"]
    assert second["pruning"]["robustness"] != whole.results["pruning"]["robustness"]
    assert second["layers"]["images"] == 8 and [row["layer"] for row in second["layers"]["rows"]] == ["visual.mix", ""]
    sets.write_concepts(tmp_path / "concepts", 30)
    with pytest.warns(RunWarning) as told:
        other = run(data, tmp_path / "again", resume=True, broden=Broden(tmp_path / "concepts")).results
    assert any(
        "concepts-made, and what else depends on it, is computed again, because of another dataset" in str(one.message) for one in told
    )
    assert other["concepts"]["images"] == 30 and whole.results["concepts"]["images"] == 60


@pytest.mark.usefixtures("undrawn")
def test_killed_in_any_stage_and_resumed(whole: Interpretation, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was written last, the rest follows: as after kill -9, nothing is tidied up."""
    original = Stages.run
    for last in range(1, 9):
        made: list[str] = []

        def dies(self: Stages, name: str, *rest: object, last: int = last, made: list[str] = made) -> object:
            if len(made) == last:
                raise SystemExit(9)
            made.append(name)
            return original(self, name, *rest)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Stages, "run", dies)
            with pytest.raises(SystemExit):
                run(data, tmp_path, resume=True)
    left = tmp_path / "concepts" / "checkpoint" / "overlap-rank0.safetensors"  # killed between the last stage and the end of its clearing
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"")
    assert run(data, tmp_path, resume=True).results == whole.results
    assert not left.parent.exists()


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_read_is_counted(data: Path, tmp_path: Path) -> None:
    folder = sets.write_classes(tmp_path / "images", each=4)
    (folder / "red" / "torn <b>.png").write_bytes((folder / "red" / "00.png").read_bytes()[:60])
    found = interpret(sets.encoder(), labeled_folder(folder), tmp_path / "out", head=sets.head(sets.encoder()), layer_images=0)
    (skipped,) = found.results["data"]["imagenet"]["skipped"]
    assert skipped["file"] == "red/torn <b>.png" and found.results["data"]["imagenet"]["images"] == 12
    page = (tmp_path / "out" / "index.html").read_text()
    assert "torn &lt;b&gt;.png" in page and "torn <b>" not in page


def test_refusals(data: Path, tmp_path: Path) -> None:
    images = image_folder(data / "images")
    with pytest.raises(ValueError, match="the head takes 5 features, but the representation of colors has 64"):
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
    subject = Inputs(data / "images", {"noisy": data / "noisy"}).subject(model, "own")
    images, noisy = subject.images, subject.shifts["noisy"]
    assert subject.head is shuffled and set(images.labels[:14]) == {1} and set(noisy.labels[:6]) == {1}  # type: ignore[attr-defined]


def test_own_head_without_names(data: Path) -> None:
    model = sets.encoder()
    model.head = Head(sets.head(model).weight.detach())
    images = Inputs(data / "images").subject(model, "auto").images
    assert images.labels[0] == 0  # type: ignore[attr-defined]
    model.head = Head(torch.randn(5, sets.FEATURES))
    with pytest.raises(DatasetError, match="3 class folders, but the head has 5 rows without names"):
        Inputs(data / "images").subject(model, "own")


def test_words_that_mean_no_head(data: Path, tmp_path: Path) -> None:
    model = sets.encoder()
    inputs = Inputs(data / "images")
    with pytest.raises(EncoderError, match="no trained head"):
        inputs.subject(model, "own")
    with pytest.raises(EncoderError, match="no text tower"):
        inputs.subject(model, "zero-shot")
    assert inputs.subject(model, "auto").head is None
    sets.head(model).save(tmp_path / "head.safetensors")
    assert inputs.subject(model, str(tmp_path / "head.safetensors")).head is not None


def test_a_folder_of_imagenet_that_is_not_a_wnid(tmp_path: Path) -> None:
    sets.write_classes(tmp_path / "images", each=1)
    (tmp_path / "images" / "red").rename(tmp_path / "images" / "n01440764")
    with pytest.raises(DatasetError, match="blue is not a class of imagenet"):
        Inputs(tmp_path / "images").subject(sets.encoder(), "none")


def test_imagenet_within_its_only_folder(tmp_path: Path) -> None:
    (tmp_path / "archive" / "n01440764").mkdir(parents=True)
    assert is_imagenet(tmp_path) and is_imagenet(tmp_path / "archive")
    (tmp_path / "beside").mkdir()
    assert not is_imagenet(tmp_path)
