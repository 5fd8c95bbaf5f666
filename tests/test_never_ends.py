"""A layer that cannot be read never ends the step of a model, and changes nothing in it. What was left out is counted and told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from models import COMPILER_WARNINGS, Calls, X, hooks_on, mlp, together, told, witnessed
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import FEATURES, State, Statistic


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Head(nn.Module):
    """One number for each input."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(-1)


class Towers(nn.Module):
    """Two encoders whose outputs are compared, each with each."""

    def __init__(self, out: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 6))
        self.text = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 6))
        self.out = out

    def forward(self, x: Tensor) -> Any:
        return self.out(self.image(x), self.text(x + 1))


def batches(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 8) for size in sizes]


def values(out: Any) -> list[Tensor]:
    return [x for x in (out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out]) if isinstance(x, Tensor)]


def train(call: Callable[[Tensor], Any], data: list[Tensor]) -> list[Tensor]:
    """Runs every batch forward and backward; returns all outputs."""
    outputs = []
    for x in data:
        found = values(call(x.clone().requires_grad_()))
        torch.stack([out.square().sum() for out in found if out.is_floating_point()]).sum().backward()
        outputs += [out.detach() for out in found]
    return outputs


def assert_unchanged(model: nn.Module, data: list[Tensor], call: Callable[[Tensor], Any], rec: torchprobe.Recorder) -> list[str]:
    """Outputs and gradients are those of the model without a recorder, bit for bit; returns what was told."""
    model.zero_grad()
    plain = train(model, data)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with told() as texts, rec:
        seen = train(call, data)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(gradients, found, strict=True))
    assert hooks_on(model) == 0
    return texts


# -- one number for each input -----------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("of", ["output", "gradient"])
def test_a_head_with_one_number_for_each_input(of: str, compiled: bool) -> None:
    model, data = Head(), batches(32, 32, 7)
    rec = torchprobe.record(model, of=of)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    texts = assert_unchanged(model, data, call, rec)
    assert rec.layers == ["body.0", "body.1", "body.2"]
    assert texts[-1].endswith(
        "1 of 4 layers were not read:\n  '': 3 calls left out: its activations (32,) hold no features: one number for each input"
    )
    assert len(texts) == 2
    with witnessed(model, of) as seen:
        train(model, data)
    for layer in rec:
        oracle.assert_close(rec[layer], together([x[0] if of == "gradient" else x for x in seen[layer]]))
    assert rec["body.2"].constant_vectors == 71  # one feature


def test_the_input_of_such_a_head_is_read() -> None:
    model, data = Head(), batches(32, 32, 7)
    rec = torchprobe.record(model, of="input")
    assert assert_unchanged(model, data, model, rec) == []
    oracle.assert_close(rec[""], together(data))
    with witnessed(model, "input") as seen:
        train(model, data)
    oracle.assert_close(rec["body.1"], together([args[0] for args in seen["body.1"]]))


@pytest.mark.parametrize("layers", [None, "**", "*", lambda name, module: True])
def test_no_selection_but_a_written_name_is_an_error(layers: Any) -> None:
    model = Head()
    texts = assert_unchanged(model, batches(5, 4), model, torchprobe.record(model, layers))
    assert len(texts) == (0 if layers == "*" else 2)
    with told(), pytest.raises(ValueError, match=r"layer '': its activations \(5,\) hold no features: one number for each input"):
        assert_unchanged(model, batches(5, 4), model, torchprobe.record(model, ["body.*", ""]))
    assert hooks_on(model) == 0


def test_feature_dim_makes_numbers_of_all_inputs_the_features_of_one() -> None:
    model = Head()
    rec = torchprobe.record(model, "", feature_dim=0)
    assert assert_unchanged(model, batches(5, 5), model, rec) == []
    assert (rec[""].features, rec[""].vectors) == (5, 2)


# -- each input with each ------------------------------------------------------------------------------------------------------

