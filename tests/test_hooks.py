"""The traps of forward hooks, one test each. Those of the compiler have more of their own in test_compile.py."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchprobe
from torchprobe.recording import RecordingWarning, compiled
from torchprobe.recording.compiled import Inert

COMPILER_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def mlp(depth: int = 3, width: int = 6) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])


class Calls(nn.Module):
    """A model that is whatever function it is given."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def report(recorder: torchprobe.Recorder, run: Callable[[], Any] = lambda: None) -> str:
    """What is said at the end of a recording."""
    with pytest.warns(RecordingWarning) as caught, recorder:
        run()
    (warning,) = [w for w in caught if issubclass(w.category, RecordingWarning)]
    assert warning.filename == __file__
    return str(warning.message)


# -- what happens to the hooks themselves --------------------------------------------------------------------------------------


def test_no_hook_is_left_after_an_exception_in_the_forward() -> None:
    model = Calls(lambda self, x: self.second(self.first(x)), first=nn.Linear(6, 6), second=nn.Linear(7, 7))
    for of in ("output", "input", "gradient"):
        with pytest.raises(RuntimeError, match="mat1 and mat2"), torchprobe.record(model, "**", of=of):
            model(X)
        assert hooks_on(model) == 0


def test_no_hook_is_placed_when_one_of_several_names_is_bad() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="no layer 'nope'"):
        torchprobe.record(model, ["0", "1", "nope"])
    assert hooks_on(model) == 0


def test_no_hook_is_left_when_one_cannot_be_placed() -> None:
    class Refuses(nn.Linear):
        def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("not here")

    model = nn.Sequential(nn.Linear(6, 6), Refuses(6, 6))
    recorder = torchprobe.record(model, "*")
    with pytest.raises(RuntimeError, match="not here"):
        recorder.start()
    assert hooks_on(model) == 0


def test_hooks_of_others_stay_and_ours_are_removed() -> None:
    model = mlp()
    handle = model[0].register_forward_hook(lambda *args: None)
    with torchprobe.record(model, "**") as first, torchprobe.record(model, "0") as second:
        model(X)
    assert hooks_on(model) == 1
    handle.remove()
    assert first["0"].vectors == second["0"].vectors == 5


