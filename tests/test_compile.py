"""Recording under torch.compile: fullgraph, no break, and the numbers of eager mode."""

from __future__ import annotations

import copy
import gc
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from processes import python
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import Recorder, RecordingWarning

pytestmark = [  # the compiler's own warnings
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


BATCHES = [torch.randn(n, 7, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 4, 6)]


def run(model: Callable[[Tensor], Tensor], recorder: Recorder, batches: list[Tensor] = BATCHES, backward: bool = True) -> Recorder:
    with recorder:
        for batch in batches:
            out = model(batch)
            if backward:
                out.square().sum().backward()
    return recorder


def assert_same(a: torchprobe.Recording, b: torchprobe.Recording, tolerance: float = 0.0) -> None:
    """Counts exactly, moments to ``tolerance`` relative; 0 asks for equal bits."""
    assert a.layers == b.layers
    for layer in a.layers:
        x, y = a[layer], b[layer]
        if tolerance == 0:
            assert torch.equal(x.state, y.state), layer
        for name in ("calls", "vectors", "constant_vectors", "invalid_vectors"):
            assert getattr(x, name) == getattr(y, name), (layer, name)
        assert torch.equal(x.count, y.count), layer
        assert torch.equal(x.nonfinite, y.nonfinite), layer
        for name in ("variance", "kurtosis", "mean_abs", "min", "max"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=tolerance, atol=0)
        assert math.isclose(x.vector_kurtosis, y.vector_kurtosis, rel_tol=max(tolerance, 1e-15)), layer


inductor = pytest.mark.slow("compiles with inductor")
BACKENDS = [("aot_eager", 0.0), pytest.param("inductor", 1e-6, marks=inductor)]


@pytest.mark.parametrize(
    ("backend", "tolerance", "of"),
    [
        ("aot_eager", 0.0, "output"),
        ("aot_eager", 0.0, "input"),
        ("aot_eager", 0.0, "gradient"),
        pytest.param("inductor", 1e-6, "output", marks=inductor),
        pytest.param("inductor", 1e-6, "gradient", marks=inductor),
    ],
)
def test_fullgraph_gives_the_numbers_of_eager_mode(backend: str, tolerance: float, of: str) -> None:
    """Of nan, inf and a large offset, too: counts and nonfinite exactly, moments to the tolerance, bits under aot_eager."""
    model = Net(depth=2).double()  # in float32 the compiler's own rounding would show
    batches = [batch.double() for batch in BATCHES]
    batches[0][1, 2, 3], batches[1][0, 4] = math.nan, -math.inf
    batches[2] += 1e4
    plain = run(model, torchprobe.record(model, "**", of=of), batches)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, fullgraph=True, dynamic=True)
    seen = run(compiled, torchprobe.record(compiled, "**", of=of), batches)
    assert len(seen) == 10
    assert seen["blocks.0"].nonfinite.sum() > 0
    assert_same(plain, seen, tolerance)


@pytest.mark.parametrize("of", ["output", "input", "gradient"])
def test_dynamic_shapes_compile_once(of: str) -> None:
    model = Net()
    plain = run(model, torchprobe.record(model, "**", of=of, every=2, outlier_sigma=2.5))
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager" if of == "gradient" else "eager", fullgraph=True, dynamic=True)
    seen = run(compiled, torchprobe.record(compiled, "**", of=of, every=2, outlier_sigma=2.5))
    assert_same(plain, seen)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_hooks_cost_no_graph_break_and_no_graph() -> None:
    model = Net()
    for recorder in (None, torchprobe.record(model, "**")):
        torch.compiler.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with recorder or warnings.catch_warnings():
            for _ in range(4):
                compiled(BATCHES[0])
        assert counter.frame_count == 1


def test_the_hook_of_the_outermost_module_makes_no_graph_of_its_own() -> None:
    model = Net(depth=1)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    rec = run(compiled, torchprobe.record(compiled, ""), [BATCHES[0]] * 2)
    assert rec[""].calls == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("backend", "tolerance"), BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(backend: str, tolerance: float, mode: Callable[[], Any]) -> None:
    model = Net(depth=1).double()
    batches = [BATCHES[0].double()]
    plain = run(model, torchprobe.record(model, "**"), batches, backward=False)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with mode():
        seen = run(compiled, torchprobe.record(compiled, "**"), batches, backward=False)
    assert_same(plain, seen, tolerance)
    seen.snapshot(0)  # the state was not made an inference tensor
    seen.reset()


