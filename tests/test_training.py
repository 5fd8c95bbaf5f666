"""What training does to a model, beside hooks (test_hooks.py), the compiler (test_compile.py), ranks (test_distributed.py) and CUDA graphs
(test_capture.py): each row of the table in docs/training.md has a test, and this file checks that, too."""

from __future__ import annotations

import ast
import copy
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMPILER_WARNINGS, batches
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import torchprobe

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Deep(nn.Module):
    """Residual blocks; each may be checkpointed."""

    def __init__(self, depth: int = 5, width: int = 6, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def assert_same(a: torchprobe.Recording, b: torchprobe.Recording, tolerance: float = 0.0) -> None:
    """Counts and nonfinite exactly, moments to ``tolerance``; 0 asks for equal bits."""
    assert sorted(a.layers) == sorted(b.layers)
    for layer in a:
        x, y = a[layer], b[layer]
        for name in ("calls", "vectors", "constant_vectors", "invalid_vectors"):
            assert getattr(x, name) == getattr(y, name), (layer, name)
        for name in ("count", "nonfinite"):
            assert torch.equal(getattr(x, name), getattr(y, name)), (layer, name)
        if tolerance == 0:
            assert torch.equal(x.state, y.state), layer
        for name in ("mean", "variance", "kurtosis", "mean_abs"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=tolerance, atol=tolerance, equal_nan=True)


# -- checkpoints ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("of", ["output", "gradient"])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_equals_plain_to_the_bit_whatever_comes_in(of: str, reentrant: bool, every: int) -> None:
    """Nan, inf and large offsets included: counts and nonfinite exact, moments equal."""
    data = batches(4)
    data[1][0, 0, 0], data[2][1] = math.nan, math.inf
    data[3] += 1e6
    recordings = []
    for how in (None, reentrant):
        torch.manual_seed(0)
        model = Deep(reentrant=how)
        with torchprobe.record(model, "**", of=of, every=every) as rec:
            for x in data:
                model(x.clone().requires_grad_()).square().sum().backward()
        recordings.append(rec)
    plain, checkpointed = recordings
    assert plain["blocks.4"].nonfinite.sum() > 0 or every == 2
    assert_same(plain, checkpointed)


def test_checkpoints_within_checkpoints_count_once() -> None:
    model = Deep(depth=2, reentrant=False)
    with torchprobe.record(model, "**") as rec:
        checkpoint(model, batches(1)[0].requires_grad_(), use_reentrant=False).sum().backward()
    assert {rec[layer].calls for layer in rec} == {1}


# -- where a nan comes from ------------------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
def test_a_nan_is_seen_at_its_layer_and_step_and_nowhere_before(how: str) -> None:
    model = Deep(reentrant=False if how == "checkpointed" else None)
    call: Callable[[Tensor], Tensor] = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    with torchprobe.record(model, "blocks.*") as rec:
        for step, x in enumerate(batches(5)):
            sound = copy.deepcopy(model.state_dict())
            if step == 3:
                with torch.no_grad():
                    model.blocks[2].linear.bias[4] = math.nan
            call(x.requires_grad_()).sum().backward()
            rec.snapshot(step)
            model.load_state_dict(sound)
    nonfinite = rec.history["nonfinite"]
    assert rec.history.layers == [f"blocks.{i}" for i in range(5)]
    assert (nonfinite > 0).tolist() == [[step == 3 and layer >= 2 for layer in range(5)] for step in range(5)]
    assert nonfinite[3, 2] == 15  # one feature of every vector


# -- precision -------------------------------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_against_float64_of_what_the_layers_gave(dtype: torch.dtype, compiled: bool) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    kept: dict[str, list[Tensor]] = {}
    x = 3 + torch.randn(5, 7, 64)
    handles = [
        layer.register_forward_hook(lambda m, a, out, name=name: kept.setdefault(name, []).append(out.detach()))
        for name, layer in model.named_children()
    ]
    with torch.autocast("cpu", dtype):
        model(x)
    for handle in handles:
        handle.remove()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torchprobe.record(model, "*") as rec, torch.autocast("cpu", dtype):
        call(x.requires_grad_()).float().square().sum().backward()
    for layer, (out,) in kept.items():
        assert out.dtype == dtype
        values = out.double().flatten(0, 1)
        d = values - values.mean(0)
        torch.testing.assert_close(rec[layer].kurtosis, (d**4).mean(0) / (d**2).mean(0) ** 2, rtol=1e-5, atol=0)
        torch.testing.assert_close(rec[layer].mean, values.mean(0), rtol=1e-6, atol=1e-9)
        across = values - values.mean(1, keepdim=True)
        kurtosis = ((across**4).mean(1) / (across**2).mean(1) ** 2).mean()
        assert rec[layer].vector_kurtosis == pytest.approx(float(kurtosis), rel=1e-5)


def test_a_scaler_that_overflows_shows_as_nonfinite_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    with torchprobe.record(model, "*", of="gradient") as rec:
        for step, x in enumerate(batches(3)):
            scaler.scale((100 * model(x)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            rec.snapshot(step)
            scaler.update(1.0)
    assert (rec.history["nonfinite"] > 0).tolist() == [[True, True], [False, False], [False, False]]


# -- the loop --------------------------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_one_batch() -> None:
    model = Deep().double()
    batch = torch.randn(8, 3, 6, dtype=torch.float64)
    recordings = []
    for parts in (1, 4):
        with torchprobe.record(model, "**") as rec:
            for micro in batch.chunk(parts):
                (model(micro).square().sum() / parts).backward()
            rec.snapshot(0)
        recordings.append(rec)
    whole, accumulated = (rec.total for rec in recordings)
    for layer in whole:
        torch.testing.assert_close(whole[layer].state[1:], accumulated[layer].state[1:], rtol=1e-9, atol=1e-9)
        assert (whole[layer].calls, accumulated[layer].calls) == (1, 4)


def test_validation_stays_out_of_training_windows() -> None:
    model, data = Deep(), batches(4)
    with torchprobe.record(model, "blocks.*", when="train") as by_mode, torchprobe.record(model, "blocks.*") as by_pause:
        for step, x in enumerate(data):
            model.train()
            model(x)
            model.eval()
            with by_pause.paused():
                model(x + 100)
            by_mode.snapshot(step)
            by_pause.snapshot(step)
    assert by_mode.history["vectors"].tolist() == [[15.0] * 5] * 4
    assert (by_mode.history.values == by_pause.history.values).all(where=~torch.isnan(torch.tensor(by_mode.history.values)).numpy())


def test_an_average_of_a_recorded_model_records_nothing_and_can_be_recorded() -> None:
    model = Deep()
    with torchprobe.record(model, "blocks.*") as rec:
        model(batches(1)[0])
        averages = [AveragedModel(model), copy.deepcopy(model)]
        averages[0].update_parameters(model)
        for average in averages:
            average(batches(1)[0])
        with torchprobe.record(averages[0], "blocks.*") as own:
            averages[0](batches(2)[1])
        model(batches(1)[0])
    assert {rec[layer].calls for layer in rec} == {2}
    assert own.layers == rec.layers
    assert {own[layer].calls for layer in own} == {1}


def test_threads_of_parallel_apply_share_one_recording() -> None:
    model = nn.Linear(32, 32)
    replicas = []
    with torchprobe.record(model, "") as rec:
        for _ in range(4):
            replica: Any = model._replicate_for_data_parallel()
            replica._parameters = model._parameters
            replicas.append(replica)
        x = torch.randn(16, 32)
        threads = [threading.Thread(target=lambda r=replica: [r(x) for _ in range(50)]) for replica in replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (rec[""].calls, rec[""].vectors) == (200, 3200)


# -- the table -------------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(("| ✓", "| ✗"))]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"
