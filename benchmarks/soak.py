"""A long training run that is recorded all the time: does its memory stay flat, and is its history whole after restarts?

    python -m benchmarks.soak --steps 100000

A small transformer trains in three processes, one after the other; each resumes from the checkpoint of the one before. Outputs and
gradients of every block are recorded in every step. Every 100 steps a window is closed, and its numbers are written to a log. At the end
the history must have every window, the log every line, and the total every vector.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchprobe

WINDOW = 100
BATCH, TOKENS, WIDTH = 4, 8, 32
PARTS = 3
OF = ("output", "gradient")


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, WIDTH))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def resident() -> float:
    """The memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize() / 1e6


def run(folder: Path, first: int, last: int) -> dict[str, Any]:
    """Trains from step ``first`` to ``last``, resuming from the checkpoint in ``folder``, and writes a new one."""
    torch.set_num_threads(1)
    model, optimizer = build()
    recorder = torchprobe.record(model, of=OF)
    checkpoint = folder / "checkpoint.pt"
    if first:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        recorder.load_state_dict(saved["recorder"])
    generator = torch.Generator().manual_seed(first)
    memory: list[tuple[int, float]] = []
    start = time.perf_counter()
    with recorder, open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        for step in range(first, last):
            x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
            if (step + 1) % WINDOW == 0:
                log.write(json.dumps({"step": step, **recorder.metrics()}) + "\n")
                recorder.snapshot(step)
            if (step + 1) % max(WINDOW, (last - first) // 10) == 0:
                gc.collect()
                memory.append((step + 1, round(resident(), 1)))
    seconds = time.perf_counter() - start
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recorder": recorder.state_dict()}
    torch.save(state, checkpoint)
    total = recorder.total
    return {
        "memory": memory,
        "seconds": seconds,
        "steps": [int(step) for step in recorder.history.steps],
        "nan": int(sum(math.isnan(v) for v in recorder.history["vector_kurtosis"].ravel().tolist())),
        "history_mb": recorder.history.values.nbytes / 1e6 + recorder.history.histograms.nbytes / 1e6,
        "seen": {name: one.vectors + one.constant_vectors + one.invalid_vectors for name, one in total.items()},
    }


def soak(steps: int, folder: Path) -> list[dict[str, Any]]:
    """The three parts, each in a process of its own; checks what must be whole.

    Raises:
        AssertionError: something was lost.
    """
    edges = [steps * part // PARTS // WINDOW * WINDOW for part in range(PARTS)] + [steps]
    results = []
    for first, last in pairwise(edges):
        program = [sys.executable, "-m", "benchmarks.soak", "--folder", str(folder), "--part", str(first), str(last)]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    end = results[-1]
    expected = list(range(WINDOW - 1, steps, WINDOW))
    assert end["steps"] == expected, "windows are missing from the history"
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == expected, "lines are missing from the log"
    assert end["nan"] == 0, "a layer is missing from a window"
    vectors = steps * BATCH * TOKENS
    assert set(end["seen"].values()) == {vectors}, f"expected {vectors} vectors of each layer, got {end['seen']}"
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--part", type=int, nargs=2)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(run(arguments.folder, *arguments.part)))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = soak(arguments.steps, arguments.folder or Path(folder))
    for number, result in enumerate(results):
        shown = ", ".join(f"{step:,}: {mb:.0f}" for step, mb in result["memory"])
        each = result["seconds"] / max(len(result["steps"]) * WINDOW // (number + 1), 1) * 1e3
        print(f"process {number + 1}: {result['seconds']:.0f} s, {each:.2f} ms a step; history {result['history_mb']:.1f} MB")
        print(f"  MB after step {shown}")
    seen = results[-1]["seen"]
    print(f"whole: {len(results[-1]['steps']):,} windows, {next(iter(seen.values())):,} vectors of each of {len(seen)} rows")


if __name__ == "__main__":
    main()