def test_copies_and_pickles_of_a_hooked_model_do_nothing() -> None:
    model = mlp()
    for of in ("output", "input", "gradient"):
        with torchprobe.record(model, "**", of=of) as rec:
            model(X).sum().backward()
            stream = io.BytesIO()
            torch.save(model, stream)
            stream.seek(0)
            copies = [
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(stream, weights_only=False),
            ]
            for twin in copies:
                twin(X).sum().backward()
                hooks = [h for m in twin.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
                assert hooks
                assert all(type(hook) is Inert for hook in hooks)
        assert rec["0"].calls == 1
        with torchprobe.record(copies[0], "0") as own:
            copies[0](X)
        assert own["0"].calls == 1


def test_one_operator_call_and_nothing_else_for_every_hook() -> None:
    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(*[nn.Identity() for _ in range(4)])
    for of in ("output", "input"):
        with torchprobe.record(model, "*", of=of):
            model(X)
            with Ops() as ops:
                model(X)
        assert ops.names == ["torchprobe.observe_.default"] * 4


# -- what the layer gives ------------------------------------------------------------------------------------------------------


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
        first = torchprobe.recording.tensors.first_tensor(model(X.clone().requires_grad_()))
        (first * 3).sum().backward()
    assert torch.equal(outputs[""].max, X.double().amax(0))
    assert torch.equal(gradients[""].max, torch.full((6,), 3.0, dtype=torch.float64))


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """Made like the outputs of transformers: an ordered dict with attributes, built from keywords, without what is None."""

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


def test_no_tensor_where_one_was_asked_for() -> None:
    model = Calls(lambda self, x: "text", inner=nn.Linear(6, 6))
    with pytest.raises(TypeError, match="layer '': it holds no floating-point tensor; pass select="), torchprobe.record(model, ""):
        model(X)
    with (
        pytest.raises(TypeError, match="layer '': select gave no tensor"),
        torchprobe.record(model, "", select=lambda out: out),
    ):
        model(X)
    assert hooks_on(model) == 0


def test_integers_are_refused_with_a_way_out() -> None:
    model = Calls(lambda self, x: x.long())
    with (
        pytest.raises(ValueError, match="layer '': observe_ reads float64, float32, bfloat16 and float16; got torch.int64"),
        torchprobe.record(model, "", select=lambda out: out),
    ):
        model(X)


def test_a_width_that_changes() -> None:
    model = Calls(lambda self, x: self.layer(x), layer=nn.Identity())
    with torchprobe.record(model, "layer") as rec:
        model(X)
        with pytest.raises(ValueError, match=r"layer 'layer': its activations were 6 features wide and are now 5: .*feature_dim"):
            model(X[:, :5])
    assert rec["layer"].vectors == 5


def test_a_single_number_has_no_features() -> None:
    model = Calls(lambda self, x: x.sum())
    with pytest.raises(ValueError, match="layer '': it gives a single number"), torchprobe.record(model, ""):
        model(X)


def test_feature_dim_outside_the_activation() -> None:
    with (
        pytest.raises(ValueError, match="layer '': its activations have 2 dimensions, and feature_dim=3 is none of them"),
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
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says PyTorch
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
    with torchprobe.record(model, "") as rec:
        for _ in range(2):  # before the state is made, and after
            with pytest.raises((ValueError, RuntimeError), match="layer '': .*vmap"):
                torch.func.vmap(model)(X)
            model(X)
    assert rec[""].vectors == 10


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
    assert rec["0"].vectors == 15  # the example is a call like any other


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


# -- modules with a life of their own --------------------------------------------------------------------------------------------


def test_attention_out_proj_is_never_called() -> None:
    model = Calls(lambda self, x: self.attn(x, x, x)[0], attn=nn.MultiheadAttention(6, 2, batch_first=True))
    text = report(torchprobe.record(model, ["attn", "attn.out_proj"]), lambda: model(X[None]))
    assert text.splitlines()[0] == "torchprobe: 1 of 2 layers never fired:"
    assert "'attn.out_proj': nn.MultiheadAttention uses its parameters without calling it; record the attention itself, 'attn'" in text


def test_gradient_hooks_leave_attention_its_shortcut() -> None:
    seen = []

    class Attention(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
            seen.append(query is key)
            return super().forward(query, key, value, **kwargs)

    model = Calls(lambda self, x: self.attn(x, x, x)[0], attn=Attention(6, 2, batch_first=True))
    with torchprobe.record(model, "attn", of="gradient") as rec:
        model(X[None].requires_grad_()).square().sum().backward()
    assert seen == [True]
    assert rec["attn"].vectors == 5


def test_hooks_switch_the_encoder_fast_path_off_and_only_while_recording() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    calls = []
    layer.linear1.forward = lambda x, f=layer.linear1.forward: (calls.append(1), f(x))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        layer(torch.randn(2, 5, 8))
        assert not calls  # the fast path calls no child
        with torchprobe.record(layer, "linear1") as rec:
            layer(torch.randn(2, 5, 8))
        assert rec["linear1"].vectors == 10
        layer(torch.randn(2, 5, 8))
    assert len(calls) == 1


def test_attention_weights_by_a_hook_of_the_user() -> None:
    """The recipe of docs/hooks.md."""
    model = Calls(lambda self, x: self.attn(x, x, x, need_weights=False)[0], attn=nn.MultiheadAttention(6, 2, batch_first=True))
    plain = model(X[None])
    handle = model.attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "need_weights": True, "average_attn_weights": False}), with_kwargs=True
    )
    with torchprobe.record(model, "attn", select=lambda out: out[1]) as rec:
        out = model(X[None])
    handle.remove()
    torch.testing.assert_close(out, plain)
    assert rec["attn"].features == 5
    torch.testing.assert_close(rec["attn"].mean.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_scripted_modules_are_reported_or_refused() -> None:
    scripted = torch.jit.script(mlp())
    model = nn.Sequential(scripted, nn.Linear(6, 6))
    text = report(torchprobe.record(model, ["0", "0.0", "1"]), lambda: model(X))
    assert "'0': it is scripted, and runs without Python; record the model before torch.jit.script" in text
    assert "'0.0': it is scripted" in text
    assert "'1'" not in text
    with pytest.raises(ValueError, match="every selected layer is a scripted module"):
        torchprobe.record(scripted)


def test_threads_on_one_model_lose_no_update() -> None:
    model = mlp(1, width=32)
    x = torch.randn(64, 32)
    with torchprobe.record(model, "**") as rec:
        threads = [threading.Thread(target=lambda: [model(x) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert rec["0"].calls == 200
    assert rec["0"].vectors == 200 * 64
    with torchprobe.record(model, "**") as once:
        model(x)
    torch.testing.assert_close(rec["0"].kurtosis, once["0"].kurtosis, rtol=1e-9, atol=0)


def test_data_parallel_replicas_share_the_hooks() -> None:
    model = mlp(1)
    with torchprobe.record(model, "0") as rec:
        replica = model._replicate_for_data_parallel()
        for key, child in model._modules.items():
            twin = child._replicate_for_data_parallel()
            twin._parameters = child._parameters
            replica._modules[key] = twin
        model(X)
        replica(X)
    assert rec["0"].vectors == 10


def test_state_made_in_inference_mode_can_be_updated_later() -> None:
    model = mlp()
    with torchprobe.record(model) as rec:
        with torch.inference_mode():
            model(X)
            rec.snapshot(0)
            model(X)
        model(X)
        rec.snapshot(1)
        model(X)
        total = rec.total
        total.merge(rec.total)
    assert rec.total["0"].vectors == 20
    assert total["0"].vectors == 40


def test_loss_scaling_scales_gradients_and_leaves_kurtosis() -> None:
    torch.manual_seed(0)
    model = mlp()
    recordings = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1024.0)):
        with torchprobe.record(model, "2", of="gradient") as rec:
            scaler.scale(model(X).square().sum()).backward()
        recordings.append(rec["2"])
    plain, scaled = recordings
    assert torch.equal(scaled.kurtosis, plain.kurtosis)
    assert torch.equal(scaled.std, 1024 * plain.std)


def test_gradient_accumulation_counts_every_backward() -> None:
    model = mlp()
    with torchprobe.record(model, "0", of="gradient") as rec:
        losses = [model(X).sum() for _ in range(3)]
        for loss in losses:
            loss.backward(retain_graph=True)
        losses[0].backward()
    assert rec["0"].calls == 4


def test_backward_after_the_end_does_not_count() -> None:
    model = mlp()
    with torchprobe.record(model, "0", of="gradient") as rec:
        model(X).sum().backward()
        late = model(X).sum()
    late.backward()
    assert rec["0"].calls == 1


# -- activation checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("of", ["output", "input", "gradient"])
def test_activation_checkpoints_count_once(of: str, reentrant: bool) -> None:
    model = mlp()
    body = lambda self, x: checkpoint(self.inner, x, use_reentrant=reentrant)  # noqa: E731
    recordings = []
    for whole in (Calls(lambda self, x: self.inner(x), inner=model), Calls(body, inner=model)):
        with torchprobe.record(whole, "inner.**", of=of) as rec:
            for _ in range(2):
                whole(X.clone().requires_grad_()).square().sum().backward()
        recordings.append(rec)
    plain, checkpointed = recordings
    assert sorted(checkpointed.layers) == sorted(plain.layers)
    for layer in plain:
        assert checkpointed[layer].calls == 2
        assert torch.equal(checkpointed[layer].state, plain[layer].state)


@COMPILER_WARNINGS
@pytest.mark.parametrize("of", ["output", "gradient"])
def test_compiled_around_a_checkpoint_counts_once(of: str) -> None:
    inner = mlp()
    model = Calls(lambda self, x: self.inner(x), inner=inner)
    fast = torch.compile(lambda x: checkpoint(inner, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    recordings = []
    for call in (inner, fast):
        with torchprobe.record(model, "inner.*", of=of) as rec:
            for _ in range(2):
                call(X.clone().requires_grad_()).square().sum().backward()
        recordings.append(rec)
    plain, seen = recordings
    for layer in plain:
        assert seen[layer].calls == 2
        assert torch.equal(seen[layer].state, plain[layer].state)


@COMPILER_WARNINGS
@pytest.mark.parametrize("in_place", [True, False])
def test_checkpoint_around_a_compiled_block_is_refused(in_place: bool) -> None:
    """Or counts once: PyTorch 2.10 leaves a block that was compiled in place to Python there, where the second run is passed over."""
    block = mlp()
    if in_place:
        block.compile(backend="eager")
    model = Calls(
        lambda self, x: checkpoint(self.block, x, use_reentrant=False),
        block=block if in_place else torch.compile(block, backend="eager"),
    )
    x = X.clone().requires_grad_()
    recorder = torchprobe.record(model, "block.*")
    said = ""
    try:
        with recorder:
            model(x).sum().backward()
    except RuntimeError as error:
        said = str(error)
    counted_once = in_place and [recorder[layer].calls for layer in recorder] == [1] * 6
    assert counted_once or "the compiled module 'block' holds recorded layers and runs under an activation checkpoint" in said
    assert hooks_on(model) == 0
    model(x).sum().backward()


@COMPILER_WARNINGS
def test_checkpoint_around_a_compiled_block_counts_the_block_and_its_gradients_once() -> None:
    block = Calls(lambda self, x: self.inner(x), inner=mlp())
    model = Calls(lambda self, x: checkpoint(self.block, x, use_reentrant=False), block=torch.compile(block, backend="aot_eager"))
    with torchprobe.record(model, "block") as rec, torchprobe.record(model, "block.**", of="gradient") as gradients:
        for _ in range(2):
            model(X.clone().requires_grad_()).square().sum().backward()
    assert rec["block"].calls == 2
    assert {gradients[layer].calls for layer in gradients} == {2}


# -- never fired: cause by cause ---------------------------------------------------------------------------------------------------


def test_nothing_was_run() -> None:
    assert report(torchprobe.record(mlp())).endswith("none of the 7 layers fired: the model was not called while it was recorded")


def test_no_report_on_top_of_an_exception() -> None:
    model = mlp()
    with pytest.raises(KeyError), torchprobe.record(model):  # a warning would be an error here
        raise KeyError("something else")


def test_nothing_to_report_when_everything_fired() -> None:
    model = mlp()
    with torchprobe.record(model, "**"):
        model(X)


def test_a_layer_that_the_forward_does_not_call() -> None:
    model = Calls(lambda self, x: nn.functional.linear(x, self.b.weight) + self.a(x), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    text = report(torchprobe.record(model, ["a", "b"]), lambda: model(X))
    assert "'b': the forward does not call it (its parameters may be used without it)" in text


def test_the_model_was_entered_by_another_method() -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = mlp()

        def encode_image(self, x: Tensor) -> Tensor:
            return self.visual(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x)

    model = Clip()
    text = report(torchprobe.record(model), lambda: model.encode_image(X))
    assert "'': the model was entered by another method than forward; its layers are recorded all the same" in text
    assert text.startswith("torchprobe: 1 of 7 layers")


def test_a_forward_that_raised() -> None:
    def fail(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(2, 2))

    model = Calls(fail, a=nn.Linear(6, 6), b=nn.Linear(6, 6))

    def run() -> None:
        with pytest.raises(RuntimeError):
            model(X)

    text = report(torchprobe.record(model, ["a", "b"]), run)
    assert "'b': the forward raised before it was reached" in text
    assert "'a'" not in text


def test_only_the_other_mode() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", when="eval"), lambda: model(X))
    assert 'when="eval", but it was called in train mode only; call model.eval()' in text
    model.eval()
    text = report(torchprobe.record(model, "0", when="train"), lambda: model(X))
    assert 'when="train", but it was called in eval mode only; call model.train()' in text


def test_only_while_paused() -> None:
    model = mlp()
    recorder = torchprobe.record(model, "0")

    def run() -> None:
        with recorder.paused():
            model(X)

    assert "every call came while the recorder was paused" in report(recorder, run)


def test_no_backward_no_gradient() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", of="gradient"), lambda: model(X))
    assert "no gradient reached it: backward was not called" in text


def test_a_forward_without_gradients() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", of="gradient"), lambda: torch.no_grad()(model)(X))
    assert "it was called without gradients" in text


def test_only_empty_batches() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0"), lambda: [model(X[:0]) for _ in range(3)])
    assert "its 3 calls brought empty batches, or batches that the mask leaves out" in text


def test_every_read_the_wrong_calls() -> None:
    model = mlp()
    text = report(torchprobe.record(model, "0", every=4), lambda: [model(X[:n]) for n in (0, 5, 5, 5, 0, 5)])
    assert "every=4 read 2 of its 6 calls, which brought empty batches" in text


def test_no_tensor_in_a_layer_that_nobody_named() -> None:
    model = Calls(lambda self, x: str(self.blocks[0](x)), blocks=mlp())
    text = report(torchprobe.record(model), lambda: model(X))
    assert "'': it holds no floating-point tensor; pick one with select=" in text


def test_no_patch_tokens_in_a_layer_that_nobody_named() -> None:
    model = Calls(lambda self, x: self.blocks(x)[:, 0], blocks=mlp())
    text = report(torchprobe.record(model, positions="patch"), lambda: model(X[None]))
    assert "'': it has one vector per input, so no positions=\"patch\"" in text


def test_called_in_backward_only() -> None:
    model = mlp()
    x = X.clone().requires_grad_()
    y = x * 2
    y.register_hook(lambda grad: model(grad))
    text = report(torchprobe.record(model, "0"), lambda: y.sum().backward())
    assert "it was called during backward only, which is taken for the recomputation of an activation checkpoint" in text


@COMPILER_WARNINGS
def test_a_compiled_graph_that_ran_before_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls(lambda self, x: self.inner(x), inner=mlp())
    fast = torch.compile(model, backend="eager")
    fast(X)
    monkeypatch.setattr(compiled, "drop_graphs", lambda classes: 0)  # as if the compiler had hidden it
    text = report(torchprobe.record(fast, "inner.*"), lambda: fast(X))
    assert "it runs inside a compiled graph that was made before the hooks; call torch.compiler.reset()" in text
    assert len(text.splitlines()) == 7


@COMPILER_WARNINGS
def test_a_compiled_graph_that_was_not_run_to_its_end() -> None:
    def fail(gm: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise RuntimeError("out of luck")

        return run

    model = Calls(lambda self, x: self.inner(x), inner=mlp())
    fast = torch.compile(model, backend=fail)

    def run() -> None:
        with pytest.raises(RuntimeError, match="out of luck"):
            fast(X)

    assert "it is part of a compiled graph that was made but not run to its end" in report(torchprobe.record(fast, "inner.0"), run)