LOGITS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "logits": lambda image, text: image @ text.t(),
    "pair": lambda image, text: (image @ text.t(), text @ image.t()),
    "distances": lambda image, text: (image[:, None] - text[None]).square().sum(-1),
    "several": lambda image, text: torch.cat([image @ text.t()] * 2, 1),
    "others": lambda image, text: (image @ text.t())[:, 1:],
    "flat": lambda image, text: (image @ text.t()).flatten(),
    "loss": lambda image, text: (image @ text.t()).logsumexp(1).mean(),
}


@pytest.mark.parametrize("sizes", [(5, 5, 3), (6, 4), (7, 5), (3, 12)])
@pytest.mark.parametrize("out", LOGITS.values(), ids=LOGITS.keys())
def test_logits_of_each_input_with_each_count_no_features(out: Callable[[Tensor, Tensor], Any], sizes: tuple[int, ...]) -> None:
    """Also where the batch is as large as the embedding is wide."""
    model, data = Towers(out), batches(*sizes)
    rec = torchprobe.record(model, "**")
    texts = assert_unchanged(model, data, model, rec)
    assert sorted(rec.layers) == ["image", "image.0", "image.1", "image.2", "text", "text.0", "text.1", "text.2"]
    assert "'':" in texts[-1]
    with witnessed(model) as seen:
        train(model, data)
    for layer in rec:
        oracle.assert_close(rec[layer], together(seen[layer]))


@pytest.mark.parametrize("size", [5, 6, 1])
def test_of_one_shape_it_is_unsure(size: int) -> None:
    model = Towers(LOGITS["logits"])
    rec = torchprobe.record(model)
    texts = assert_unchanged(model, batches(size, size), model, rec)
    assert "" not in rec.layers
    assert len(texts) == 2
    (row,) = [row for row in rec.rows() if row["layer"] == ""]
    assert row["feature_dim_by"] == "unsure"


def test_logits_beside_embeddings_are_left_out() -> None:
    def out(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {"logits": image @ text.t(), "image": image, "text": text}

    model, data = Towers(out), batches(5, 5, 3)
    rec = torchprobe.record(model)
    assert assert_unchanged(model, data, model, rec) == []
    with witnessed(model) as seen:
        train(model, data)
    assert [row["features"] for row in rec.rows() if row["layer"].startswith((":", "image.2"))] == [6, 6]
    oracle.assert_close(rec[""], together([found["image"] for found in seen[""]]))
    oracle.assert_close(rec[":text"], together([found["text"] for found in seen[""]]))


def test_one_more_than_the_batch_may_be_as_wide_as_a_layer() -> None:
    """As the logits of MoCo: one positive, and all others as negatives. Here the first batch gives six, the width of the layer before."""
    model = Calls(lambda self, x: (lambda y: torch.cat([y[:, :1], y @ y.t()], 1))(self.layer(x)), layer=nn.Linear(8, 6))
    rec = torchprobe.record(model, "**")
    assert_unchanged(model, batches(5, 5, 3), model, rec)
    assert rec.layers == ["layer"]


# -- widths that change --------------------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("compiled", [False, True])
def test_a_declared_width_skips_what_is_of_another(compiled: bool) -> None:
    class Cropped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, : 6 if len(x) == 5 else 4]

    model, data = nn.Sequential(Cropped(8, 6)), batches(5, 3, 5, 3)
    rec = torchprobe.record(model, "**")
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else model
    texts = assert_unchanged(model, data, call, rec)
    assert "'0'" in texts[-1]
    assert "were 6 features wide and are now 4" in texts[-1]
    if not compiled:
        assert "2 calls left out" in texts[-1]
    with witnessed(model) as seen:
        train(model, data)
    oracle.assert_close(rec["0"], together(seen["0"][::2]))


def test_an_inferred_width_that_changes_is_dropped_whole() -> None:
    model = Calls(lambda self, x: self.odd(self.layer(x)), layer=nn.Linear(8, 6), odd=Calls(lambda self, x: x[:, : len(x)]))
    rec = torchprobe.record(model, "odd")
    texts = assert_unchanged(model, batches(5, 4, 3), model, rec)
    assert rec.layers == []
    assert "'odd'" in texts[-1]
    with pytest.raises(KeyError, match="could not be read"):
        rec["odd"]


