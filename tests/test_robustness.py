"""Effective robustness: the published numbers, lines against numpy and scipy, and tables that are no baselines."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from torchprobe.analysis import baseline as baseline_module
from torchprobe.analysis.baseline import POOR, _student
from torchprobe.analysis.robustness import (
    FITS,
    MEAN,
    SHIFTS,
    SUBSETS,
    Baseline,
    effective_robustness,
    mean_effective_robustness,
    robustness,
)

# Published accuracies of OpenAI's encoders (OpenCLIP's table), percent.
VIT_B_32 = {"imagenet": 63.32, "imagenet_v2": 55.92, "imagenet_r": 69.33, "imagenet_sketch": 42.29, "objectnet": 44.31, "imagenet_a": 31.55}
VIT_L_14 = {"imagenet": 75.54, "imagenet_v2": 69.83, "imagenet_r": 87.84, "imagenet_sketch": 59.59, "objectnet": 68.89, "imagenet_a": 70.75}
RN50_YFCC = {"imagenet": 32.75, "imagenet_v2": 27.93, "imagenet_r": 22.20, "imagenet_sketch": 7.15, "objectnet": 17.72, "imagenet_a": 13.73}


def logit(p):
    p = np.asarray(p) / 100
    return np.log(p / (1 - p))


def invented(n=40, seed=0):
    """Standard models whose accuracies lie around lines in logits."""
    rng = np.random.default_rng(seed)
    imagenet = rng.uniform(30, 90, n)
    noisy = {shift: 100 / (1 + np.exp(1 + i / 4 - logit(imagenet) + 0.1 * rng.normal(size=n))) for i, shift in enumerate(SHIFTS)}
    return {"imagenet": imagenet, **noisy, **dict.fromkeys(SUBSETS.values(), 100 - 0.8 * (100 - imagenet))}


# -- the published numbers -----------------------------------------------------------------------------------------------


def test_the_published_effective_robustness():
    found = {shift: effective_robustness(VIT_B_32[shift], VIT_B_32["imagenet"], shift=shift) for shift in SHIFTS}
    expected = {"imagenet_v2": 5.8, "imagenet_r": 44.4, "imagenet_sketch": 27.9, "objectnet": 24.0, "imagenet_a": 30.6}
    assert found == pytest.approx(expected, abs=0.05)
    assert all(type(value) is float for value in found.values())


def test_the_mean_of_the_five_is_not_that_of_the_mean():
    assert mean_effective_robustness(VIT_L_14) == pytest.approx(38.9, abs=0.05)
    mean = np.mean([VIT_L_14[shift] for shift in SHIFTS])
    assert effective_robustness(mean, 75.54, shift="mean") == pytest.approx(38.5, abs=0.05)
    table = robustness(VIT_L_14)
    assert table.mean_effective_robustness == mean_effective_robustness(VIT_L_14)
    assert table.of_mean.effective_robustness == table[MEAN].effective_robustness == effective_robustness(mean, 75.54, shift="mean")
    assert [row["shift"] for row in table.rows()] == [*SHIFTS, MEAN]


def test_below_the_baseline_it_is_extrapolated():
    table = robustness(RN50_YFCC)
    assert table.mean_effective_robustness == pytest.approx(9, abs=0.5)
    for row in (*table.shifts, table.of_mean):
        assert row.extrapolated and "extrapolated: the lowest" in row.note and "56.52 %" in row.note
        assert row.interval[0] < row.effective_robustness < row.interval[1]
    assert not any(row.extrapolated or "extrapolated" in row.note for row in robustness(VIT_B_32).shifts)
    assert "the highest" in robustness({"imagenet": 91.0, "imagenet_v2": 85.0})["imagenet_v2"].note
    assert [row.shift for row in table.shifts if "poor fit: R² is 0.773" in row.note] == ["imagenet_a"]


@pytest.mark.parametrize("key", FITS, ids=" ".join)
def test_the_fits_say_how_good_they_are(key):
    fit = FITS[key]
    assert (fit.shift, fit.imagenet_classes) == key
    assert fit.n == {"imagenet_r": 80, "imagenet_a": 84, "mean": 80}.get(fit.shift, 85)
    assert fit.poor == (fit.shift == "imagenet_a") == (fit.r2 < POOR)
    assert "Taori" in fit.source
    assert fit.predict(70.0) == pytest.approx(100 / (1 + math.exp(-fit.slope * math.log(7 / 3) - fit.intercept)), rel=1e-12)


GOLDEN = os.environ.get("TORCHPROBE_GOLDEN", "")
golden = pytest.mark.skipif(not GOLDEN, reason="TORCHPROBE_GOLDEN does not name the folder of the published results")


@golden
@pytest.mark.parametrize("key", FITS, ids=" ".join)
def test_the_fits_are_those_of_the_published_models(key):
    fit = Baseline.from_csv(Path(GOLDEN, "imagenet_testbed_standard_models.csv"), minimum=55).fit(*key)
    published = FITS[key]
    for name in ("slope", "intercept", "r2", "lowest_x", "highest_x", "residual_std", "x_mean", "x_squares"):
        assert getattr(fit, name) == pytest.approx(getattr(published, name), rel=1e-8), name
    assert fit.n == published.n
    rounded = {  # as Taori et al.'s results were summarized
        ("imagenet_v2", "full"): (0.923, -0.498, 0.996),
        ("imagenet_r", "full"): (0.912, -1.600, 0.877),
        ("imagenet_sketch", "full"): (1.071, -2.370, 0.869),
        ("objectnet", "full"): (1.199, -2.024, 0.941),
        ("imagenet_a", "full"): (3.052, -6.292, 0.773),
        ("mean", "full"): (1.044, -1.892, 0.948),
        ("imagenet_r", "subset"): (0.637, -2.108, None),
        ("objectnet", "subset"): (0.981, -1.928, None),
        ("imagenet_a", "subset"): (1.990, -7.632, None),
    }[key]
    assert (round(fit.slope, 3), round(fit.intercept, 3)) == rounded[:2]
    assert rounded[2] in (None, round(fit.r2, 3))


@golden
def test_the_standard_models_are_those_of_the_testbed():
    with (
        open(Path(GOLDEN, "imagenet_testbed_standard_models.csv"), newline="") as published,
        open(Path(baseline_module.__file__).with_name("standard_models.csv"), newline="") as shipped,
    ):
        rows = list(csv.DictReader(shipped))
        assert (
            rows == list(csv.DictReader(published))
            and len(rows) == 85
            and set(rows[0]) == {"model", "imagenet", *SHIFTS, *SUBSETS.values()}
        )


@golden
def test_every_published_encoder_gets_a_number():
    with open(Path(GOLDEN, "openclip_zero_shot_accuracies.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 17
    for row in rows:
        table = robustness({name: float(row[name]) for name in ("imagenet", *SHIFTS)})
        far = row["pretrained"] in ("yfcc15m", "cc12m")
        for shift in (*table.shifts, table.of_mean):
            assert math.isfinite(shift.effective_robustness) and all(map(math.isfinite, shift.interval))
            assert shift.extrapolated == far


# -- lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [*SHIFTS, MEAN])
def test_a_line_is_that_of_least_squares(shift):
    models = invented()
    fit = Baseline(models).fit(shift)
    y = np.mean([models[name] for name in SHIFTS], 0) if shift == MEAN else models[shift]
    expected = scipy.stats.linregress(logit(models["imagenet"]), logit(y))
    np.testing.assert_allclose([fit.slope, fit.intercept, fit.r2], [expected.slope, expected.intercept, expected.rvalue**2], rtol=1e-9)
    residuals = logit(y) - expected.slope * logit(models["imagenet"]) - expected.intercept
    assert fit.residual_std == pytest.approx(math.sqrt((residuals**2).sum() / 38), rel=1e-9)
    assert (fit.n, fit.lowest_x, fit.highest_x) == (40, models["imagenet"].min(), models["imagenet"].max())


def test_an_interval_is_where_the_next_model_is():
    hits = 0
    for seed in range(300):
        models = invented(12, seed)
        fit = Baseline({name: values[:11] for name, values in models.items()}).fit("objectnet")
        low, high = fit.interval(float(models["imagenet"][11]))
        hits += low <= models["objectnet"][11] <= high
    assert 274 <= hits <= 296


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 83, 1000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_students_quantile(freedom, level):
    assert _student(freedom, level) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_what_has_no_logit_is_left_out_and_counted():
    models = invented()
    models["imagenet_a"][:3] = [0, 100, math.nan]
    models["imagenet"][3] = 0
    assert Baseline(models).fit("imagenet_a").n == 36
    assert Baseline(models).fit("imagenet_v2").n == 39
    assert Baseline(models).fit(MEAN).n == 38  # of a mean of five, one may be 0
    kept = models["imagenet"] >= 60
    assert Baseline(models, minimum=60).fit("imagenet_v2").n == kept.sum()
    expected = scipy.stats.linregress(logit(models["imagenet"][kept]), logit(models["imagenet_v2"][kept]))
    assert Baseline(models, minimum=60).fit("imagenet_v2").slope == pytest.approx(expected.slope)


def test_a_baseline_of_your_own_is_used():
    models = invented()
    baseline = Baseline(models, source="some models")
    fit = baseline.fit("imagenet_sketch")
    found = effective_robustness(50.0, 70.0, shift="imagenet_sketch", baseline=baseline)
    assert found == pytest.approx(50 - fit.predict(70.0))
    assert found != effective_robustness(50.0, 70.0, shift="imagenet_sketch")
    assert robustness({"imagenet": 20.0, "imagenet_sketch": 15.0}, baseline=baseline)["imagenet_sketch"].extrapolated
    assert robustness({"imagenet": 70.0, "imagenet_sketch": 15.0}, baseline=baseline).rows()[0]["source"] == "some models"
    assert mean_effective_robustness(VIT_B_32, baseline=baseline) == pytest.approx(
        np.mean([VIT_B_32[shift] - baseline.fit(shift).predict(63.32) for shift in SHIFTS])
    )


def test_the_classes_of_a_shift():
    known = {**VIT_B_32, "imagenet_on_r_classes": 90.0, "imagenet_on_objectnet_classes": 70.0, "imagenet_on_a_classes": 85.0}
    table = robustness(known, imagenet_classes="subset")
    assert table.of_mean is None
    for shift in SHIFTS:
        row, x = table[shift], known[SUBSETS.get(shift, "imagenet")]
        assert row.imagenet == x
        assert row.effective_robustness == effective_robustness(known[shift], x, shift=shift, imagenet_classes="subset")
        assert row.fit is FITS[shift, "subset" if shift in SUBSETS else "full"]
    assert mean_effective_robustness(known, imagenet_classes="subset") == table.mean_effective_robustness
    assert Baseline(invented()).fit("imagenet_r", "subset").slope != Baseline(invented()).fit("imagenet_r").slope
    with pytest.raises(ValueError, match="imagenet_on_r_classes"):
        robustness(VIT_B_32, imagenet_classes="subset")
    with pytest.raises(ValueError, match="no subset of the classes in common"):
        effective_robustness(1.5, 2.5, shift=MEAN, x="subset")


# -- arrays and bad numbers ----------------------------------------------------------------------------------------------


def test_arrays_in_arrays_out():
    accuracy, imagenet = np.array([[40, 0.0], [math.nan, 100]], dtype=np.float32), [[60, 70], [80, math.nan]]
    found = effective_robustness(accuracy, imagenet, shift="imagenet_r")
    assert found.dtype == np.float64
    assert found.shape == (2, 2)
    assert found[0, 0] == effective_robustness(40.0, 60.0, shift="imagenet_r")
    assert found[0, 1] == -FITS["imagenet_r", "full"].predict(70.0)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(effective_robustness([40, 50], 60, shift="imagenet_r")[:1], found[0, :1])
    assert effective_robustness([], [], shift="imagenet_r").shape == (0,)


def test_accuracies_near_the_ends():
    assert effective_robustness(50.0, 1e-300, shift="imagenet_a") == 50
    assert effective_robustness(50.0, 100 - 1e-12, shift="imagenet_a") == pytest.approx(-50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 50), "-1 is not an accuracy on imagenet_r: accuracies are in percent"),
        ((50, 101), "101 is not an accuracy on ImageNet"),
        ((50, math.inf), "inf is not an accuracy"),
        ((50, 0), "accuracy of 0 % has no logit"),
        ((50, [60, 100]), "accuracy of 100 % has no logit"),
    ],
)
def test_what_is_no_percentage(arguments, message):
    with pytest.raises(ValueError, match=message):
        effective_robustness(*arguments, shift="imagenet_r")


def test_a_table_goes_on_where_there_is_no_logit():
    table = robustness({"imagenet": 0.0, "imagenet_r": 3.0})
    assert math.isnan(table["imagenet_r"].effective_robustness) and math.isnan(table.mean_effective_robustness)
    assert table["imagenet_r"].extrapolated and "no logit" in table["imagenet_r"].note
    assert table.of_mean is None


def test_fractions_are_noticed():
    with pytest.warns(UserWarning, match="look like fractions"):
        effective_robustness(0.69, 0.63, shift="imagenet_r")
    with pytest.warns(UserWarning, match="look like fractions"):
        robustness({"imagenet": 0.63, "imagenet_r": 0.69})
    with pytest.raises(ValueError, match=r"imagenet is never above 1.*multiply by 100"):
        Baseline({"imagenet": [0.6, 0.7], "imagenet_r": [20, 30]})


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="did you mean 'imagenet_r'"):
        effective_robustness(50, 50, shift="imagenet-r")
    with pytest.raises(ValueError, match="imagenet_classes is 'full' or 'subset'"):
        effective_robustness(50, 50, shift="imagenet_r", x="half")
    with pytest.raises(ValueError, match=r"no accuracy under any of.*the given ones are imagenet"):
        robustness({"imagenet": 50})
    with pytest.raises(ValueError, match="needs the accuracy 'imagenet'"):
        robustness({"imagenet_r": 50})
    with pytest.raises(ValueError, match="needs imagenet_a as well"):
        mean_effective_robustness({k: v for k, v in VIT_B_32.items() if k != "imagenet_a"})
    with pytest.raises(KeyError, match="'objectnet' was not measured"):
        robustness({"imagenet": 50, "imagenet_r": 50})["objectnet"]


# -- tables that are no baselines ----------------------------------------------------------------------------------------


def test_a_table_is_read(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("\ufeffmodel, imagenet ,notes,imagenet_r\na,60,x,20\nb,70,,30\nc,80,,\nd,75,,35\n", encoding="utf-8")
    fit = Baseline.from_csv(path).fit("imagenet_r")
    assert fit.n == 3
    assert str(path) in fit.source
    with pytest.raises(ValueError, match=r"models\.csv: no accuracies 'objectnet'; it has imagenet, imagenet_r"):
        Baseline.from_csv(path).fit("objectnet")
    with pytest.raises(OSError, match="none"):
        Baseline.from_csv(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column model and no column imagenet; the first line has nothing"),
        ("model;imagenet;imagenet_r\na;60;20\n", "the first line has model;imagenet;imagenet_r"),
        ("model,imagenet,imagenet_r\n", "no models"),
        ("model,imagenet,objects\na,60,twenty\n", "a baseline needs .imagenet. and at least one shift, such as imagenet_v2"),
        ("model,imagenet,imagenet_r\na,60,20\nb,sixty,20\n", "line 3, column imagenet: 'sixty' is not a number"),
        ("model,imagenet,imagenet_r\na,60,20\nb,70,120\n", "line 3, column imagenet_r: 120 is not a percentage"),
        ("model,imagenet,imagenet_r\na,60,20\nb,nan,20\n", "line 3, column imagenet: nan is not a percentage"),
        ("model,imagenet,imagenet_r\na,60,20\nb,70\n", "line 3 has fewer cells"),
        ("model,imagenet,imagenet_r\na,60,20\nb,70,30,4\n", "line 3 has more cells"),
        ("model,imagenet,imagenet_r\na,.60,.20\nb,.7,.3\n", "multiply by 100"),
        ("model,imagenet,imagenet_r,imagenet\na,60,20,60\n", "column imagenet twice"),
    ],
)
def test_tables_that_are_no_baselines(text, message, tmp_path):
    path = tmp_path / "models.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Baseline.from_csv(path)
    assert str(path) in str(error.value)


def test_too_few_models_for_a_line():
    with pytest.raises(ValueError, match=r"2 of 3 models can be used for imagenet_r; a line needs three"):
        Baseline({"imagenet": [60, 70, 80], "imagenet_r": [0, 20, 30]}).fit("imagenet_r")
    with pytest.raises(ValueError, match="they are all equal on ImageNet"):
        Baseline({"imagenet": [60, 60, 60], "imagenet_r": [10, 20, 30]}).fit("imagenet_r")
    with pytest.raises(ValueError, match="one value for each model"):
        Baseline({"imagenet": [60, 60], "imagenet_r": [10, 20, 30]})
    with pytest.raises(ValueError, match="2 models need as many names, got 1"):
        Baseline({"imagenet": [60, 70], "imagenet_r": [10, 20]}, ["one"])
    with pytest.raises(ValueError, match=r"second, imagenet_r: -3 is not a percentage"):
        Baseline({"imagenet": [60, 70], "imagenet_r": [10, -3]}, ["first", "second"])
    assert math.isnan(Baseline({"imagenet": [60, 70, 80], "imagenet_r": [20, 20, 20]}).fit("imagenet_r").r2)


def test_a_shift_of_ones_own(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("model,imagenet,noisy,remark,parameters\n" + "".join(f"{i},{50 + i},{40 + i},none,{1e6 + i}\n" for i in range(8)))
    baseline = Baseline.from_csv(path)
    assert baseline.shifts == ("noisy",)  # neither a text nor what is not a percentage
    er = effective_robustness(60.0, 55.0, shift="noisy", baseline=baseline)
    assert er == pytest.approx(15.0, abs=0.05)  # the models lie on y = x − 10
    table = robustness({"imagenet": 55.0, "noisy": 60.0, "elsewhere": 3.0}, baseline=baseline)
    assert [row.shift for row in table.shifts] == ["noisy"] and table["noisy"].effective_robustness == er
    assert np.isnan(table.mean_effective_robustness)  # that is over ImageNet's five
    with pytest.raises(ValueError, match="unknown shift 'nosy'; did you mean 'noisy'"):
        effective_robustness(60.0, 55.0, shift="nosy", baseline=baseline)
    with pytest.raises(ValueError, match="no accuracies 'imagenet_r'"):
        robustness({"imagenet": 55.0, "noisy": 60.0, "imagenet_r": 3.0}, baseline=baseline)
    with pytest.raises(ValueError, match="unknown shift 'noisy'"):
        effective_robustness(60.0, 55.0, shift="noisy")