def test_blocks_compiled_one_by_one_beyond_the_recompile_limit() -> None:
    model = Net(depth=10)
    plain = run(model, torchprobe.record(model, "blocks.**"), BATCHES[:1])
    limit = torch._dynamo.config.recompile_limit
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert_same(plain, run(model, torchprobe.record(model, "blocks.**"), BATCHES[:1]))
    assert torch._dynamo.config.recompile_limit == limit
    assert model(BATCHES[0]).shape == (3, 7, 5)  # the graphs with hooks no longer fill the cache


def test_blocks_wrapped_one_by_one() -> None:
    model = Net(depth=10)
    plain = run(model, torchprobe.record(model, "**"), BATCHES[:1])
    model.blocks = nn.ModuleList(torch.compile(block, backend="eager", fullgraph=True) for block in model.blocks)
    assert_same(plain, run(model, torchprobe.record(model, "**"), BATCHES[:1]))


def test_compiled_train_step_function() -> None:
    model = Net()
    plain = run(model, torchprobe.record(model, "**"))

    def step(x: Tensor) -> Tensor:
        return model(x) * 2

    seen = run(torch.compile(step, backend="eager", fullgraph=True), torchprobe.record(model, "**"))
    assert_same(plain, seen)


def test_graph_breaks_lose_nothing() -> None:
    class Breaks(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.head(self.blocks[2](self.blocks[1](x)))

    model = Breaks()
    plain = run(model, torchprobe.record(model, "**"))
    compiled = torch.compile(model, backend="eager")
    assert_same(plain, run(compiled, torchprobe.record(compiled, "**")))


def test_per_epoch_recording_of_one_compiled_model() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for epoch in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RecordingWarning)
            recorder = run(compiled, torchprobe.record(compiled, "**"))
        assert [recorder[layer].calls for layer in recorder] == [3] * 14
        assert len(caught) == (epoch > 0)  # the notice that graphs were dropped
        assert all("compiled and had run before" in str(w.message) for w in caught)
        compiled(BATCHES[0])
        assert [recorder[layer].calls for layer in recorder] == [3] * 14  # nothing counts after the end


def test_recording_the_module_below_a_compiled_wrapper_that_has_run() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(BATCHES[0])
    with pytest.warns(RecordingWarning, match="compiled and had run"):
        recorder = run(compiled, torchprobe.record(model, "**"))
    assert [recorder[layer].calls for layer in recorder] == [3] * 14


def test_graphs_of_other_models_are_left_alone() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    other = torch.compile(Other(), backend=counter)
    other(BATCHES[0])
    model = Net()
    with torchprobe.record(model, "blocks.*"):  # no notice: warnings are errors here
        model(BATCHES[0])
    other(BATCHES[0])
    assert counter.frame_count == 1