def test_lengths_and_batches_of_any_size_with_a_vocoder() -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.LeakyReLU(), nn.ConvTranspose1d(16, 8, 4, stride=2), nn.Tanh())
    data = [torch.randn(shape) for shape in ((2, 8, 20), (2, 8, 33), (5, 8, 20), (16, 8, 18), (1, 8, 9))]
    rec = torchprobe.record(model, "**")
    assert assert_unchanged(model, data, model, rec) == []
    assert {row["layer"]: row["features"] for row in rec.rows()} == {"0": 16, "1": 16, "2": 8, "3": 8, "": 8}
    with witnessed(model) as seen:
        train(model, data)
    for layer in rec:
        oracle.assert_close(rec[layer], together(seen[layer], 1))


# -- what is no activation -----------------------------------------------------------------------------------------------------

ODD: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda x: None,
    "integers": lambda x: x.argmax(-1),
    "bools": lambda x: x > 0,
    "a number": lambda x: 3.5,
    "text": lambda x: "text",
    "nothing": lambda x: (),
    "a set": lambda x: {1, 2},
    "complex numbers": lambda x: torch.complex(x, x),
    "a single number": lambda x: x.sum(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "integers and None": lambda x: (None, {"ids": x.argmax(-1)}),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_outputs_that_are_no_activations(odd: Callable[[Tensor], Any]) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        hidden = self.a(x)
        self.odd(hidden)
        return self.b(hidden)

    model, data = Calls(run, a=nn.Linear(8, 6), odd=Calls(lambda self, x: odd(x.detach())), b=nn.Linear(6, 4)), batches(5, 3)
    for layers in ("**", "*", lambda name, module: True):
        rec = torchprobe.record(model, layers)
        texts = assert_unchanged(model, data, model, rec)
        assert set(rec.layers) - {""} == {"a", "b"}
        assert "'odd': " in texts[-1]
        assert (rec["a"].vectors, rec["b"].vectors) == (8, 8)
    for arguments in ({"layers": ["a", "odd"]}, {"layers": "*", "on_error": "raise"}):
        with told(), pytest.raises((TypeError, ValueError), match="layer 'odd': it"):
            assert_unchanged(model, data, model, torchprobe.record(model, **arguments))


def test_token_ids_as_inputs() -> None:
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))
    ids = torch.randint(0, 10, (3, 5))
    with told() as texts, torchprobe.record(model, "**", of="input") as rec:
        model(ids)
    assert rec.layers == ["1"]
    oracle.assert_close(rec["1"], model[0](ids))
    assert "'', '0': it holds no floating-point tensor with features" in texts[-1]


def test_a_single_number_is_no_news_by_default() -> None:
    """The loss is the output of many models. It is named at the end, and not in a warning of its own."""
    model = Calls(lambda self, x: self.blocks(x).square().mean(), blocks=mlp(width=8))
    texts = assert_unchanged(model, batches(5, 3), model, torchprobe.record(model))
    assert len(texts) == 1


def test_metrics_inside_of_a_model() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def run(self: Any, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.accuracy(y.detach(), y.argmax(-1))
        self.mean(y.detach().mean())
        self.several(y.detach(), y.detach() * 2)
        return y

    metrics = {
        "accuracy": torchmetrics.Accuracy("multiclass", num_classes=6),
        "mean": torchmetrics.MeanMetric(),
        "several": torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()]),
    }
    model, data = Calls(run, layer=nn.Linear(8, 6), **metrics), batches(5, 5, 3)
    for of in ("output", "gradient"):
        rec = torchprobe.record(model, "**", of=of)
        assert_unchanged(model, data, model, rec)
        assert rec.layers == ["layer", ""]
    assert float(model.accuracy.compute()) == 1.0
    rec = torchprobe.record(model, "**", of="input")
    assert_unchanged(model, data, model, rec)
    assert rec["accuracy"].vectors == 13


