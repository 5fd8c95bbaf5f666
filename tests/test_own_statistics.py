"""Unusual statistics: states, arguments, files and merging, and the mistakes that are refused."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import re
import threading
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Net, activations, batches, record
from statistic_kinds import DOCS, Covariance, Extremes, kinds
from test_recording import Range
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning, control
from torchprobe.statistics import (
    FEATURES,
    DynamicStatistic,
    Moments,
    Norms,
    Quantile,
    Saturation,
    Several,
    Sparsity,
    State,
    Statistic,
    TopInputs,
)


class Total(Statistic):
    states = {"total": State((FEATURES,))}
    fields = {"total_sum": "sum of everything"}

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.total += x.where(kept, 0).sum(0)  # type: ignore[has-type]

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"total_sum": states["total"].sum(-1)}


class Gram(Total):
    states = {"total": State((FEATURES, FEATURES))}

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.total += x.T @ (x * kept)

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"total_sum": states["total"].sum((-1, -2))}


class Scaled(Total):
    """It declares none of its arguments."""

    def __init__(self, features: int, device: Any = None, scale: float = 1.0, *, steps: tuple[float, ...] = ()) -> None:
        super().__init__(features, device)
        self.scale, self.steps = scale, steps

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"total_sum": self.scale * states["total"].sum(-1) + sum(self.steps)}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def recorded(statistic: Any, count: int = 1, **options: Any) -> torchprobe.Recorder:
    model = net()
    with torchprobe.record(model, "**", statistic=statistic, **options) as rec:
        for x in batches(count):
            model(x)
    return rec


def saved_and_loaded(rec: torchprobe.Recording, folder: Path, **options: Any) -> torchprobe.Recording:
    rec.save(folder / "run.safetensors")
    return torchprobe.load(folder / "run.safetensors", **options)


# -- states ----------------------------------------------------------------------------------------------------------------


def test_states_that_are_assigned_keep_their_tensor_and_type() -> None:
    model, data = Net(), batches(3)
    with torchprobe.record(model, "head", statistic=Extremes) as rec:
        slots = rec._bank.hooks["head"].main.slots
        with torch.inference_mode():
            model(data[0])
            before = slots[torch.device("cpu")].statistic.low
            model(data[1])
        assert slots[torch.device("cpu")].statistic.low is before  # CUDA graphs write to it
        rec.snapshot(0)
        model(data[2])
    x = activations(model, data)["head"]
    assert rec.total["head"].low.tolist() == x.min(0).tolist()
    assert rec["head"].low.tolist() == x[30:].min(0).tolist()
    assert rec["head"].low.dtype == torch.float64
    rec.reset()


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (torch.zeros(2), r"Bad.accumulate set total to torch.float32 of shape \(2,\); its State is torch.float64 of shape \(3,\)"),
        (3.0, "Bad.accumulate set total to float"),
    ],
)
def test_a_state_of_another_shape_is_refused(new: Any, message: str) -> None:
    class Bad(Total):
        def accumulate(self, x: Tensor, kept: Tensor) -> None:
            self.total = new

    bad = Bad(3)
    with pytest.raises(ValueError, match=message):
        bad.update(torch.ones(1, 3))
    assert bad.total.tolist() == [0.0, 0.0, 0.0]


def test_vectors_are_counted_and_a_state_at_its_empty_value_has_seen_something() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    mask = torch.tensor([[True, True, False]] * 5)
    with torchprobe.record(model, "0", statistic=Total) as rec:  # without a warning that it never fired
        model(batches(1)[0])
        with rec.mask(mask):
            model(batches(1)[0])
    assert rec.rows()[0]["total_sum"] == 0.0
    assert int(rec["0"].vectors) == 15 + 10
    empty = Total(3)
    empty.update(torch.zeros(0, 3))
    empty.update(torch.zeros(2, 3), mask=torch.zeros(2, dtype=torch.bool))
    assert not empty.saw_anything()


def test_vectors_do_not_include_the_present_call() -> None:
    class Before(Total):
        def accumulate(self, x: Tensor, kept: Tensor) -> None:
            seen.append((int(self.vectors), int(kept.sum())))
            super().accumulate(x, kept)

    seen: list[tuple[int, int]] = []
    statistic = Before(3)
    statistic.update(torch.randn(5, 3))
    statistic.update(torch.randn(4, 3), mask=torch.tensor([True, False, True, True]))
    model = nn.Linear(2, 3)
    with torchprobe.record(model, "", statistic=Before) as rec:
        seen.clear()  # of the trial on an empty layer
        for _ in range(2):
            model(torch.randn(6, 2))
    assert seen == [(0, 6), (6, 6)] and int(rec[""].vectors) == 12
    assert int(statistic.vectors) == 8


def test_a_class_may_have_its_own_vectors() -> None:
    class Own(Total):
        states = {"total": State((FEATURES,)), "vectors": State()}

        def accumulate(self, x: Tensor, kept: Tensor) -> None:
            super().accumulate(x, kept)
            self.vectors += 2 * kept.sum()  # type: ignore[has-type]

    assert int(recorded(Own)["head"].vectors) == 30

    class Derived(Total):
        @property
        def vectors(self) -> str:
            return "mine"

    assert recorded(Derived)["head"].vectors == "mine"


def test_the_default_device_does_not_matter(tmp_path: Path) -> None:
    quantile = functools.partial(Quantile, quantile=0.3, memory=1 << 14)
    statistic = [Moments, Total, quantile, TopInputs, Norms, Sparsity, Saturation]
    model, x = net(), torch.randn(400, 3, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = torch.nan
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device), torchprobe.record(model, "head", statistic=statistic) as rec:
            for step in range(3):
                model(x)
                rec.snapshot(step)
        with torch.device(device):
            assert not rec.total["head"]["Quantile"].exact
            loaded = saved_and_loaded(rec, tmp_path)
            loaded.merge(rec.total)
            arrays = rec.history.values, rec.history.histograms, rec.history.bin_edges
            metrics = rec.metrics(fields="all"), repr(rec), repr(rec.total)
            results.append(repr((rec.total.rows(), loaded.rows(), metrics, [array.tolist() for array in arrays])))
    assert results[0] == results[1]


def test_plots_and_summaries_do_not_use_the_default_device() -> None:
    pytest.importorskip("matplotlib")
    rec = recorded(Moments, 2)
    rec.snapshot(0)
    model = net()
    for device in ("cpu", "meta"):
        torch.set_default_device(device)
        try:
            assert rec.history.bin_edges[[0, 8, -1]].tolist() == [1, 2, 2**18]
            for figure in (rec.history.plot_layer("head"), rec.history.plot(), rec.plot(), rec.plot("history")):
                assert figure.axes
            assert repr(rec.table())
            rec.total["head"].vector_kurtosis_quantile(0.5)
            state = rec.state_dict()
            copy = torchprobe.record(model, "**")
            copy.load_state_dict(state)
        finally:
            torch.set_default_device(None)
        assert repr(copy.total.rows()) == repr(rec.total.rows())  # nan included


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_a_statistic(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.LayerNorm(64))
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    with torch.autocast("cpu", dtype=torch.bfloat16), torchprobe.record(model, "0", statistic=Gram) as rec:
        model(x)
    expected = model(x).double()
    torch.testing.assert_close(rec["0"].total, expected.T @ expected, rtol=1e-5, atol=1e-3)


def test_whole_numbers_as_states() -> None:
    class Counts(Statistic):
        states = {
            "positive": State((FEATURES,), "sum", torch.int64),
            "least": State((), "min", torch.int32),
            "most": State((), "max", torch.int32),
        }
        fields = {"positive_share": "share", "range": "range"}

        def accumulate(self, x: Tensor, kept: Tensor) -> None:
            rounded = (10 * x).round().int()
            self.positive += ((x > 0) & kept).sum(0)  # type: ignore[has-type]
            self.least = torch.minimum(self.least, rounded.min())  # type: ignore[has-type]
            self.most = torch.maximum(self.most, rounded.max())  # type: ignore[has-type]

        def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                "positive_share": (states["positive"] / states["vectors"][:, None]).mean(-1),
                "range": states["most"].double() - states["least"],
            }

    model, data = Net(), batches(2)
    with torchprobe.record(model, "head", statistic=Counts) as rec:
        model(data[0])
        rec.snapshot(0)
        model(data[1])
    x = activations(model, data)["head"]
    (row,) = rec.total.rows()
    assert row["positive_share"] == pytest.approx((x > 0).mean())
    assert row["range"] == (10 * x).round().max() - (10 * x).round().min()
    assert rec.history["positive_share"][0, 0] == pytest.approx((x[:15] > 0).mean())
    assert (rec["head"].least.dtype, rec["head"].positive.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((FEATURES,), TypeError, r"tuple of whole numbers, such as \(FEATURES,\); got -1"),
        (((-2,),), ValueError, "at least 0, or FEATURES"),
        (((), "mean"), ValueError, 'is "sum", "min", "max" or None; got \'mean\''),
        (((), "max", torch.bool), ValueError, "floating point or integer; got torch.bool"),
    ],
)
def test_states_that_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        State(*arguments)


def test_states_that_depend_on_an_argument(tmp_path: Path) -> None:
    class Histogram(Statistic):
        fields = {"outside": "share of the values outside the edges"}

        def __init__(self, features: int, device: Any = None, bins: int = 4, edges: tuple[float, float] = (-1.0, 1.0)) -> None:
            self.states = {"counts": State((FEATURES, bins))}
            super().__init__(features, device)
            self.bins, self.edges = bins, edges

        def accumulate(self, x: Tensor, kept: Tensor) -> None:
            low, high = self.edges
            index = ((x - low) / (high - low) * self.bins).floor()
            self.counts += torch.stack([((index == bin_) & kept).sum(0) for bin_ in range(self.bins)], -1)

        def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"outside": 1 - states["counts"].sum(-1).mean(-1) / states["vectors"]}

    rec = recorded(functools.partial(Histogram, bins=8, edges=(-0.5, 0.5)), 2)
    rec.snapshot(0)
    loaded = saved_and_loaded(rec, tmp_path, statistic=Histogram)
    x = activations(net(), batches(2))["head"]
    assert loaded.total["head"].counts[2].tolist() == torch.histc(torch.from_numpy(x[:, 2]), 8, -0.5, 0.5).tolist()
    assert loaded.total["head"].edges == (-0.5, 0.5)
    assert loaded.total.rows()[3]["outside"] == pytest.approx(1 - (abs(x) < 0.5).mean())


# -- what a class forgets ----------------------------------------------------------------------------------------------------


def variant(base: type[Statistic] = Total, **attributes: Any) -> type[Statistic]:
    return types.new_class("Bad", (base,), exec_body=lambda body: body.update(attributes))


def _no_device(self: Any, features: int, scale: float = 2.0) -> None:
    Statistic.__init__(self, features)


def _needs_a_limit(self: Any, features: int, limit: float, device: Any = None, *, outlier_sigma: float) -> None:
    Total.__init__(self, features, device)
    self.limit, self.outlier_sigma = limit, outlier_sigma


def _keeps_nothing(self: Any, features: int, device: Any = None, limit: float = 2.0) -> None:
    Statistic.__init__(self, features, device)


def _keeps_a_function(self: Any, features: int, device: Any = None, limit: Any = len) -> None:
    Statistic.__init__(self, features, device)
    self.limit = limit


ONE = Total(16)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (variant(states={}), "Bad names no states"),
        (variant(states={"merge": State()}), "the state 'merge' has the name of an attribute of every Statistic"),
        (variant(states={"features": State()}), "the state 'features' has the name of an attribute"),
        (variant(fields={"features": "width"}), "a field 'features', which is a column of every table"),
        (variant(headline="nope"), "shows 'nope', which is not among its fields: total_sum"),
        (variant(table_fields=("nope",)), "shows 'nope'"),
        (variant(metric_fields=("nope",)), "shows 'nope'"),
        (variant(summarize=lambda self, states: {"total_sum": states["total"].mean()}), r"shape \(3,\) for 3 layers; 'total_sum' is"),
        (variant(summarize=lambda self, states: {"total_sum": 1.0}), "'total_sum' is float"),
        (variant(summarize=lambda self, states: {}), "'total_sum' is NoneType"),
        (variant(summarize=lambda self, states: 1 / 0), "three layers that saw nothing, and failed: division by zero"),
        (variant(Statistic, states={"a": State()}, fields={"b": "c"}), "must define summarize"),
        (variant(Covariance, merge_states=lambda self, a, b: {"n": a["n"] + b["n"]}), r"must define merge_states\(a, b\) for mean"),
        (variant(Covariance, merge_states=lambda self, a, b: {k: a[k].sum(0) for k in a}), "Bad.merge_states made n torch.float64"),
        (variant(__init__=_no_device), r"Bad must take \(features, device\)"),
        (functools.partial(variant(__init__=_no_device), scale=1.0), r"Bad must take \(features, device\)"),
        (variant(__init__=_needs_a_limit), r"Bad needs limit: pass functools.partial\(Bad, limit=…\)"),
        (
            functools.partial(Quantile, 0.01),
            r"must name the arguments: functools.partial\(Quantile, quantile=0.01\)",
        ),
        (functools.partial(TopInputs, 5, "mean"), r"functools.partial\(TopInputs, k=5, score='mean'\)"),
        (Quantile(16), r"pass the class Quantile, or functools.partial\(Quantile, …\) with its arguments, not Quantile\(16 features"),
        ([Moments, TopInputs(16)], "pass the class TopInputs, or"),
        (variant(__init__=_keeps_nothing), "Bad takes 'limit' but does not keep it: set self.limit"),
        (variant(__init__=_keeps_a_function), "limit of Bad is builtin_function_or_method, but a state_dict holds"),
        (variant(__init__=lambda self, features, device=None: None), "must call super"),
        (lambda features: Total(features), r"<lambda> must take \(features, device\)"),
        (lambda features, device: Total(4), r"<lambda>\(features=16, device\) returned a statistic of 4 features"),
        ([Moments, Range], "Range must be derived from torchprobe.statistics.Statistic to be in a list"),
        ([Moments, [Total]], "takes a class, a function"),
        (variant(DynamicStatistic), "must define"),
        (lambda features, device: variant(Lengths, setup=lambda self: {"features": {}})(features), "Bad was tried .* unhashable type"),
    ],
)
@pytest.mark.filterwarnings("ignore:torchprobe. Range is not a subclass:DeprecationWarning")
def test_mistakes_are_found_before_the_model_runs(statistic: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        torchprobe.record(Net(), statistic=statistic)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (lambda features, device: ONE if features == 16 else Total(features), "returned the same statistic twice"),
        (lambda features, device: Total(features) if features == 16 else Gram(features), "must return the same kind of statistic"),
    ],
)
def test_a_function_that_does_not_make_one_statistic_per_layer(statistic: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4))
    with (
        pytest.raises(TypeError, match=rf"layer '\d': statistic=: <lambda> .*{message}"),
        torchprobe.record(model, "*", statistic=statistic, on_error="raise"),
    ):
        model(batches(1)[0])
    with pytest.warns(RecordingWarning) as caught:
        rec = record(model, batches(2), "*", statistic=statistic)  # the run goes on
    first, last = (str(warning.message) for warning in caught)
    assert re.search(rf"layer '\d' was not read: statistic=: <lambda> .*{message}", first)
    assert re.search(rf"1 of 2 layers were not read:\n  '\d': 2 calls left out: statistic=: <lambda> .*{message}", last)
    assert len(rec) == 1


def test_outlier_sigma_reaches_every_class_that_takes_it_or_is_refused() -> None:
    class Mine(Moments):
        pass

    rec = recorded([Total, Mine], outlier_sigma=1.5)
    assert rec["head"]["Mine"].outlier_sigma == 1.5
    assert type(recorded(Mine)["head"]) is Mine
    for statistic in (Total, lambda features, device: Moments(features, device)):
        with pytest.raises(ValueError, match="outlier_sigma=1.5 has no effect"):
            torchprobe.record(Net(), statistic=statistic, outlier_sigma=1.5)


@pytest.mark.parametrize("statistic", [Quantile, TopInputs, Norms, Sparsity, Saturation, [Quantile, TopInputs]])
def test_a_class_whose_other_arguments_have_defaults_is_enough(statistic: Any, tmp_path: Path) -> None:
    rec = recorded(statistic)
    x = activations(net(), batches(1))["head"]
    quantile = rec["head"]["Quantile"] if isinstance(statistic, list) else rec["head"]
    if isinstance(quantile, Quantile):
        assert quantile.value().tolist() == x.max(0).tolist()  # 0.5 % of 15 values is none of them
    assert saved_and_loaded(rec, tmp_path).rows() == rec.rows()


def test_arguments_without_a_default_are_named() -> None:
    kind = variant(__init__=_needs_a_limit)
    rec = recorded(functools.partial(kind, limit=0.5, outlier_sigma=2.0))
    assert (rec["head"].limit, rec["head"].outlier_sigma) == (0.5, 2.0)
    with pytest.raises(TypeError, match=r"needs outlier_sigma: pass functools.partial\(Bad, outlier_sigma=…\)"):
        recorded(functools.partial(kind, limit=0.5))


def test_a_statistic_without_fields_is_recorded() -> None:
    rec = recorded(variant(Total, fields={}), 2)
    rec.snapshot(0)
    assert (rec.metrics(), rec.history.values.shape) == ({}, (1, 5, 0))
    assert repr(rec["head"]) == "Bad(4 features)"
    torch.testing.assert_close(rec.total["head"].total, torch.from_numpy(activations(net(), batches(2))["head"].sum(0)))


def test_a_dynamic_statistic_loses_nothing_silently() -> None:
    bad = variant(DynamicStatistic, __init__=lambda self, features, device=None: setattr(self, "features", features))
    statistic: Any = bad(3)
    calls: list[Callable[[], Any]] = [
        lambda: statistic.update(torch.ones(1, 3)),
        lambda: statistic.merge(bad(3)),
        statistic.reset,
        statistic.state_dict,
        lambda: statistic.load_state_dict({}),
        lambda: bad.from_state({}),
        statistic.summary,
        statistic.saw_anything,
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match="Bad is a DynamicStatistic and must define"):
            call()


class Lengths(DynamicStatistic):
    """The norm of every vector."""

    fields = {"longest": "the largest norm", "seen": "vectors seen"}

    def __init__(self, features: int, device: Any = None) -> None:
        self.features, self.place = features, torch.device(device or "cpu")
        self.reset()

    def update(self, x: Tensor, feature_dim: int = -1, *, mask: Tensor | None = None) -> None:
        assert not x.requires_grad
        norms = x.double().norm(dim=feature_dim)
        self.norms = torch.cat([self.norms, norms.flatten() if mask is None else norms[mask]])

    def merge(self, other: Any) -> Any:
        self.check_mergeable(other)
        self.norms = torch.cat([self.norms, other.norms.to(self.norms)])
        return self

    def reset(self) -> None:
        self.norms = torch.empty(0, dtype=torch.float64, device=self.place)

    def state_dict(self) -> dict[str, Any]:
        return {"features": self.features, "norms": self.norms.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms = state["norms"].to(self.place)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: Any = "cpu") -> Lengths:
        new = cls(state["features"], device)
        new.load_state_dict(state)
        return new

    @property
    def empty(self) -> bool:
        return not len(self.norms)

    def summary(self) -> dict[str, float]:
        return {"seen": len(self.norms), "longest": float(self.norms.max()) if len(self.norms) else 0.0}  # in another order


def test_a_dynamic_statistic_does_everything(tmp_path: Path) -> None:
    model, data = net(), batches(3)
    mask = torch.tensor([[True, True, False]] * 5)
    with torchprobe.record(model, "**", statistic=Lengths) as rec:
        model(data[0])
        rec.snapshot(0)
        with rec.mask(mask):
            model(data[1])
    x = activations(model, data[:2])["head"]
    norms = (x**2).sum(1) ** 0.5
    expected = [*norms[:15], *norms[15:][mask.flatten().numpy()]]
    for recording in (rec, saved_and_loaded(rec, tmp_path)):
        total = recording.total
        assert total["head"].norms.tolist() == pytest.approx(expected)
        assert total.rows()[3]["longest"] == pytest.approx(max(expected))
        assert (total.rows()[3]["seen"], recording.rows()[3]["seen"]) == (25, 10)
        assert recording.history["longest"][0, 3] == pytest.approx(max(expected[:15]))
        assert recording.merge(recorded(Lengths))["head"].norms.tolist()[10:] == pytest.approx(expected[:15])


def test_a_dynamic_statistic_that_no_file_can_hold(tmp_path: Path) -> None:
    class Sizes(Lengths):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "sizes": {} if len(self.norms) else None}

    with pytest.raises(TypeError, match="layer 'blocks.0' cannot be saved: in the state_dict of Sizes, sizes is dict; a file holds"):
        recorded(Sizes).save(tmp_path / "run.safetensors")
    assert not list(tmp_path.iterdir())


# -- copies ------------------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_closed_window_holds_its_own_layer_only() -> None:
    rec = recorded(Total, 1)
    rec.snapshot(0)
    closed = rec._entries()[0].closed
    assert closed is not None
    assert closed.clone().total.untyped_storage().nbytes() == 6 * 8
    assert rec.total["head"].total.untyped_storage().nbytes() == 4 * 8


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_moments_closes_its_own_window(twin: Callable[[Moments], Moments]) -> None:
    first = Moments(6)
    second = twin(first)
    second.update(batches(1)[0])
    (closed,) = Moments.close_windows([second], [None])
    assert (closed.vectors, second.vectors, second.calls, first.calls) == (15, 0, 1, 0)


def test_a_statistic_may_update_another_one() -> None:
    class Pair(Total):
        def __init__(self, features: int, device: Any = None) -> None:
            super().__init__(features, device)
            self.inner = Total(features, device)

        def accumulate(self, x: Tensor, kept: Tensor) -> None:
            super().accumulate(x, kept)
            self.inner.update(2 * x)

    pair = Pair(3)
    thread = threading.Thread(target=pair.update, args=(torch.ones(2, 3),), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "deadlock"
    assert pair.inner.total.tolist() == [4.0, 4.0, 4.0]


def test_threads_lose_no_call() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    x = torch.randn(64, 6)
    with torchprobe.record(model, "0", statistic=Total, every=2) as rec:
        threads = [threading.Thread(target=lambda: [model(x) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert rec._entries()[0].calls == 200
    assert int(rec["0"].vectors) == 100 * 64


# -- files, merging, resuming ------------------------------------------------------------------------------------------------


def test_arguments_come_from_the_signature(tmp_path: Path) -> None:
    assert Scaled.arguments == ("scale", "steps")
    rec = recorded(functools.partial(Scaled, scale=2.0, steps=(1.0, 0.5)))
    expected = 2 * activations(net(), batches(1))["head"].sum() + 1.5
    loaded = saved_and_loaded(rec, tmp_path)
    assert loaded.rows()[3]["total_sum"] == pytest.approx(expected)
    loaded.merge(rec)
    assert loaded.rows()[3]["total_sum"] == pytest.approx(2 * expected - 1.5)
    model = net()
    again = torchprobe.record(model, "**", statistic=functools.partial(Scaled, scale=2.0, steps=(1.0, 0.5)))
    again.load_state_dict(rec.state_dict())
    with pytest.raises(ValueError, match=r"layer 'blocks.0': cannot merge Scaled with scale 2.0 and 1.0"):
        loaded.merge(recorded(Scaled))

    class Wider(Scaled):
        def __init__(self, width: int, device: Any = None, *, shift: int = 3, **options: Any) -> None:
            super().__init__(width, device, **options)
            self.shift = shift

    assert Wider.arguments == ("scale", "steps", "shift")
    assert Wider.from_state(Wider(3, scale=4.0, shift=1).state_dict()).setup() == {"features": 3, "scale": 4.0, "steps": (), "shift": 1}


def two(features: int, device: torch.device) -> Several:
    return Several([Moments(features, device), Total(features, device)])


@pytest.mark.parametrize("statistic", [[Moments], [Total], Total, [Moments, Moments], two], ids=["1", "1 own", "own", "2", "two"])
def test_a_list_stays_a_list_in_files(tmp_path: Path, statistic: Any) -> None:
    rec = recorded(statistic, 2)
    rec.snapshot(0)
    loaded = saved_and_loaded(rec, tmp_path)
    for layer in rec:
        mine, theirs = rec.total[layer], loaded.total[layer]
        assert type(mine) is type(theirs)
        assert isinstance(theirs, Several) == (statistic is not Total)
        assert all(torch.equal(value, theirs.tensors()[name]) for name, value in mine.tensors().items())
    assert loaded.merge(rec.total)["head"].summary() == pytest.approx(rec.total["head"].summary(), nan_ok=True)


def test_names_of_several() -> None:
    other = types.new_class("Total_2", (Total,))
    several = Several([Total(2), other(2), Total(2)])
    assert several.labels == ("Total", "Total_2", "Total_3")
    assert list(several.fields) == ["total_sum", "Total_2.total_sum", "Total_3.total_sum"]
    with pytest.raises(ValueError, match=r"must have the same width, got \[2, 3\]"):
        Several([Total(2), Total(3)])


def test_a_state_that_does_not_fit_changes_no_part_of_several() -> None:
    several = Several([Total(2), Moments(2), TopInputs(2)])
    several.update(torch.ones(3, 2))
    before, saved = several.summary(), several.state_dict()
    saved["Total.total"] += 1
    saved["TopInputs.scores"] = torch.zeros(1)
    with pytest.raises(ValueError, match="scores of the saved TopInputs"):
        several.load_state_dict(saved)
    assert several.summary() == pytest.approx(before, nan_ok=True)


def test_outlier_sigma_by_width_in_files(tmp_path: Path) -> None:
    rec = recorded(lambda features, device: Moments(features, device, outlier_sigma=0.25 * features))
    loaded = saved_and_loaded(rec, tmp_path)
    assert (loaded["head"].outlier_sigma, loaded["blocks.0"].outlier_sigma) == (1.0, 1.5)
    assert torch.equal(loaded["head"].outlier_frequency, rec["head"].outlier_frequency)
    loaded.merge(rec)


def test_layers_with_a_slash_in_their_names(tmp_path: Path) -> None:
    model = nn.Sequential()
    names = ["x", "x/closed", "x/a", "50%2Fx", "50/x"]
    for name in names:
        model.add_module(name, nn.Linear(6, 6))
    for statistic in (Moments, variant(Total, states={"total": State((FEATURES,)), "a/total": State()})):
        with torchprobe.record(model, "*", statistic=statistic) as rec:
            model(batches(1)[0])
            rec.snapshot(0)
            model(batches(2)[1])
        loaded = saved_and_loaded(rec, tmp_path, statistic=statistic)
        assert loaded.layers == names
        for name in names:
            for mine, theirs in ((rec[name], loaded[name]), (rec.total[name], loaded.total[name])):
                assert all(torch.equal(value, theirs.tensors()[key]) for key, value in mine.tensors().items())


def test_tensors_that_would_have_one_name_in_a_file_are_refused(tmp_path: Path) -> None:
    rec = recorded(variant(Total, states={"total": State((FEATURES,)), "closed/total": State((FEATURES,))}))
    assert saved_and_loaded(rec, tmp_path, statistic=type(rec["head"])).rows() == rec.rows()  # no window is closed
    rec.snapshot(0)
    with pytest.raises(TypeError, match="layer 'blocks.0' cannot be saved: of Bad, two tensors would be called 'blocks.0/closed/total'"):
        rec.save(tmp_path / "run.safetensors")


def test_the_class_that_a_file_names(tmp_path: Path) -> None:
    kept = [types.new_class("Cell", (Total,), exec_body=lambda body: body.update(__module__="notebook")) for _ in range(2)]  # run twice
    rec = recorded(kept[1])
    assert type(saved_and_loaded(rec, tmp_path)["head"]) is kept[1]
    kept.append(types.new_class("Cell", (Total,), exec_body=lambda body: body.update(__module__="elsewhere")))
    with pytest.raises(ValueError, match=r"Cell is defined in .*elsewhere.*notebook.*: choose one with load\(path, statistic=…\)"):
        torchprobe.load(tmp_path / "run.safetensors")
    assert type(torchprobe.load(tmp_path / "run.safetensors", statistic=functools.partial(kept[0]))["head"]) is kept[0]
    with pytest.raises(TypeError, match="takes the class of the statistics, or a list of classes; got <function"):
        torchprobe.load(tmp_path / "run.safetensors", statistic=lambda features, device: None)  # type: ignore[arg-type]


def test_a_recording_of_nothing_is_saved(tmp_path: Path) -> None:
    for statistic in (Total, [Total], Moments):
        assert len(saved_and_loaded(torchprobe.record(Net(), statistic=statistic), tmp_path)) == 0


@pytest.mark.filterwarnings("ignore:torchprobe. Range is not a subclass:DeprecationWarning")
def test_a_class_of_the_earlier_protocol_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Range cannot be saved: derive it from torchprobe.statistics.Statistic"):
        recorded(Range).save(tmp_path / "run.safetensors")


def test_merging_into_layers_that_never_fired_is_checked_first() -> None:
    rec = torchprobe.record(Net(), "**", statistic=Scaled)
    with pytest.raises(ValueError, match="layer 'blocks.0': cannot merge Scaled with scale 1.0 and 2.0"):
        rec.merge(recorded(functools.partial(Scaled, scale=2.0)))
    assert rec.layers == []


def test_closed_windows_of_another_recording_move_to_the_device_of_the_layer() -> None:
    other = recorded(Total, 2)
    other.snapshot(0)
    with torch.device("meta"):
        model = Net()
    rec = torchprobe.record(model, "**", statistic=Total)
    rec.merge(other)
    assert {slot.closed.device.type for slot in rec._bank.slots()} == {"cpu"}  # nothing can be kept on meta
    rec = torchprobe.record(Net(), "**", statistic=Total)
    for name in other:
        rec._bank.hooks[name].main.allocate(other[name].features, torch.device("meta"), 3)
    rec.merge(other)
    assert {slot.closed.device.type for slot in rec._bank.slots()} == {"meta"}


@pytest.mark.parametrize("damage", ["width", "part", "history"])
def test_a_state_that_does_not_fit_changes_nothing(damage: str) -> None:
    rec = recorded(Total, 2)
    rec.snapshot(0)
    before, state = rec.total.rows(), recorded(Total).state_dict()
    if damage == "width":
        state["layers"][""] = {**state["layers"][""], "features": 3, "window": Total(3).state_dict()}
    elif damage == "part":
        state["layers"]["head"]["window"]["total"] = torch.zeros(7)
    else:
        state["history"] = {**state["history"], "values": torch.zeros(3)}
    message = {"width": "layer '' is 4 features wide here and 3 there", "part": "layer 'head': total in the saved", "history": "history"}
    with pytest.raises(ValueError, match=message[damage]):
        rec.load_state_dict(state)
    assert rec.total.rows() == before
    assert rec.history.steps == [0]


def test_saved_states_of_huge_statistics_take_no_memory() -> None:
    for statistic, size in ((Gram(4), "features"), (TopInputs(4, k=3), "k"), (TopInputs(4), "features"), (Quantile(4), "features")):
        statistic.update(torch.ones(2, 4))
        with pytest.raises(ValueError, match="saved"):
            type(statistic).from_state({**statistic.state_dict(), size: 10**7})
    for change in ({"quantile": "1e999999999"}, {"quantile": "1/0"}, {"capacity": -3}, {"features": "4"}, {"0/values": torch.tensor(1.0)}):
        with pytest.raises(ValueError, match="saved Quantile"):
            Quantile.from_state({**Quantile(4).state_dict(), **change})


def test_a_quantile_with_more_memory_than_the_default(tmp_path: Path) -> None:
    rec = recorded(functools.partial(Quantile, memory=1 << 30))
    loaded = saved_and_loaded(rec, tmp_path)
    assert loaded["head"].capacity == rec["head"].capacity
    assert torch.equal(loaded["head"].value(), rec["head"].value())


# -- CUDA graphs and ranks -----------------------------------------------------------------------------------------------------


def test_a_statistic_that_needs_python_is_not_captured() -> None:
    rec = recorded([Moments, Quantile])
    (slot,) = rec._bank.hooks["head"].main.slots.values()
    with pytest.raises(RuntimeError, match="Several cannot be captured in a CUDA graph, since it needs Python in every call"):
        control.hold(slot, 1)
    (slot,) = recorded([Moments, Total])._bank.hooks["head"].main.slots.values()
    control.hold(slot, 1)
    assert slot.captured


def test_default_ids_of_ranks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        ranks.append(TopInputs(2, k=4))
        ranks[-1].update(torch.tensor([[1.0, 4.0], [2.0, 3.0]]) + rank)
    together = ranks[0].merge(ranks[1])
    assert together.ids.tolist() == [[(1 << 40) + 1, 1, 1 << 40, 0], [1 << 40, 0, (1 << 40) + 1, 1]]


def test_the_examples_of_the_docs_run() -> None:
    section = DOCS.read_text().split("## Your own statistic")[1]
    names: dict[str, Any] = {"__name__": "docs"}
    for block in section.split("```python\n")[1:]:
        code = block.split("```")[0]
        indent = len(code) - len(code.lstrip())
        exec("\n".join(line[indent:] for line in code.splitlines()), names)
    above = names["Above"](3, limit=0.5)
    above.update(torch.tensor([[1.0, 0.0, 0.7], [1.0, 0.0, 0.2]]))
    assert above.summary() == {"above_share": 0.5}


class Typo(Statistic):
    states = {"total": State((FEATURES,))}
    fields = {"sum": "sum of all values"}

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.totl += x.sum(0)

    def summarize(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": states["total"].sum(-1)}


def test_an_error_of_ones_own_code_names_the_layer_and_is_the_cause_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rec = torchprobe.record(model, "1", statistic=Typo).start()
    with pytest.raises(RuntimeError, match="layer '1': Typo raised AttributeError: 'Typo' object has no attribute 'totl'"):
        model(torch.ones(2, 3))
    with pytest.warns(RecordingWarning, match="'1': 1 call left out: Typo raised AttributeError"):
        rec.stop()
    assert rec.layers == []


def test_fields_read_as_attributes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    (zeros,) = kinds()["zeros of the docs"].classes
    with torchprobe.record(model, "1", statistic=[Moments, zeros]) as rec:
        model(torch.randn(5, 3))
    several = rec["1"]
    assert several.zero_share == several["Zeros"].zero_share == rec.rows()[0]["zero_share"]
    assert several.vector_kurtosis == pytest.approx(several["Moments"].vector_kurtosis)
    with pytest.raises(AttributeError, match=r"'Several' object has no attribute 'skewness'; use \['Moments'\].skewness"):
        _ = several.skewness
    with pytest.raises(AttributeError, match="'Zeros' object has no attribute 'nonsense'"):
        _ = several["Zeros"].nonsense


def test_an_empty_window_says_where_the_numbers_are(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    (zeros,) = kinds()["zeros of the docs"].classes
    with torchprobe.record(model, "1", statistic=[Moments, zeros]) as rec:
        model(torch.randn(5, 3))
        assert "This window is empty" not in str(rec.table().caption)
        rec.snapshot(0)
    assert str(rec.table().caption).endswith("This window is empty. total.table() shows all 1 closed windows.")
    with pytest.raises(ValueError, match=r"did you mean plot\(field='zero_share'\)"):
        rec.plot("zero_share")
    rec.save(tmp_path / "run.safetensors")
    zeros.__name__ = "Elsewhere"
    gc.collect()  # earlier tests have defined this class, too
    try:
        gc.collect()  # the class of the same name that another test has made
        with pytest.raises(ValueError, match=r"load\(path, statistic=\[Moments, Zeros\]\)"):
            torchprobe.load(tmp_path / "run.safetensors")
    finally:
        zeros.__name__ = "Zeros"
