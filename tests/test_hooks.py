"""The pitfalls of forward hooks, one test each. More in test_tensors.py (outputs of layers), test_compile.py and test_distributed.py."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import COMPILER_WARNINGS, Calls, X, hooks_on, mlp, report, told
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchprobe


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# -- the hooks themselves --------------------------------------------------------------------------------------


def test_no_hook_is_left_after_an_exception_in_the_forward() -> None:
    model = Calls(lambda self, x: self.second(self.first(x)), first=nn.Linear(6, 6), second=nn.Linear(7, 7))
    for of in ("output", "input", "gradient"):
        with told(), pytest.raises(RuntimeError, match="mat1 and mat2"), torchprobe.record(model, "**", of=of):
            model(X)  # what the second layer is given is no input of it, which is told
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
            assert hooks_on(copies[0]) == 0
            for twin in copies:
                twin(X).sum().backward()
                hooks = [h for m in twin.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
                assert all(hook.__func__ is contextlib.nullcontext.__exit__ for hook in hooks)
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


# -- modules with special behavior --------------------------------------------------------------------------------------------


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


def test_hooks_disable_the_encoder_fast_path_only_while_recording() -> None:
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
    with torchprobe.record(model, "attn", select=lambda out: out[1], feature_dim=-1) as rec:
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
    assert "'0', '0.0': it is scripted, and runs without Python; record the model before torch.jit.script" in text
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


def test_a_state_created_in_inference_mode_can_be_updated_later() -> None:
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
def test_checkpoint_around_a_compiled_block_counts_once(in_place: bool) -> None:
    block = mlp()
    if in_place:
        block.compile(backend="eager")
    model = Calls(
        lambda self, x: checkpoint(self.block, x, use_reentrant=False),
        block=block if in_place else torch.compile(block, backend="eager"),
    )
    x = X.clone().requires_grad_()
    with torchprobe.record(model, "block.*") as rec:
        for _ in range(2):
            model(x).sum().backward()
    assert [rec[layer].calls for layer in rec] == [2] * 6
    assert {rec[layer].vectors for layer in rec} == {10}
    assert hooks_on(model) == 0
    model(x).sum().backward()
    assert [rec[layer].calls for layer in rec] == [2] * 6


@COMPILER_WARNINGS
def test_checkpoint_around_a_compiled_block_counts_the_block_and_its_gradients_once() -> None:
    block = Calls(lambda self, x: self.inner(x), inner=mlp())
    model = Calls(lambda self, x: checkpoint(self.block, x, use_reentrant=False), block=torch.compile(block, backend="aot_eager"))
    with torchprobe.record(model, "block") as rec, torchprobe.record(model, "block.**", of="gradient") as gradients:
        for _ in range(2):
            model(X.clone().requires_grad_()).square().sum().backward()
    assert rec["block"].calls == 2
    assert {gradients[layer].calls for layer in gradients} == {2}