# -- errors of others ------------------------------------------------------------------------------------------------------------


class Fails(Statistic):
    states = {"total": State((FEATURES,))}
    fields = {"sum": "sum of all values"}
    after = 1
    error: type[Exception] = KeyError

    def accumulate(self, x: Tensor, kept: Tensor) -> None:
        self.seen = getattr(self, "seen", 0) + 1
        if x.shape[-1] == 6 and self.seen > self.after:
            raise self.error("no luck")
        self.total += x.sum(0)

    def summarize(self, states: Any) -> dict[str, Tensor]:
        return {"sum": states["total"].sum(-1)}


class Own(Exception):
    pass


@COMPILER_WARNINGS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, ValueError, NotImplementedError, Own])
def test_a_statistic_that_raises(error: type[Exception], compiled: bool) -> None:
    kind = type("Fails", (Fails,), {"error": error, "after": 1})
    model, data = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), batches(5, 5, 5)
    rec = torchprobe.record(model, "*", statistic=kind)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    texts = assert_unchanged(model, data, call, rec)
    assert "no luck" in texts[0]
    assert "1 of 2 layers were not read in every call:\n  '0': 2 calls left out" in texts[-1]
    assert len(texts) == 2
    torch.testing.assert_close(rec["0"].total, model[0](data[0]).double().sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rec["1"].total, sum(model(x).double().sum(0) for x in data), rtol=1e-5, atol=1e-5)
    with told(), pytest.raises(Exception, match="layer '0': .*no luck"):
        assert_unchanged(model, data, model, torchprobe.record(model, "*", statistic=kind, on_error="raise"))
    assert hooks_on(model) == 0


def test_select_that_raises() -> None:
    def select(out: Tensor) -> Tensor:
        if out.shape[-1] == 6:
            raise LookupError("nothing there")
        return out

    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    rec = torchprobe.record(model, "*", select=select)
    texts = assert_unchanged(model, batches(5, 3), model, rec)
    assert rec.layers == ["1"]
    assert "'0': 2 calls left out: nothing there" in texts[-1]


def test_an_error_of_the_model_passes_through() -> None:
    model = Calls(lambda self, x: self.layer(x).no_such_attribute, layer=nn.Linear(8, 6))
    with pytest.raises(AttributeError, match="no_such_attribute"), torchprobe.record(model, "**"):
        model(batches(5)[0])
    assert hooks_on(model) == 0


def test_a_written_name_is_an_error_in_its_first_call_only() -> None:
    model = Calls(lambda self, x: self.odd(self.layer(x)), layer=nn.Linear(8, 6), odd=Calls(lambda self, x: x if len(x) == 5 else x.sum()))
    with told() as texts, torchprobe.record(model, "odd") as rec:
        for x in batches(5, 3, 5):
            model(x)
    assert rec["odd"].vectors == 10
    assert "'odd': 1 call left out: it holds a single number" in texts[-1]
    with told(), pytest.raises(ValueError, match="layer 'odd': it holds a single number"), torchprobe.record(model, "odd"):
        model(batches(3)[0])


def test_a_state_in_which_nothing_was_read_is_dropped() -> None:
    kind = type("Fails", (Fails,), {"after": 0})
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with told(), torchprobe.record(model, "*", statistic=kind) as rec:
        model(batches(5)[0])
    assert rec.layers == ["1"]
    assert rec.state_dict()["layers"].keys() == {"1"}


def test_one_warning_for_each_cause() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), Calls(lambda self, x: self.x(x).sum(), x=nn.Identity())) for _ in range(12)])
    outer = Calls(lambda self, x: torch.stack([block(x) for block in self.blocks]).sum(), blocks=model)
    with told() as texts, torchprobe.record(outer, "blocks.*.1") as rec:
        for x in batches(5, 3):
            outer(x)
    assert len(texts) <= 2
    names = ", ".join(f"'blocks.{i}.1'" for i in range(8))
    assert f"  {names} and 4 more: " in texts[-1]
    assert len(texts[-1].splitlines()) == 2
    assert rec.layers == []


