"""CUDA graphs: simulated ones, and real ones on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from models import COMPILER_WARNINGS, X, mlp, told
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import control, stream


class Graph:
    """Simulates the capture of one call of a model: a replay runs its operators on the same states, but no hooks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, recorder: torchprobe.Recorder, x: Tensor) -> None:
        with monkeypatch.context() as during:
            during.setattr(stream, "capturing", lambda x: True)
            model(x)
        self.model, self.x = model, x
        self.states = {found.name: slot.state for found in recorder._bank.streams() for slot in found.slots.values()}

    def replay(self) -> None:
        x = self.x
        for name, layer in self.model.named_children():
            x = layer.forward(x)  # not called: no hook
            torch.ops.torchprobe.observe_(self.states[name], x.detach())


@pytest.fixture
def running() -> Iterator[tuple[nn.Sequential, torchprobe.Recorder]]:
    model = mlp()
    with torchprobe.record(model, "*") as recorder:
        model(X)  # the warm-up
        recorder.reset()
        yield model, recorder


def test_replays_count(monkeypatch: pytest.MonkeyPatch, running: tuple[nn.Sequential, torchprobe.Recorder]) -> None:
    model, rec = running
    graph = Graph(monkeypatch, model, rec, X)
    rec.reset()
    for _ in range(3):
        graph.replay()
    rec.snapshot(0)
    graph.replay()
    assert rec.history["vectors"].tolist() == [[15.0] * 6]
    assert rec["2"].vectors == 5
    with torchprobe.record(model, "*") as plain:
        model(X)
    assert torch.equal(rec["2"].kurtosis, plain["2"].kurtosis)


def test_a_state_is_not_created_in_the_memory_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, why = mlp(), "it is called for the first time while a CUDA graph is captured: start recording before"
    for layers, on_error in (("0", "warn"), ("*", "raise")):
        with (
            pytest.raises(RuntimeError, match=f"layer '0': {why}"),
            torchprobe.record(model, layers, on_error=on_error) as rec,
        ):
            Graph(monkeypatch, model, rec, X)
        assert rec.layers == []
    with told() as texts, torchprobe.record(model, "*") as rec:
        assert not Graph(monkeypatch, model, rec, X).states
        model(X)
    first, last = texts
    assert f"layer '0' was not read: {why}" in first
    assert f"'0', '1', '2', '3', '4', '5': 1 call left out: {why}" in last
    assert {rec[layer].vectors for layer in rec} == {5}


def test_replays_during_a_pause_do_not_count(monkeypatch: pytest.MonkeyPatch, running: tuple[nn.Sequential, torchprobe.Recorder]) -> None:
    model, rec = running
    graph = Graph(monkeypatch, model, rec, X)
    before = {layer: rec[layer].state for layer in rec}
    with rec.paused():
        graph.replay()
        with rec.paused():
            graph.replay()
        for close in (lambda: rec.snapshot(0), rec.reset):
            with pytest.raises(RuntimeError, match="no window can end inside paused.. here: the step was captured in a CUDA graph"):
                close()
        graph.replay()
    assert all(torch.equal(rec[layer].state, state) for layer, state in before.items())
    graph.replay()
    assert rec["0"].vectors == 10


def test_replays_after_the_end_do_not_count_and_write_to_live_memory(
    monkeypatch: pytest.MonkeyPatch, running: tuple[nn.Sequential, torchprobe.Recorder]
) -> None:
    model, rec = running
    graph = Graph(monkeypatch, model, rec, X)
    rec.snapshot(0)
    rec.stop()
    graph.replay()
    assert rec["0"].vectors == 0
    assert rec.total["0"].vectors == 5
    with rec:
        model(X)
    assert rec["0"].vectors == 5
    addresses = [state.data_ptr() for state in graph.states.values()]
    held = {state.data_ptr() for state in control._held}
    del graph, rec, running
    gc.collect()
    assert held.issuperset(addresses)


# -- real ones ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("of", ["output", "gradient"])
def test_a_training_step_is_captured_so_it_does_not_synchronize(of: str) -> None:
    model = mlp(4, 64).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(32, 64, device="cuda")

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    with torchprobe.record(model, "*", of=of, every=2) as rec:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        rec.reset()
        for window in range(3):
            for _ in range(4):
                graph.replay()
            rec.snapshot(window)
        with rec.paused():
            graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert rec.history["vectors"].tolist() == [[64.0] * 8] * 3
    assert rec["0"].calls == 12
    with torchprobe.record(model, "*", of=of) as plain:
        step()
    for layer in plain:
        torch.testing.assert_close(rec.total[layer].kurtosis, plain[layer].kurtosis, rtol=1e-9, atol=0)


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu_while_a_model_trains() -> None:
    model = mlp(4, 64).cuda()
    x = torch.randn(32, 64, device="cuda")
    with torchprobe.record(model, "*", keep=10) as rec, torchprobe.record(model, "*", of="gradient") as gradients:
        model(x).sum().backward()
        rec.snapshot(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 200):
                model(x).sum().backward()
                rec.snapshot(step)
                with rec.paused():
                    model(x)
            gradients.reset()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert rec.history["vectors"].tolist() == [[32.0] * 8] * 10


@pytest.mark.gpu
@COMPILER_WARNINGS
@pytest.mark.parametrize("of", ["output", "gradient"])
def test_reduce_overhead_keeps_its_graphs(of: str) -> None:
    torch.compiler.reset()
    model = mlp(4, 64).cuda().double()
    x = torch.randn(32, 64, device="cuda", dtype=torch.float64)
    fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    recordings = []
    for call in (model, fast):
        torch._dynamo.utils.counters.clear()
        with torchprobe.record(model, "*", of=of) as rec:
            for _ in range(6):
                torch.compiler.cudagraph_mark_step_begin()
                call(x).square().sum().backward()
        recordings.append(rec)
    if of == "output":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    plain, seen = recordings
    for layer in plain:
        assert seen[layer].calls == plain[layer].calls == 6
        assert torch.equal(seen[layer].count, plain[layer].count)
        torch.testing.assert_close(seen[layer].kurtosis, plain[layer].kurtosis, rtol=1e-6, atol=0)
    torch.compiler.reset()
