"""Monitor and accelerate with two ranks, and a run that goes on with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import group
from torch import nn
from training_runs import X

import torchprobe
from torchprobe.integrations import Monitor

STEPS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()


def batch(step: int) -> torch.Tensor:
    return X[4 * (step % 6) : 4 * (step % 6) + 4].double()


RANKS = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
import test_integrations_ranks as t
from torchprobe.integrations import Monitor
torch.distributed.init_process_group("gloo")
rank, folder = torch.distributed.get_rank(), Path({folder!r})
written = []
model = t.network()
note = lambda numbers, step: written.append([step, numbers["act/0/std"]])
with Monitor(model, "0", log_every=2, to=note, save=folder / "run.safetensors") as monitor:
    for step in range(t.STEPS + 1):  # one more than two windows
        rows = t.batch(step)
        model(rows[:1] if rank == 0 else rows[1:])  # unequal shares
        monitor.step()
    state = monitor.state_dict(gather=True)
    if rank == 0:
        torch.save(state, folder / "state.pt")
note = lambda numbers, step: written.append([step, numbers["act/0/vectors"]])
with Monitor(model, "0", merge=False, log_every=1, to=note, fields="vectors") as own:
    model(t.batch(0)[: 1 + rank])
    own.step()
print(json.dumps([written, monitor.history.steps, monitor.history["std"].tolist(), len(state["ranks"])]))
torch.distributed.destroy_process_group()
"""


def test_two_ranks_and_then_one(tmp_path: Path) -> None:
    done = group(2, RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    (written, steps, std, ranks), (silent, *others) = (json.loads(one.stdout.strip().splitlines()[-1]) for one in done)
    assert others == [steps, std, 1] and ranks == 2
    assert silent == []
    model = network()
    with Monitor(model, "0", log_every=2) as alone:  # the run of one rank
        for step in range(STEPS + 1):
            model(batch(step))
            alone.step()
        model(batch(STEPS + 1))
        alone.step()
    assert steps == [2, 4]
    np.testing.assert_allclose(std, alone.history["std"][:2], rtol=1e-9)
    assert written[:2] == [[2, std[0][0]], [4, std[1][0]]]
    assert written[2] == [1, 1.0]  # merge=False: the share of rank 0
    saved = torchprobe.load(tmp_path / "run.safetensors")
    assert saved.history.steps == [2, 4]
    np.testing.assert_array_equal(saved.history["std"], std)
    assert saved["0"].vectors == 16  # of both ranks, to the last window

    model = network()
    with Monitor(model, "0", log_every=2) as resumed:
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        model(batch(STEPS + 1))
        resumed.step()
    assert resumed.history.steps == [2, 4, 6]
    np.testing.assert_allclose(resumed.history.values, alone.history.values, rtol=1e-9)  # with the half window of both ranks
    assert resumed.recorder.total["0"].vectors == 24


ACCELERATE = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import test_integrations as t
from pathlib import Path
from accelerate import Accelerator
folder = Path({folder!r})
whole, logged = t.accelerated(folder / "whole", 3)
t.accelerated(folder / "half", 1)
resumed, _ = t.accelerated(folder / "end", 3, resume=folder / "half")
histories = [[one.history.steps, one.history["vectors"].tolist(), one.history["std"].tolist()] for one in (whole, resumed)]
print(json.dumps([histories, len(logged), resumed.recorder.total["blocks.0"].vectors]))
"""


@pytest.mark.slow("starts two processes that import accelerate")
def test_accelerate_with_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    done = group(2, ACCELERATE.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    first, second = (json.loads(one.stdout.strip().splitlines()[-1]) for one in done)
    assert first[0] == second[0] and first[0][0] == first[0][1]  # the same on both, and resumed
    from training_runs import padded

    counts = [int(row["attention_mask"].sum()) for row in padded()]
    assert first[0][0][0] == [2]
    assert first[0][0][1] == [[float(sum(counts[:16]))] * 2]
    assert first[2] + second[2] == sum(counts)