# -- leaving layers out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("body.1", ["", "body", "body.0", "body.2"]),
        ("body.*", ["", "body"]),
        (["body.[12]", ""], ["body", "body.0"]),
        (nn.Linear, ["", "body", "body.1"]),
        ([nn.Module], None),
        ([nn.ReLU, "body"], ["", "body.0", "body.2"]),
        ("nope.*", ["", "body", "body.0", "body.1", "body.2"]),
        ("(output)", ["body", "body.0", "body.1", "body.2"]),
    ],
)
def test_exclude(exclude: Any, left: list[str] | None) -> None:
    model = Head(4)
    if left is None:
        with pytest.raises(ValueError, match="exclude= leaves no layer to record"):
            torchprobe.record(model, "**", exclude=exclude)
        return
    rec = torchprobe.record(model, "**", exclude=exclude)
    assert assert_unchanged(model, batches(5), model, rec) == []
    assert sorted(rec.layers) == left


def test_what_exclude_refuses() -> None:
    with pytest.raises(ValueError, match="exclude: the model has no layer 'bodi'; did you mean 'body'"):
        torchprobe.record(Head(), "**", exclude="bodi")
    for wrong in (3, [3], [int], lambda name, module: True):
        with pytest.raises(TypeError, match="exclude= takes names, globs and classes|is not iterable"):
            torchprobe.record(Head(), "**", exclude=wrong)


# -- tracing -----------------------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(x))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("layers", ["layer*", "**", "layer2", None])
@pytest.mark.parametrize("of", ["output", "input", "gradient", "weight", "weight_gradient"])
def test_symbolic_tracing_of_a_recorded_model(of: str, layers: Any, ran: bool) -> None:
    model = Layers()
    plain = torch.fx.symbolic_trace(model).code
    x = batches(5)[0]
    with told(), torchprobe.record(model, layers, of=of) as rec:
        if ran:
            model(x).sum().backward()
        graph = torch.fx.symbolic_trace(model)
        model(x).sum().backward()
    assert graph.code == plain
    torch.testing.assert_close(graph(x), model(x))
    assert len(rec) > 0
    assert {rec[layer].calls for layer in rec} == {1 + ran}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    @torch.compiler.nested_compile_region
    def region(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.region(block, x)
        return x


@COMPILER_WARNINGS
@pytest.mark.parametrize("of", ["output", "input", "gradient"])
def test_nested_compiled_regions_give_the_numbers_of_eager_mode(of: str) -> None:
    model, data = Regions().double(), [torch.randn(5, 7, 8, dtype=torch.float64) for _ in range(2)]
    recordings = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torchprobe.record(model, "**", of=of) as rec:
            for x in data:
                call(x.clone().requires_grad_()).square().sum().backward()
        recordings.append(rec)
    plain, seen = recordings
    assert sorted(plain.layers) == sorted(seen.layers)
    for layer in plain:
        assert seen[layer].calls == 2
        torch.testing.assert_close(seen[layer].state, plain[layer].state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", ["**", lambda name, module: True])
def test_vmap_is_left_out(layers: Any) -> None:
    model = mlp(1)
    with told() as texts, torchprobe.record(model, layers) as rec:
        out = torch.func.vmap(model)(X[:, None])
        model(X)
        torch.func.vmap(model)(X[:, None])
        model(X)
    torch.testing.assert_close(out[:, 0], model(X))
    assert {rec[layer].vectors for layer in rec} == {10}
    assert texts[-1].count("2 calls left out: ") == 1
    assert "Record outside vmap" in texts[-1]


def test_fake_and_meta_inputs_beside_real_ones() -> None:
    model = mlp(1)
    with told() as texts, torchprobe.record(model, "**") as rec:
        torch.func.functional_call(model, {k: v.to("meta") for k, v in model.named_parameters()}, (X.to("meta"),))
        model(X)
    assert texts == []
    assert {rec[layer].vectors for layer in rec} == {5}