def test_pause_and_mode_switch_with_one_more_graph_each() -> None:
    model = Net(depth=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torchprobe.record(compiled, "**") as rec:
        for _ in range(3):
            compiled(BATCHES[0])
            with rec.paused():
                compiled(BATCHES[0])
    assert rec["blocks.0"].calls == 3
    assert rec[""].calls == 3
    assert counter.frame_count == 2
    with torchprobe.record(compiled, "**", when="train") as rec, warnings.catch_warnings():
        for _ in range(2):
            compiled.eval()
            compiled(BATCHES[0])
            compiled.train()
            compiled(BATCHES[0])
    assert [rec[layer].calls for layer in rec] == [2] * 6


def test_mask_changes_without_recompiling() -> None:
    model = Net(depth=1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    masks = [torch.rand(3, 7) > 0.4 for _ in range(3)]
    with torchprobe.record(compiled, "blocks.*") as rec:
        for mask in masks:
            rec.mask(mask)
            compiled(BATCHES[0])
    assert rec["blocks.0"].vectors == sum(int(mask.sum()) for mask in masks)
    assert counter.frame_count == 1


@pytest.mark.parametrize("positions", ["class", "patch", "mean"])
def test_positions(positions: str) -> None:
    model = Net(depth=1)
    mask = torch.rand(3, 7) > 0.4
    recordings = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        with torchprobe.record(model, "**", positions=positions) as rec, rec.mask(mask):
            call(BATCHES[0])
        recordings.append(rec)
    assert_same(*recordings)


def test_two_recorders_with_other_settings() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    settings: list[dict[str, Any]] = [{"outlier_sigma": 1.5, "every": 2}, {"outlier_sigma": 2.0}]
    plain = [run(model, torchprobe.record(model, "**", **s)) for s in settings]
    both = [torchprobe.record(compiled, "**", **s) for s in settings]
    with both[0], both[1]:
        for batch in BATCHES:
            compiled(batch)
    for a, b in zip(plain, both, strict=True):
        assert_same(a, b)


def test_outputs_of_every_structure_and_their_gradients() -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(depth=1)

        def forward(self, x: Tensor) -> Any:
            return None, {"hidden": [self.inner(x)], "extra": 3}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.structured = Structured()

        def forward(self, x: Tensor) -> Tensor:
            return self.structured(x)[1]["hidden"][0] * 2

    model = Model()
    for of in ("output", "gradient"):
        torch.compiler.reset()
        plain = run(model, torchprobe.record(model, "structured", of=of))
        compiled = torch.compile(model, backend="aot_eager" if of == "gradient" else "eager", fullgraph=True)
        assert_same(plain, run(compiled, torchprobe.record(model, "structured", of=of)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=inductor)])
def test_gradients_of_several_forwards_before_their_backwards(backend: str) -> None:
    """Also with a window that ends between forward and backward: no tensor saved by autograd may change."""
    model = Net(depth=1)
    recordings = []
    for call in (model, torch.compile(model, backend=backend, fullgraph=True)):
        with torchprobe.record(model, "blocks.*", of="gradient") as rec:
            losses = [call(batch).square().sum() for batch in (BATCHES[0], BATCHES[0])]
            rec.snapshot(0)
            for loss in losses:
                loss.backward()
        recordings.append(rec)
        assert rec["blocks.0"].calls == 2
    assert_same(*recordings, tolerance=1e-5)


@inductor
def test_shared_layer_with_equal_gradients_counts_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(x.sin())

    model = Twice()
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    rec = run(compiled, torchprobe.record(model, "layer", of="gradient"), BATCHES[:1])
    assert rec["layer"].calls == 2


def test_select_of_a_new_tensor_cannot_give_a_compiled_gradient() -> None:
    model = Net(depth=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with (
        pytest.raises(
            Exception, match=r"layer 'blocks\.0': under torch.compile only the gradient of a tensor that is part of the output can be read"
        ),
        torchprobe.record(model, "blocks.0", of="gradient", select=lambda out: out[:, :2]),
    ):
        compiled(BATCHES[0])


def test_errors_in_a_graph_name_the_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(x[..., :1])

    model = Two()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with (
        pytest.raises(Exception, match=r"layer 'layer': its activations were 8 wide and are now 1"),
        torchprobe.record(model, "layer", on_error="raise"),
    ):
        compiled(BATCHES[0])
    torch.compiler.reset()
    with pytest.warns(RecordingWarning) as caught, torchprobe.record(model, "layer") as rec:
        out = compiled(BATCHES[0])
    assert [bool(re.search("'layer'.*: its activations were 8 wide and are now 1", str(w.message))) for w in caught] == [True, True]
    assert rec.layers == []
    torch.testing.assert_close(out, model(BATCHES[0]))


def test_export_of_a_recorded_model_leaves_the_operator_out() -> None:
    model = Net(depth=1)
    with torchprobe.record(model, "**") as rec:
        for strict in (False, True):
            program = torch.export.export(model, (BATCHES[0],), strict=strict)
            assert not any("torchprobe" in str(node.target) for node in program.graph.nodes)
        model(BATCHES[0])
    assert rec["blocks.0"].calls == 1


def test_a_state_is_freed_with_its_recorder() -> None:
    model = Net(depth=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    rec = run(compiled, torchprobe.record(model, "**"))
    state = weakref.ref(next(iter(rec._bank.hooks["blocks.0"].main.slots.values())).state)
    del rec
    gc.collect()
    assert state() is None


def test_importing_does_not_import_the_compiler() -> None:
    code = "import torchprobe, sys; print('torch._dynamo' in sys.modules)"
    assert python(code).stdout == "False\n"
