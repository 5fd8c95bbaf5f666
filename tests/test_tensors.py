"""Outputs of layers: structures, precisions, and special tensors."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Calls, X, hooks_on, mlp, report, told
from torch import Tensor, nn

import torchprobe
from torchprobe.recording.structure import first_tensor, named_tensors


def test_a_layer_called_several_times_counts_every_call() -> None:
    model = Calls(lambda self, x: self.layer(self.layer(x)), layer=nn.Linear(6, 6))
    for of in ("output", "input", "gradient"):
        with torchprobe.record(model, "layer", of=of) as rec:
            model(X).sum().backward()
        assert rec["layer"].vectors == 10 if of != "gradient" else rec["layer"].calls == 2


def test_a_layer_under_two_names_has_one_statistic() -> None:
    shared = nn.Linear(6, 6)
    model = Calls(lambda self, x: self.second(self.first(x)), first=shared, second=shared)
    with torchprobe.record(model, ["second", "first"]) as rec:
        model(X)
    assert rec.layers == ["first"]
    assert rec["second"].vectors == rec["first"].vectors == 10
    assert "second" in rec


@dataclasses.dataclass
class Output:
    loss: Any
    hidden: Any


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, x + 1),
        lambda x: [None, x],
        lambda x: {"ids": torch.zeros(3, dtype=torch.long), "hidden": x, "other": x + 1},
        lambda x: ({"a": [x]}, 3),
        lambda x: Output(None, x),
        lambda x: torch.return_types.max((x, x.long())),
    ],
    ids=["tuple", "list", "dict", "nested", "dataclass", "named"],
)
def test_the_first_floating_point_tensor_of_structured_outputs(wrap: Callable[[Tensor], Any]) -> None:
    model = Calls(lambda self, x: wrap(x * 1))
    with torchprobe.record(model, "") as outputs, torchprobe.record(model, "", of="gradient") as gradients:
        found = model(X.clone().requires_grad_())
        loss = (first_tensor(found) * 3).sum()
        for _, x in named_tensors(found)[1:]:
            loss = loss + 5 * x.sum()
        loss.backward()
    assert torch.equal(outputs[""].max, X.double().amax(0))
    assert torch.equal(gradients[""].max, torch.full((6,), 3.0, dtype=torch.float64))


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """Like the outputs of transformers: an ordered dict with attributes, created from keywords, without entries that are None."""

    def __init__(self, **values: Any) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        return self[name]


def test_model_output_in_the_manner_of_transformers() -> None:
    model = Calls(lambda self, x: ModelOutput(loss=None, last_hidden_state=x * 1, pooled=x.sum(1)))
    with torchprobe.record(model, "") as rec, torchprobe.record(model, "", of="gradient") as gradients:
        model(X.clone().requires_grad_()).last_hidden_state.sum().backward()
    assert torch.equal(rec[""].max, X.double().amax(0))
    assert torch.equal(gradients[""].mean, torch.ones(6, dtype=torch.float64))


def test_select_picks_another_tensor() -> None:
    model = Calls(lambda self, x, extra=None: (x, {"deep": x * 2}))
    with torchprobe.record(model, "", select=lambda out: out[1]["deep"]) as rec:
        model(X)
    assert torch.equal(rec[""].max, 2 * X.double().amax(0))
    with torchprobe.record(model, "", of="input", select=lambda args, kwargs: kwargs["extra"]) as rec:
        model(X, extra=X * 3)
    torch.testing.assert_close(rec[""].max, (X * 3).double().amax(0))


def test_inputs_by_keyword() -> None:
    model = Calls(lambda self, ids, hidden: hidden)
    with torchprobe.record(model, "", of="input") as rec:
        model(torch.zeros(2, dtype=torch.long), hidden=X)
        model(ids=None, hidden=X)
    assert rec[""].vectors == 10
    assert torch.equal(rec[""].max, X.double().amax(0))


def test_a_selected_layer_without_a_tensor() -> None:
    model = Calls(lambda self, x: "text", inner=nn.Linear(6, 6))
    with (
        pytest.raises(TypeError, match="layer '': it holds no floating-point tensor with features; pass select="),
        torchprobe.record(model, ""),
    ):
        model(X)
    with (
        pytest.raises(TypeError, match="layer '': select must return a tensor"),
        torchprobe.record(model, "", select=lambda out: out),
    ):
        model(X)
    assert hooks_on(model) == 0


def test_integers_are_refused_with_advice() -> None:
    model = Calls(lambda self, x: x.long())
    with pytest.raises(TypeError, match="layer '': it holds no floating-point tensor with features"), torchprobe.record(model, ""):
        model(X)
    with (
        pytest.raises(ValueError, match="layer '': observe_ reads float64, float32, bfloat16 and float16; got torch.int64"),
        torchprobe.record(model, "", select=lambda out: out),
    ):
        model(X)


def test_integers_of_a_default_layer_are_skipped_and_reported() -> None:
    model = Calls(lambda self, x: self.blocks(x).argmax(-1), blocks=mlp())
    text = report(recorder := torchprobe.record(model), lambda: model(X))
    assert text.endswith("'': it holds no floating-point tensor with features; pick one with select=")
    assert recorder.layers == [f"blocks.{i}" for i in range(6)]


def test_a_width_that_changes() -> None:
    """If a layer declares its width, calls of another one are left out. If not, it may count no features at all, and nothing is kept."""

    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, : 6 if len(x) == 5 else 3]

    for layer, reason, vectors in (
        (Half(6, 6), "its activations were 6 features wide and are now 3: .*feature_dim", 10),
        (nn.Identity(), "its activations were 6 wide and are now 3.*[Ww]hat was read is dropped", 0),
    ):
        model = Calls(lambda self, x: self.layer(x if len(x) == 5 or type(self.layer) is Half else x[:, :3]), layer=layer)
        run = lambda model=model: [model(x) for x in (X, X[:4], X)]  # noqa: E731
        with pytest.raises(ValueError, match=f"layer 'layer': {reason}"), torchprobe.record(model, "layer", on_error="raise"):
            run()
        with told() as texts, torchprobe.record(model, "layer") as rec:
            run()
        first, last = texts
        assert re.search(f"layer 'layer' was not read: {reason}", first)
        left_out = "1 call" if vectors else "2 calls"
        assert re.search(f"'layer': {left_out} left out: {reason}", last)
        assert [rec[name].vectors for name in rec] == ([vectors] if vectors else [])


def test_a_loss_before_the_logits_is_skipped() -> None:
    model = Calls(lambda self, x: ModelOutput(loss=x.sum(), logits=x * 1))
    with torchprobe.record(model, "") as rec, torchprobe.record(model, "", of="gradient") as gradients:
        out = model(X.clone().requires_grad_())
        (out.loss + 3 * out.logits.sum()).backward()
    assert torch.equal(rec[""].max, X.double().amax(0))
    assert torch.equal(gradients[""].max, torch.full((6,), 3.0, dtype=torch.float64))


def test_a_single_number_has_no_features() -> None:
    model = Calls(lambda self, x: self.blocks(x).sum(), blocks=mlp())
    text = report(recorder := torchprobe.record(model), lambda: model(X))
    assert text.endswith("'': it holds no floating-point tensor with features; pick one with select=")
    assert recorder.layers == [f"blocks.{i}" for i in range(6)]
    model = Calls(lambda self, x: x.sum())
    with pytest.raises(ValueError, match="layer '': it holds a single number, which has no features"), torchprobe.record(model, ""):
        model(X)


def test_feature_dim_outside_the_activation() -> None:
    with (
        pytest.raises(ValueError, match="layer '': its activations have 2 dimensions, and feature_dim=3 is not one of them"),
        torchprobe.record(model := nn.Linear(6, 6), "", feature_dim=3),
    ):
        model(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_and_autocast(dtype: torch.dtype) -> None:
    model = mlp()
    seen: list[Tensor] = []
    handle = model[2].register_forward_hook(lambda m, a, out: seen.append(out))
    with torchprobe.record(model, "2") as rec:
        if dtype == torch.float64:
            model.double()(X.double())
        else:
            with torch.autocast("cpu", dtype):
                model(X)
    handle.remove()
    assert seen[0].dtype == dtype
    torch.testing.assert_close(rec["2"].mean, seen[0].double().mean(0), rtol=1e-6, atol=1e-9)


def test_in_place_relu_after_the_layer_changes_nothing() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
    expected = model[0](X).detach().double()
    with torchprobe.record(model, "0") as outputs, torchprobe.record(model, "*", of="gradient") as gradients:
        (model(X) * 3).sum().backward()
    assert torch.equal(outputs["0"].min, expected.amin(0))
    torch.testing.assert_close(gradients["0"].mean, ((expected > 0) * 3.0).mean(0), check_dtype=False)
    assert torch.equal(gradients["1"].mean, torch.full((6,), 3.0, dtype=torch.float64))


def test_in_place_layer_is_read_before_and_after() -> None:
    model = Calls(lambda self, x: self.relu(x * 1), relu=nn.ReLU(inplace=True))
    with torchprobe.record(model, "relu", of="input") as before, torchprobe.record(model, "relu") as after:
        model(X)
    assert torch.equal(before["relu"].min, X.double().amin(0))
    assert torch.equal(after["relu"].min, X.double().amin(0).clamp(min=0))


def test_nested_tensors_of_the_transformer_encoder_with_a_padding_mask() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torchprobe.record(encoder, ["layers.0", "layers.1", "layers.0.linear1"]) as rec,
        rec.mask(~padding),
    ):
        warnings.simplefilter("ignore")  # PyTorch warns that nested tensors are a prototype
        encoder(x, src_key_padding_mask=padding)
        expected = encoder.layers[0](x, src_key_padding_mask=padding)[~padding]
    assert rec["layers.0"].vectors >= 8
    assert rec["layers.1"].vectors == 8
    assert expected.shape == (8, 8)


def test_nested_tensors_are_read_value_by_value() -> None:
    parts = [torch.randn(3, 8), torch.randn(2, 8)]
    for layout in (torch.strided, torch.jagged):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nested = torch.nested.nested_tensor(parts, layout=layout)
            with torchprobe.record(model := nn.Identity(), "") as rec:
                model(nested)
                model(nested)
        assert rec[""].vectors == 10
        assert torch.equal(rec[""].max, torch.cat(parts).double().amax(0))


def test_vmap_is_refused() -> None:
    model = nn.Linear(6, 6)
    with told() as texts, torchprobe.record(model, "") as rec:
        with pytest.raises((ValueError, RuntimeError), match="layer '': .*vmap"):
            torch.func.vmap(model)(X)  # before the state exists
        model(X)
        out = torch.func.vmap(model)(X)  # and after
        model(X)
    assert rec[""].vectors == 10
    torch.testing.assert_close(out, model(X))
    assert ["vmap" in text for text in texts] == [True, True]


def test_functional_call_and_functional_gradients() -> None:
    model = mlp(1)
    parameters = dict(model.named_parameters())
    with torchprobe.record(model, "*") as rec:
        torch.func.functional_call(model, parameters, (X,))
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).sum())(parameters)
    assert rec["0"].vectors == 10


def test_jit_trace_keeps_the_operator_out() -> None:
    model = mlp()
    with warnings.catch_warnings(), torchprobe.record(model, "**") as rec:
        warnings.simplefilter("ignore")
        model(X)
        traced = torch.jit.trace(model, (X,), check_trace=False)
        model(X)
    assert "torchprobe" not in str(traced.inlined_graph)
    assert rec["0"].vectors == 15  # the example counts as a call


def test_fake_and_meta_tensors_hold_nothing_to_read() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = mlp()
    assert "it was only exported or traced" in report(torchprobe.record(model, "0"), lambda: run_fake(model, FakeTensorMode()))
    meta = mlp().to("meta")
    assert "it was only exported or traced" in report(torchprobe.record(meta, "0"), lambda: meta(X.to("meta")))


def run_fake(model: nn.Module, mode: Any) -> None:
    with mode:
        fake = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
        torch.func.functional_call(model, fake, (mode.from_tensor(X),))
