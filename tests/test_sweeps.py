"""The sweeps themselves, a small sample of them, and all of them as slow tests."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import axes, check, run
from sweeps.case import Built, CannotBuild, Case, limit, randn
from sweeps.check import Checker, Scenario
from sweeps.models import LIBRARIES, cases, missing
from sweeps.truth import Layer, Truth, derive, watch
from torch import Tensor, nn

import torchprobe

QUICK_TIMM = ["resnet/test_resnet", "vision_transformer/test_vit", "mambaout/test_mambaout", "convnext/test_convnext"]
QUICK_TRANSFORMERS = ["bert", "clip", "convnext"]
IMPORTS_MUCH = {"torchmetrics"}


def named(library: str, names: list[str]) -> list[Case]:
    if package := missing(library):
        pytest.skip(f"{package} is not installed")
    return [case for case in cases(library) if case.name in names]


# -- the check finds what it is for ----------------------------------------------------------------------------------------


class Fake:
    """A recorder that does one thing wrong."""

    def __init__(self, model: nn.Module, fault: str) -> None:
        self.model, self.fault, self.handles = model, fault, []

    def __enter__(self) -> Fake:
        layer = self.model.get_submodule("0")
        hooks: dict[str, Callable[..., Any]] = {
            "output": lambda m, a, y: y + 1e-7,
            "gradient": lambda m, a, y: y.register_hook(lambda g: g * 1.0000001) and None,
            "buffer": lambda m, a, y: m.register_buffer("seen", torch.zeros(1)),
            "error": lambda m, a, y: 1 / 0,
        }
        if self.fault in hooks:
            self.handles.append(layer.register_forward_hook(hooks[self.fault]))
        if self.fault == "hook":
            layer.register_forward_pre_hook(lambda m, a: None)
        if self.fault == "random":
            torch.rand(1)
        if self.fault == "class":
            layer.__class__ = type("Other", (type(layer),), {})
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def rows(self) -> list[dict[str, Any]]:
        return [{"layer": "0", "features": 2, "feature_dim": 0}] if self.fault == "rows" else []


def small(featureless: tuple[str, ...] = ()) -> Built:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    return Built(model, lambda batch: ((randn(batch, 4),), {}), featureless=featureless)


FAULTS = {
    "output": "changed: output 0",
    "gradient": "changed: gradient of 0",
    "buffer": "left behind",
    "hook": "left behind: _forward_pre_hooks of '0'",
    "class": "left behind: class of '0'",
    "error": "raised ZeroDivisionError",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchprobe, "record", lambda model, *args, **kwargs: Fake(model, fault))
    outcome = Checker(small()).run(Scenario("all", training=fault == "random"))
    assert outcome.status == "failed" and FAULTS[fault] in outcome.reason


def test_the_check_passes_what_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchprobe, "record", lambda model, *args, **kwargs: Fake(model, ""))
    for scenario in check.EAGER:
        assert Checker(small()).run(scenario).status == "ok"


def test_the_check_finds_batches_taken_for_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchprobe, "record", lambda model, *args, **kwargs: Fake(model, "rows"))
    outcome = Checker(small(featureless=("0",))).run(Scenario("batches", batches=(2, 3)))
    assert outcome.status == "failed" and outcome.reason == "taken for features: '0'"


def test_a_model_that_is_never_the_same_is_not_compared() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) + self.calls

    outcome = Checker(Built(Noise(), lambda batch: ((randn(batch, 4),), {}))).run(Scenario("all", layers="linear"))
    assert (outcome.status, outcome.reason) == ("ok", "not compared: two plain runs differ")


def test_results_are_counted(tmp_path: Path) -> None:
    def broken(geometry: int) -> Built:
        raise ValueError("no such size")

    chosen = [Case("odd", "small", lambda geometry: small()), Case("odd", "broken", broken)]
    results = run.sweep(chosen, check.QUICK, 60, tmp_path / "results.json", verbose=False)
    counts = json.loads((tmp_path / "results.json").read_text())["counts"]
    assert counts == run.counts(results)
    assert (counts["models"], counts["built"], counts["not built"], counts["without a failure"]) == (2, 1, 1, 1)
    assert results["broken"]["reason"] == "ValueError: no such size"


def test_a_limit_inside_of_a_limit() -> None:
    def forever() -> None:
        with limit(0.2):
            with limit(60):
                pass
            while True:
                pass

    with pytest.raises(TimeoutError, match=r"0\.2"):
        forever()


# -- the truth is true -----------------------------------------------------------------------------------------------------


def truth_of(make: Callable[[int], Built], published: dict[str, set[int]] | None = None) -> dict[str, Layer]:
    built = make(0)
    return {layer.name: layer for layer in derive(built.model, watch(built, 2), watch(make(1), 3), published or {})}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.attention, self.drop, self.shared = nn.MultiheadAttention(6, 2, batch_first=True), nn.Dropout(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x)).flatten(2).mT
        y = self.attention(y, y, y)[0]
        return self.shared(self.shared(y) @ self.drop(y.mT))


def test_witnesses() -> None:
    found = truth_of(lambda geometry: Built(Net(), lambda batch: ((randn(batch, 3, 4 + geometry, 5 + geometry),), {})))
    assert found["stem"].truths == [Truth(1, 6, 4, "declared")]
    assert found["act"].truths == [Truth(1, 6, 4, "geometry")]
    assert found["attention"].truths[0] == Truth(2, 6, 3, "declared")
    assert found["drop"].truths == [Truth(1, 6, 3, "geometry")]
    assert found["shared"].left_out == "no dimensions stay"  # (tokens, features), then (tokens, tokens)
    assert found[""].left_out == "no dimensions stay"


def test_published_widths_decide_between_dimensions() -> None:
    class Queries(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True).expand(-1, 7, -1)

    make = lambda geometry: Built(nn.Sequential(Queries()), lambda batch: ((randn(batch, 4 + geometry, 8),), {}))  # noqa: E731
    assert truth_of(make)["0"].left_out == "2 dimensions stay"
    assert truth_of(make, {"0": {8}})["0"].truths == [Truth(2, 8, 3, "published")]
    assert truth_of(make, {"0": {5}})["0"].left_out == "no single dimension of a published width"


def test_token_mixing_is_left_out() -> None:
    class Mixer(nn.Module):
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.mix, self.drop = nn.Linear(tokens, tokens), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.mix(x.mT)).mT

    found = truth_of(lambda g: Built(Mixer(4 + g), lambda batch: ((randn(batch, 4 + g, 8),), {})))
    assert found["drop"].left_out == "its neighbors are declared otherwise"
    assert found[""].truths == [Truth(2, 8, 3, "geometry")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "silent"),
        ([{"features": 8, "feature_dim": -1}], "right"),
        ([{"features": 8, "feature_dim": 2, "feature_dim_by": "declared"}], "right"),
        ([{"features": 5, "feature_dim": 1}], "wrong"),
        ([{"features": 8, "feature_dim": 1}], "wrong"),
        ([{"features": 5, "feature_dim": 1, "feature_dim_by": "unsure"}], "unsure"),
        ([{"features": 8, "feature_dim": 2}, {"features": 5, "feature_dim": 1}], "wrong"),
    ],
)
def test_verdicts(rows: list[dict[str, Any]], said: str) -> None:
    assert axes.verdict(Layer("0", "Linear", [Truth(2, 8, 3, "geometry")], False), rows) == said


def test_streams_count_for_their_layer() -> None:
    family = axes.Family("two streams")
    layer = Layer("block", "Block", [Truth(2, 8, 3, "published"), Truth(2, 6, 3, "published")], True)
    rows = [{"layer": "block:0", "features": 8, "feature_dim": 2}, {"layer": "block:1", "features": 5, "feature_dim": 1}]
    axes.judge(family, [layer], rows, "all")
    assert family.counts["published, all"] == {"wrong": 1} and "'block'" in family.wrong[0]


# -- a sample --------------------------------------------------------------------------------------------------------------


def odd() -> list[str]:
    return [case.name for case in cases("odd") if case.name not in IMPORTS_MUCH]


@pytest.fixture(autouse=True)
def _other_libraries_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_unchanged(case: Case, scenarios: tuple[Scenario, ...] = check.EAGER) -> None:
    result = run.check_case(case, scenarios)
    assert result["built"], result["reason"]
    assert not run.failures({case.name: result})


@pytest.mark.parametrize("name", odd())
def test_odd_modules(name: str) -> None:
    (case,) = named("odd", [name])
    assert_unchanged(case)


def test_a_sample_of_timm() -> None:
    for case in named("timm", QUICK_TIMM):
        assert_unchanged(case)


def test_a_sample_of_transformers() -> None:
    for case in named("transformers", QUICK_TRANSFORMERS):
        assert_unchanged(case)


def test_axes_known_by_construction() -> None:
    families = [axes.try_case(case) for case in cases("own")]
    assert not [family.reason for family in families if family.reason]
    assert not [line for family in families for line in family.wrong]
    assert axes.totals(families)["published, default"]["right"] > 100


def test_streams_have_names_of_their_own() -> None:
    for case in cases("own", "two streams/*"):
        built = case.build()
        rows, _ = axes.rows_of(built, 2, "blocks.*")
        assert {"blocks.0:0", "blocks.0:1", "blocks.1:0", "blocks.1:1"} <= {row["layer"] for row in rows}


def test_axes_of_a_sample_of_timm() -> None:
    families = [axes.try_case(case) for case in named("timm", QUICK_TIMM)]
    assert not [line for family in families for line in family.wrong]
    counts = axes.totals(families)["published, all"]
    assert counts["right"] >= 18  # one stage may be as high as it is wide in channels


# -- everything ------------------------------------------------------------------------------------------------------------

AT_LEAST = {"odd": 20, "own": 45, "timm": 115, "torchvision": 35, "transformers": 560, "diffusers": 23, "open_clip": 5}
"""Models that must be built; fewer means that the builders no longer fit the library."""


everything = pytest.mark.skipif(
    "TORCHPROBE_SWEEP" not in os.environ, reason="takes hours: set TORCHPROBE_SWEEP=1, or python -m tests.sweeps.run"
)


def library(name: str) -> list[Case]:
    if package := missing(name):
        pytest.skip(f"{package} is not installed")
    return list(cases(name))


@everything
@pytest.mark.slow("hundreds of models, up to an hour")
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_model_is_unchanged(name: str) -> None:
    results = run.sweep(library(name), check.EAGER, 120)
    print(json.dumps(run.counts(results), indent=1))
    assert not run.failures(results)
    assert run.counts(results)["built"] >= AT_LEAST[name]


@everything
@pytest.mark.slow("compiles dozens of models")
@pytest.mark.parametrize("name", LIBRARIES)
def test_compiled_models_are_unchanged(name: str) -> None:
    library(name)
    results = run.sweep(cases(name, run.SUBSET[name]), check.COMPILED, 120)
    print(json.dumps(run.counts(results), indent=1))
    assert not run.failures(results)


@everything
@pytest.mark.slow("hundreds of models in three sizes, half an hour")
@pytest.mark.parametrize("name", LIBRARIES)
def test_axes_of_every_model(name: str) -> None:
    families = [axes.try_case(case) for case in library(name)]
    print(axes.table(families), json.dumps(axes.totals(families), indent=1))
    assert not [f"{family.name}, {line}" for family in families for line in family.wrong]


def test_what_cannot_be_built_says_why() -> None:
    def make(geometry: int) -> Built:
        raise KeyError("hidden_size")

    with pytest.raises(CannotBuild, match="KeyError: 'hidden_size'"):
        Case("odd", "broken", make).build()
