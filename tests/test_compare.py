"""Saved interpretations beside each other."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import interpret_sets as sets
import numpy as np
import pytest
import torch
from drawing import stop_drawing

from torchprobe.analysis.baseline import FITS, Baseline
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.given_files import Given
from torchprobe.analysis.resampling import bootstrap_interval, rank_correlation
from torchprobe.analysis.robustness_intervals import paired_robustness
from torchprobe.analysis.shares import paired_difference
from torchprobe.analysis.standard_models import standard_models
from torchprobe.common.checked import sealed, write_checked
from torchprobe.common.runs import Progress, RunOptions
from torchprobe.datasets import Broden, labeled_folder
from torchprobe.encoders.suite import load_suite
from torchprobe.studies.compare import Comparison, compare, load_results, write
from torchprobe.studies.compare.pairs import difference, unlike
from torchprobe.studies.interpret import interpret
from torchprobe.studies.interpret.accuracy import measure_robustness
from torchprobe.studies.interpret.given import GivenSubject
from torchprobe.studies.interpret.run import interpret_given

ROLES = ("zero-shot", "fine-tuned", "supervised")
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("compare")
    images, broden = sets.write_classes(root / "images", each=8), Broden(sets.write_concepts(root / "concepts", 30))
    made = []
    with pytest.MonkeyPatch.context() as patch:
        stop_drawing(patch)  # test_interpret.py looks at the plots
        for seed, role in enumerate(ROLES):
            model = sets.encoder(seed, f"colors {seed}")
            if seed:
                with torch.no_grad():
                    model.visual.mix.bias[sets.OUTLIER] = 40 / (1 + seed)  # type: ignore[union-attr, index]
            name = HOSTILE if seed == 2 else f"model {seed}"
            interpret(
                model,
                labeled_folder(images, names=sets.CLASSES),
                root / role,
                head=sets.head(model),
                broden=broden,
                layer_images=0,
                about={"name": name, "role": role, "backbone": "colors", "pretraining": "none"},
                published={"imagenet": 60.0 + seed, "imagenet_v2": 50.0 + 2 * seed},
            )
            made.append(root / role)
    return made


@pytest.fixture(scope="module")
def found(folders: list[Path]) -> Comparison:
    return compare(folders)


def test_one_row_for_each(found: Comparison) -> None:
    assert [row["role"] for row in found.models] == list(ROLES)
    kurtosis = [row["kurtosis"] for row in found.models]
    assert kurtosis == sorted(kurtosis, reverse=True) and kurtosis[0] > kurtosis[2] + 1
    assert all(row["robustness"] is not None and row["concepts"] >= 3 for row in found.models)


def test_each_part_is_reported(folders: list[Path]) -> None:
    told: list[Progress] = []
    compare(folders, progress=told.append)
    stages = dict.fromkeys(one.stage for one in told)
    assert list(stages) == ["reading", "summaries", "pairs", "gaps, correlations and concepts"]
    of_pairs = [one for one in told if one.stage == "pairs"]
    assert [(one.done, one.total, one.unit) for one in of_pairs] == [(0, 2, "pairs"), (1, 2, "pairs"), (2, 2, "pairs")]
    assert of_pairs[0].remaining is None and of_pairs[1].remaining is not None and of_pairs[2].remaining == 0


def test_pairs_are_those_with_the_zero_shot_encoder(found: Comparison, folders: list[Path]) -> None:
    assert [(row["a"], row["b"]) for row in found.pairs] == [("model 0", "model 1"), ("model 0", HOSTILE)]
    a, b = (load_results(folder).kurtosis for folder in folders[:2])
    each = np.array([a[name] - b[name] for name in a])
    row = found.pairs[0]
    assert row["kurtosis"] == pytest.approx(each.mean()) and row["images"] == 24
    assert (row["kurtosis_low"], row["kurtosis_high"]) == pytest.approx(bootstrap_interval(each, 0))
    assert row["shared_concepts"] == 3


def test_cka_of_representations(found: Comparison, folders: list[Path]) -> None:
    a, b = (Embeddings.load(folder / "embeddings" / "imagenet.safetensors").h.double() for folder in folders[:2])
    assert found.pairs[0]["cka"] == pytest.approx(unbiased_cka(a, b), abs=1e-5)


def unbiased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    def hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741 (the formula's own names)
        n = len(k)
        return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * k.sum(0) @ l.sum(0)

    k, l = ((z @ z.T).fill_diagonal_(0) for z in (x, y))  # noqa: E741
    return float(hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt())


def test_correlations_are_over_the_encoders(found: Comparison) -> None:
    row = next(row for row in found.correlations if (row["x"], row["y"]) == ("kurtosis", "robustness"))
    expected = rank_correlation([r["kurtosis"] for r in found.models], [r["robustness"] for r in found.models])
    assert (row["models"], row["rho"], row["n"]) == ("all", expected.rho, 3)


def test_written_and_harmless(found: Comparison, tmp_path: Path) -> None:
    files = write(found, tmp_path)
    assert json.loads(files["comparison"].read_text())["models"][0]["model"] == "model 0"
    page = files["page"].read_text()
    for title in ("The encoders", "Pairs within a backbone", "Rank correlations", "Pruning", "Concepts in common"):
        assert f"<h2>{title}</h2>" in page
    assert HOSTILE not in page and "&lt;img src=x" in page
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 3


def test_long_names_leave_room_for_the_figures(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(folders)
    saved = [one.called(f"{one.name} with a long name (/some/where/far/away/in/a/folder/of/results)") for one in comparison.saved]
    write(replace(comparison, saved=saved), tmp_path)  # matplotlib's warning would be an error


def test_models_without_a_common_part(folders: list[Path], tmp_path: Path) -> None:
    bare = interpret(sets.encoder(), labeled_folder(sets.write_classes(tmp_path / "images", 4)), tmp_path / "bare", layer_images=0)
    other = compare([folders[0], bare.folder])
    assert other.models[1]["accuracy"] is None and other.pairs == [] and other.overlaps == []
    write(other, tmp_path / "out")


def test_difference_of_accuracy_has_an_interval_over_images(found: Comparison, folders: list[Path]) -> None:
    a, b = (load_results(folder).correct for folder in folders[:2])
    row = found.pairs[0]
    each = np.array([float(a[name]) - float(b[name]) for name in a])
    assert len(each) == 24 and row["accuracy"] == pytest.approx(each.mean())
    expected = paired_difference([a[name] for name in a], [b[name] for name in a])
    assert (row["accuracy"], row["accuracy_low"], row["accuracy_high"]) == pytest.approx(expected)


def test_difference_of_robustness_has_a_paired_interval(folders: list[Path]) -> None:
    rng = np.random.default_rng(0)
    right = {name: rng.random((2, 60)) < 0.7 for name in ("imagenet", "imagenet_v2", "objectnet")}
    saved = []
    for i, folder in enumerate(folders[:2]):
        accuracies = {name: 100 * float(each[i].mean()) for name, each in right.items()}
        measured = measure_robustness(accuracies, ["imagenet_v2", "objectnet"], "full", None, "measured", dict.fromkeys(right, 60))
        by_image = {name: {f"{k}.png": bool(value) for k, value in enumerate(each[i])} for name, each in right.items()}
        one = load_results(folder)
        correct = by_image.pop("imagenet")
        saved.append(replace(one, results=replace(one.results, robustness=measured), correct=correct, correct_under_shift=by_image))
    row = difference(*saved)
    lines = [FITS[name, "full"] for name in ("imagenet_v2", "objectnet")]
    together = standard_models().residual_correlation(["imagenet_v2", "objectnet"])
    pairs = [tuple(right["imagenet_v2"]), tuple(right["objectnet"])]
    expected = paired_robustness(lines, pairs, tuple(right["imagenet"]), correlation=together)
    assert (row.robustness, row.robustness_low, row.robustness_high) == pytest.approx(expected)
    for one in saved:  # the mean over several shifts has its own interval
        summary, measured = one.summary(), one.results.robustness
        assert measured is not None and (summary.robustness_low, summary.robustness_high) == measured.mean_line_interval
        assert summary.robustness_low < summary.robustness < summary.robustness_high
    for other in (replace(saved[1], correct_under_shift={}), replace(saved[1], correct={"a.png": True})):  # earlier versions; other images
        assert math.isnan(difference(saved[0], other).robustness_low)


def test_what_is_unlike_is_said(found: Comparison, folders: list[Path], tmp_path: Path) -> None:
    assert found.pairs[0]["remark"] == ""
    one, other = (load_results(folder) for folder in folders[:2])
    r = other.results
    wide = replace(
        r, features=9, kurtosis=replace(r.kurtosis, nonnegative=not r.kurtosis.nonnegative), about={**r.about, "modality": "text"}
    )
    remark = unlike(one, replace(other, results=wide, kurtosis={"another": 3.0}))
    for part in ("64 features against 9", "never negative", "modality unknown against text", "0 of 24 and 1 are common"):
        assert part in remark
    unknown = tmp_path / "unknown"
    shutil.copytree(folders[1], unknown)
    results = json.loads((unknown / "results.json").read_text())
    results["about"].pop("backbone")
    write_checked(unknown / "results.json", results)
    lonely = compare([folders[0], unknown])
    assert lonely.pairs == [] and "is unknown (--backbone)" in lonely.remarks[0]


def test_a_layer_a_position_and_other_shifts_are_told(folders: list[Path]) -> None:
    one, other = (load_results(folder) for folder in folders[:2])
    moved = replace(other, results=replace(other.results, about={**other.results.about, "layer": "visual.mix", "position": "class"}))
    assert unlike(one, moved) == "layer unknown against visual.mix; position unknown against class"
    own = Baseline({"imagenet": [60, 70, 80], "imagenet_v2": [47, 58, 69]})
    accuracies = {"imagenet": 61.0, "imagenet_v2": 52.0}
    measured = measure_robustness(accuracies, ["imagenet_v2"], "full", own, "measured")
    shifted = [{"imagenet_v2": {f"{k}.png": True for k in range(first, first + 30)}} for first in (0, 10)]
    first = replace(one, correct_under_shift=shifted[0])
    second = replace(other, results=replace(other.results, robustness=measured), correct_under_shift=shifted[1])
    remark = unlike(first, second)
    for part in (
        "published against measured",
        "other lines of standard models",
        "other images under imagenet_v2: 20 of 30 and 30 are common",
    ):
        assert part in remark


def given(out: Path, h: np.ndarray, **about: str) -> Path:
    """An interpretation of representations, as of encoders of the built-in suite."""
    interpret_given(GivenSubject(about["name"], Given.of(Embeddings.from_arrays(h)), about=about), out, RunOptions())
    return out


@pytest.mark.usefixtures("undrawn")
def test_the_pairs_of_the_built_in_suite_that_are_unlike(tmp_path: Path) -> None:
    """CLIP's RN50 gives 1024 features of both signs, torchvision's 2048 that are never negative: one backbone, but another kurtosis."""
    rows = {row.name: row for row in load_suite() if row.name in ("RN50/openai", "RN50/torchvision")}
    rng = np.random.default_rng(0)
    h = {"RN50/openai": rng.normal(size=(40, 1024)), "RN50/torchvision": np.maximum(rng.normal(size=(40, 2048)), 0)}
    for name, row in rows.items():
        given(tmp_path / row.role, h[name], name=name, role=row.role, backbone=row.backbone, pretraining=row.pretraining)
    found = compare([tmp_path / "supervised", tmp_path / "zero-shot"])
    (pair,) = found.pairs
    assert pair.pair == "RN50/openai − RN50/torchvision" and pair.kurtosis < -2
    assert "1024 features against 2048" in pair.remark and "never negative, as after a ReLU" in pair.remark
    assert ["same width" in found.remarks[k] or "same signs" in found.remarks[k] for k in (-2, -1)] == [True, True]
    page = write(found, tmp_path / "out")["page"].read_text()
    assert "1024 features against 2048" in page and "Their kurtosis differs for that reason too." in page


@pytest.mark.usefixtures("undrawn")
def test_encoders_without_a_backbone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lonely = [given(tmp_path / f"{i}", rng.normal(size=(40, 64)), name=f"encoder {i}") for i in range(3)]
    found = compare(lonely)
    assert [pair.pair for pair in found.pairs] == [f"encoder {i} − encoder {j}" for i, j in ((0, 1), (0, 2), (1, 2))]
    assert {pair.remark for pair in found.pairs} == {"the backbone is unknown (--backbone)"}
    page = write(found, tmp_path / "out")["page"].read_text()
    assert "<h2>Pairs</h2>" in page and "Within a backbone" not in page
    assert "differences between backbones say little" in page
    known = given(tmp_path / "known", rng.normal(size=(40, 64)), name="known", backbone="RN50")
    mixed = compare([*lonely[:2], known])
    assert [pair.pair for pair in mixed.pairs] == ["encoder 0 − encoder 1"]
    assert mixed.remarks[-1] == ("The backbone of encoder 0, encoder 1 is unknown (--backbone), so no difference with known is taken.")


def test_nothing_is_taken_from_images_that_are_not_common(folders: list[Path]) -> None:
    one, other = (load_results(folder) for folder in folders[:2])
    elsewhere = replace(
        other,
        kurtosis={f"other/{name}": value for name, value in other.kurtosis.items()},
        correct={f"other/{name}": value for name, value in other.correct.items()},
    )
    row = difference(one, elsewhere)
    assert row.images == 0 and all(map(math.isnan, (row.kurtosis, row.accuracy, row.accuracy_low, row.robustness_low)))
    assert "other images: 0 of 24 and 24 are common" in row.remark


def test_robustness_is_compared_over_the_shifts_that_both_have(folders: list[Path], tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(folders[1], more)
    results = json.loads((more / "results.json").read_text())
    rows = results["robustness"]["rows"]
    rows.append({**rows[0], "shift": "imagenet_a", "effective_robustness": 90.0})
    write_checked(more / "results.json", results)
    row, expected = (compare([folders[0], other]).pairs[0] for other in (more, folders[1]))
    assert row["robustness"] == expected["robustness"] and row["shifts"] == 1


def test_encoders_that_were_not_shown_the_same(folders: list[Path], found: Comparison, tmp_path: Path) -> None:
    assert found.remarks == []
    other = interpret(
        sets.encoder(1, "other"),
        labeled_folder(sets.write_classes(tmp_path / "images", 5), names=sets.CLASSES),
        tmp_path / "out",
        broden=Broden(sets.write_concepts(tmp_path / "concepts", 24)),
        layer_images=0,
    )
    comparison = compare([folders[0], other.folder])
    assert ["not seen the same images" in comparison.remarks[0], "same concepts" in comparison.remarks[1]] == [True, True]
    assert "not seen the same images" in write(comparison, tmp_path / "page")["page"].read_text()


def test_two_of_one_name_are_told_apart(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "copy")
    names = [row["model"] for row in compare([folders[0], tmp_path / "copy"]).models]
    assert names == [f"model 0 ({folders[0]})", f"model 0 ({tmp_path / 'copy'})"]


def test_refusals(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two"):
        compare(folders[:1])
    with pytest.raises(ValueError, match="is given twice"):
        compare([folders[0], folders[0]])
    with pytest.raises(FileNotFoundError, match="no results in"):
        compare([folders[0], tmp_path])
    damaged, whole = tmp_path / "damaged", json.loads((folders[0] / "results.json").read_text())
    shutil.copytree(folders[0], damaged)
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged: expected a JSON object, got list"),
        ('{"format": 99}', "has format 99"),
        ('{"format": 1}', "is damaged: Results lacks 'torchprobe'"),
        (json.dumps(whole | {"kurtosis": {}}), "is damaged: its checksum does not fit"),
        (json.dumps(sealed(whole | {"kurtosis": {}})), "is damaged: kurtosis lacks 'mean'"),
        (json.dumps(sealed(whole | {"tables": {"../x.csv": ""}})), "is damaged: 'tables' names other tables"),
    ):
        (damaged / "results.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_results(damaged)
    (damaged / "results.json").write_text((folders[0] / "results.json").read_text())
    (damaged / "kurtosis.csv").write_text("image,vector_kurtosis\na,many\n")
    with pytest.raises(ValueError, match=r"kurtosis.csv is damaged: it is not the table that belongs to .*results.json"):
        load_results(damaged)
    del whole["tables"]  # as the version before wrote it
    write_checked(damaged / "results.json", whole)
    with pytest.raises(ValueError, match=r"kurtosis.csv is damaged: line 2: could not convert"):
        load_results(damaged)
    (damaged / "kurtosis.csv").write_text("image,vector_kurtosis\na,3\n")
    (damaged / "correct.csv").write_text("images,image,right\nv2,a,True\nv2,b,True\nv2,a,False\n")
    with pytest.raises(ValueError, match=r"correct.csv is damaged: line 4: the image 'a' is there twice"):
        load_results(damaged)
