"""Checkpoints of dissections with a changed file: refused, with its name, or harmless; never other numbers."""

from __future__ import annotations

import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from broden_sets import write_trap_set
from dissection_models import Net, preprocess

from tests.torture.mutations import mutated
from torchprobe.datasets import Broden
from torchprobe.dissection import Dissection, dissect

OPTIONS: dict[str, Any] = {"preprocess": preprocess, "batch_size": 3, "top": 3, "quantile": 0.05, "workers": 1, "iou_permutations": 2}
STATES: dict[str, dict[str, Any]] = {
    "looking": {"stage": "thresholds", "after": 2},
    "counting": {"stage": "overlap", "after": 2},
    "estimated": {"stage": "thresholds", "after": 2, "memory": 4_000},
    "twice": {"stage": "second pass", "after": 2, "disk": 0.0},
}
"""Where runs were stopped, and their options."""

MOST = 1 << 30  # bytes that a damaged file may cost


class Checkpoints:
    """Checkpoints that were stopped in several states, and the right results."""

    def __init__(self, folder: Path, images: int = 12) -> None:
        self.folder, self.root = folder, write_trap_set(folder / "set", images=images, seed=0).root
        self.right: dict[str, dict[str, Dissection]] = {}
        for name, state in STATES.items():
            options = {key: value for key, value in state.items() if key not in ("stage", "after")}
            self.right[name] = self.run(name, None)
            seen: list[str] = []

            def stop(seen: list[str] = seen, state: dict[str, Any] = state) -> bool:
                return seen.count(state["stage"]) >= state["after"]

            try:
                dissect(
                    Net(), "conv", Broden(self.root), **OPTIONS, **options, checkpoint=folder / name, checkpoint_every=0.0,
                    progress=lambda progress, seen=seen: seen.append(progress.stage), stop=stop,
                )  # fmt: skip
                raise AssertionError(f"{name} was not stopped")
            except KeyboardInterrupt:
                pass

    def run(self, state: str, checkpoint: Path | None) -> dict[str, Dissection]:
        """A whole run, or the rest of a stopped one."""
        options = {key: value for key, value in STATES[state].items() if key not in ("stage", "after")}
        return dissect(Net(), "conv", Broden(self.root), **OPTIONS, **options, checkpoint=checkpoint, resume=checkpoint is not None)

    def files(self) -> Iterator[tuple[str, str]]:
        """Every state and file."""
        for state in STATES:
            for path in sorted((self.folder / state).iterdir()):
                yield state, path.name

    def changed(self, state: str, change: Callable[[Path], object]) -> str:
        """Resumes a copy of a checkpoint that was changed: "refused", "same", or what is wrong."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / state, copy)
        change(copy)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = self.run(state, copy)
        except ValueError as error:
            return "refused" if str(copy) in str(error) else f"does not name the file: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (after - before) << 10 > MOST:
            return f"takes {(after - before) >> 10} MB"
        return "same" if found == self.right[state] else "OTHER NUMBERS"


def mutate(folder: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Changes a random file so many times: how often each thing happened, and the faults."""
    checkpoints, moments = Checkpoints(folder), random.Random(seed)
    files, told, faults = [*checkpoints.files()], Counter[str](), []
    for number in range(count):
        state, name = files[number % len(files)]
        kind = moments.random()
        start = moments.getstate()

        def change(copy: Path, name: str = name, kind: float = kind) -> None:
            if kind < 0.02:
                (copy / name).unlink()
            elif kind < 0.04:  # the file of another run
                other, theirs = moments.choice(files)
                shutil.copy(checkpoints.folder / other / theirs, copy / name)
            else:
                (copy / name).write_bytes(mutated((copy / name).read_bytes(), moments))

        outcome = checkpoints.changed(state, change)
        told[outcome if outcome in ("refused", "same") else "fault"] += 1
        if outcome not in ("refused", "same"):
            faults.append(f"{state}/{name}, change {number} of seed {seed} ({kind:.3f}): {outcome}"[:400])
            del start
    return told, faults
