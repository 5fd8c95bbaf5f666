"""``python -m fuzz.operators [--calls N] [--seed S]``: raw calls of every registered operator, with absurd arguments.

``python -m fuzz.operators --seed S --call K`` repeats one call in this process. Half of the calls go to the native kernels, half to the
references in PyTorch. They run in processes of their own. A fault is a process that dies, a call of more than ten seconds, a gigabyte
taken, an error that is none of the documented ones, a refused call that has changed its arguments, or a write next to an argument.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprobe.ops import exponents, layout
from torchprobe.ops.memory import check_memory
from torchprobe.ops.observers import register_observer
from torchprobe.ops.quantile import BLOCK, new_buffers

SLOWEST = 10.0
"""Seconds of the processor for one call."""
MOST_MEMORY = 1 << 30
"""Bytes that one call may take."""
DOCUMENTED = (RuntimeError, ValueError, TypeError)
"""What an operator may raise. PyTorch itself raises the first and the last for arguments that do not fit a schema."""
_NEVER = (RecursionError,)  # a RuntimeError by its class
_BLOCK = 5000  # calls of one process
_NUMBERS = (-(1 << 63), -(1 << 31), -3, -2, -1, 0, 1, 2, 3, 7, 1 << 20, (1 << 31) - 2, 1 << 31, 1 << 40, 1 << 53, (1 << 63) - 1)
_FLOATS = (-math.inf, -1.0, 0.0, 5e-324, 1e-300, 6.0, 1e300, math.inf, math.nan)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
_STARTING = b"\xff" * 8  # the process has not made a call yet
_CANARY = 64  # elements before and after an argument that is written to


class Call:
    """One call, which follows from its seed and number.

    Attributes:
        name: of the operator.
        arguments: by name, in the order of the schema.
        written: the names of those that are written to.
        changes: what was made absurd, for the report.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.rng = random.Random(f"operators/{seed}/{number}")
        torch.manual_seed(self.rng.getrandbits(32))
        self.name = self.rng.choice(sorted(_VALID))
        self.arguments, self.written = _VALID[self.name](self.rng)
        self.buffers = [self._fenced(name) for name in self.written if isinstance(self.arguments[name], Tensor)]
        self.changes = [self._change() for _ in range(self.rng.choice((0, 1, 1, 1, 2, 2, 3)))]

    def _fenced(self, name: str) -> tuple[Tensor, Tensor]:
        """Moves an argument between canaries; returns the memory and its content."""
        given = self.arguments[name]
        memory = torch.full((given.numel() + 2 * _CANARY,), 77, dtype=given.dtype)
        inside = memory[_CANARY : _CANARY + given.numel()].view(given.shape)
        inside.copy_(given)
        self.arguments[name] = inside
        return memory, memory.clone()

    def _change(self) -> str:
        name = self.rng.choice(list(self.arguments))
        value = self.arguments[name]
        if isinstance(value, Tensor):
            kind = self.rng.choice(sorted(_TENSOR_CHANGES))
            try:
                if kind in _READING:  # PyTorch itself would die of it
                    check_memory({}, {name: value}, copied=True)
                self.arguments[name] = _TENSOR_CHANGES[kind](self, value)
            except (RuntimeError, ValueError, TypeError, IndexError):  # not every tensor can be changed so
                kind += " (not possible)"
        elif isinstance(value, list):
            kind = "another list"
            self.arguments[name] = self.rng.choice(([], value * 2, [torch.zeros(3)], [one[:-1] for one in value], [*value, torch.zeros(0)]))
        elif value is None or isinstance(value, bool):
            kind = "the other"
            self.arguments[name] = self.rng.choice((True, False)) if isinstance(value, bool) else torch.ones(3, dtype=torch.bool)
        elif isinstance(value, str):
            kind = "another text"
            self.arguments[name] = self.rng.choice(("", "anchored", "half_pixel", "\0", "ä" * 99))
        else:
            kind = "another number"
            self.arguments[name] = self.rng.choice(_NUMBERS if isinstance(value, int) else _FLOATS)
        return f"{name}: {kind}"

    def other(self) -> Tensor:
        """Another argument that is a tensor."""
        return self.rng.choice([value for value in self.arguments.values() if isinstance(value, Tensor)])

    def run(self) -> str:
        """Makes the call; returns "returned", "refused", or what is wrong."""
        before = [memory.clone() if _sound(memory) else None for memory, _ in self.buffers]
        try:
            getattr(torch.ops.torchprobe, self.name)(*self.arguments.values())
        except _NEVER:
            return traceback.format_exc()
        except DOCUMENTED as error:
            changed = any(
                old is not None and not torch.equal(old.view(torch.uint8), memory.view(torch.uint8))
                for old, (memory, _) in zip(before, self.buffers, strict=True)
            )
            late = "it keeps nan" in str(error)  # documented: found while sorting
            return "a refused call has changed its arguments: " + str(error).splitlines()[0] if changed and not late else "refused"
        except BaseException:
            return traceback.format_exc()
        for memory, first in self.buffers:
            ends = [slice(_CANARY), slice(-_CANARY, None)]
            if _sound(memory) and not self._shared(memory) and any(not torch.equal(memory[end], first[end]) for end in ends):
                return "written beyond an argument"
        return "returned"

    def _shared(self, memory: Tensor) -> bool:
        """Whether a change has made an argument of the whole memory."""
        return any("alias" in change or "strides" in change for change in self.changes)


def _sound(memory: Tensor) -> bool:
    return memory.untyped_storage().nbytes() >= memory.numel() * memory.element_size()


# -- what is made absurd -----------------------------------------------------------------------------------------------------


def _resized(call: Call, x: Tensor) -> Tensor:
    whole = x.untyped_storage()
    whole.resize_(call.rng.choice((0, 1, 8, whole.nbytes() // 2, max(whole.nbytes() - 1, 0))))
    return x


def _aliased(call: Call, x: Tensor) -> Tensor:
    other = call.other()
    flat = other.as_strided((min(other.numel(), x.numel()),), (1,)).view(x.dtype).flatten()
    return flat[: x.numel()].view(x.shape) if flat.numel() >= x.numel() else flat


def _strided(call: Call, x: Tensor) -> Tensor:
    shape = [max(size, 1) for size in x.shape]
    return x.as_strided(shape, [call.rng.choice((0, 1, 2, 5)) for _ in shape])


def _expanded(call: Call, x: Tensor) -> Tensor:
    huge = call.rng.choice((0, 3, 1 << 8, 1 << 45, 1 << 61))
    dim = call.rng.randrange(max(x.dim(), 1))
    return x.select(dim, 0).unsqueeze(dim).expand(*[huge if index == dim else size for index, size in enumerate(x.shape)])


def _filled(call: Call, x: Tensor) -> Tensor:
    flat = x.view(-1)
    for _ in range(call.rng.randrange(1, 5)):
        value: float = call.rng.choice(_FLOATS if x.is_floating_point() else _NUMBERS)
        flat[call.rng.randrange(flat.numel())] = value
    return x


_TENSOR_CHANGES: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "storage of another size": _resized,
    "alias of another argument": _aliased,
    "other strides": _strided,
    "expanded": _expanded,
    "absurd elements": _filled,
    "another dtype": lambda call, x: x.to(call.rng.choice(_DTYPES)),
    "transposed": lambda call, x: x.mT if x.dim() > 1 else x[::2],
    "one dimension more": lambda call, x: x.unsqueeze(call.rng.randrange(x.dim() + 1)),
    "one dimension less": lambda call, x: x.select(call.rng.randrange(x.dim()), 0),
    "shorter": lambda call, x: x.narrow(call.rng.randrange(x.dim()), 0, x.shape[0] // 2),
    "empty": lambda call, x: x[:0],
    "without memory": lambda call, x: x.to("meta"),
    "sparse": lambda call, x: x.to_sparse(),
    "many dimensions": lambda call, x: x.view(*[1] * call.rng.choice((60, 70)), *x.shape),
    "negated view": lambda call, x: torch._neg_view(x),
    "inference": lambda call, x: _in_inference_mode(x),
}


_READING = ("absurd elements", "another dtype", "sparse", "inference", "without memory")


def _in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


# -- valid calls -------------------------------------------------------------------------------------------------------------


def _state(features: int, vectors: int = 0) -> Tensor:
    state = torch.zeros(layout.size(features), dtype=torch.float64)
    if vectors:
        torch.ops.torchprobe.observe_(state, torch.randn(vectors, features))
    return state


def _activation(rng: random.Random) -> tuple[Tensor, int]:
    shape = [rng.choice((1, 2, 3, 5, 17)) for _ in range(rng.choice((1, 2, 2, 3, 4)))]
    shape[0] *= rng.choice((1, 1, 1, 40))
    return torch.randn(shape).to(rng.choice(_DTYPES[:4])), rng.randrange(len(shape))


def _observe(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    x, dim = _activation(rng)
    positions = [size for index, size in enumerate(x.shape) if index != dim]
    mask = rng.choice((None, torch.rand(positions) < 0.5))
    state = _state(x.shape[dim], rng.choice((0, 3)))
    return {"state": state, "x": x, "feature_dim": dim, "outlier_sigma": 6.0, "every": rng.choice((1, 2)), "mask": mask}, ("state",)


def _read(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    return {"states": [_state(4, 3) for _ in range(rng.randrange(1, 4))]}, ()


def _take(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    states = [_state(4, 3) for _ in range(rng.randrange(1, 4))]
    out = torch.zeros(len(states), layout.size(4), dtype=torch.float64)
    return {"states": states, "out": out, "calls": rng.random() < 0.5}, ("out",)


def _pair(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    features = rng.choice((1, 4, 33))
    return {"state": _state(features, 5), "other": _state(features, 3)}, ("state",)


def _keep_largest(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    x, dim = _activation(rng)
    capacity = rng.choice((1, 5, 40))
    values, counts, bound = new_buffers(x.shape[dim], capacity + BLOCK + rng.choice((0, 9)))
    for _ in range(rng.choice((0, 2))):
        torch.ops.torchprobe.keep_largest_(values, counts, bound, torch.randn(x.shape), dim, capacity)
    arguments = {"values": values, "counts": counts, "bound": bound, "x": x, "feature_dim": dim, "capacity": capacity}
    return arguments, ("values", "counts", "bound")


def _exponents(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    x, dim = _activation(rng)
    state = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in exponents.shapes(x.shape[dim]).items()}
    for _ in range(rng.choice((0, 1))):
        torch.ops.torchprobe.exponents_(*state.values(), torch.randn(x.shape), dim, None)
    positions = [size for index, size in enumerate(x.shape) if index != dim]
    mask = rng.choice((None, torch.rand(positions) < 0.5))
    return {**state, "x": x, "feature_dim": dim, "mask": mask}, tuple(state)


def _average_precision(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    units, images, concepts, groups = (rng.choice((1, 2, 5, 9)) for _ in range(4))
    shown = torch.rand(images, concepts) < 0.4
    index = rng.choice((torch.int64, torch.int32))
    crow = torch.cat([torch.zeros(1, dtype=index), shown.sum(1).cumsum(0).to(index)])
    grouped = rng.random() < 0.5
    return {
        "scores": torch.randn(units, images, dtype=rng.choice((torch.float32, torch.float64))),
        "crow": crow,
        "col": shown.nonzero()[:, 1].to(index),
        "concepts": concepts,
        "eligible": torch.rand(images, groups) < 0.7 if grouped else None,
        "group": torch.randint(groups, (concepts,)) if grouped else None,
        "both": rng.random() < 0.5,
    }, ()


def _overlap(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    images, units, labels, categories = (rng.choice((1, 2, 4)) for _ in range(4))
    labels += 1
    sizes = torch.tensor([[rng.randrange(3), rng.choice((3, 8)), rng.choice((4, 9)), rng.randrange(2)] for _ in range(images)])
    boxes = torch.tensor([[0.0, 0.0, 3.0, 2.5]] * images, dtype=torch.float64) if rng.random() < 0.3 else None
    return {
        "intersection": torch.zeros(units, labels, dtype=torch.int64),
        "activation": torch.zeros(units, categories + 1, dtype=torch.int64),
        "truth": torch.zeros(labels, dtype=torch.int64),
        "maps": torch.randn(images, units, rng.choice((1, 2)), rng.choice((1, 3))),
        "thresholds": torch.randn(units),
        "category": torch.randint(-1, categories, (labels,)),
        "planes": torch.randint(labels, (int((sizes[:, 0] * sizes[:, 1] * sizes[:, 2]).sum()),), dtype=torch.int32),
        "sizes": sizes,
        "whole": torch.randint(1, labels, (int(sizes[:, 3].sum()),)),
        "grid": "half_pixel" if boxes is not None else rng.choice(("half_pixel", "anchored")),
        "height": 32,
        "width": 32,
        "per_plane": rng.random() < 0.5,
        "boxes": boxes,
    }, ("intersection", "activation", "truth")


class _Nobody:
    def activation(self, x: Tensor, mask: Tensor | None) -> None: ...
    def gradient(self, grad: Tensor, mask: Tensor | None) -> None: ...
    def called(self, inputs: list[Tensor], outputs: list[Tensor]) -> None: ...


_nobody = _Nobody()


def _shown(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    x, _ = _activation(rng)
    return {"x": x, "observer": register_observer(_nobody), "mask": rng.choice((None, torch.ones(3, dtype=torch.bool)))}, ()


def _shown_with_token(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    arguments, _ = _shown(rng)
    return {"token": torch.zeros(()), **arguments}, ("token",)


def _call(rng: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    parts = {name: [_activation(rng)[0] for _ in range(rng.randrange(1, 3))] for name in ("inputs", "outputs")}
    return {"token": torch.zeros(()), **parts, "observer": register_observer(_nobody)}, ("token",)


_VALID: dict[str, Callable[[random.Random], tuple[dict[str, Any], tuple[str, ...]]]] = {
    "observe_": _observe,
    "observe_reference_": _observe,
    "observe_read": _read,
    "observe_take_": _take,
    "observe_merge_": _pair,
    "observe_write_": _pair,
    "keep_largest_": _keep_largest,
    "exponents_": _exponents,
    "average_precision": _average_precision,
    "overlap_tally_": _overlap,
    "observe_activation_": _shown_with_token,
    "observe_call_": _call,
    "observe_output": _shown,
    "observe_gradient": _shown,
    "observe_gradient_backward": _shown,
}


# -- processes -----------------------------------------------------------------------------------------------------------------


def work(seed: int, first: int, last: int, place: Path) -> None:
    """Makes some calls, and notes in a file which one is running: a process that dies cannot tell."""
    with place.open("r+b") as file, mmap.mmap(file.fileno(), 8) as running:
        for number in range(first, last):
            running[:] = number.to_bytes(8, "little")
            peak, began = _peak(), time.process_time()
            call = Call(seed, number)
            result = call.run()
            taken, seconds = _peak() - peak, time.process_time() - began
            if result not in ("returned", "refused"):
                print(f"fault\t{number}\t{call.name}\t{'; '.join(call.changes)}\t{result.strip().splitlines()[-1]}", flush=True)
            elif taken > MOST_MEMORY or seconds > SLOWEST:
                print(f"fault\t{number}\t{call.name}\t{'; '.join(call.changes)}\t{taken >> 20} MiB, {seconds:.1f} s", flush=True)
            else:
                print(f"{result}\t{call.name}")
    sys.stdout.flush()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(seed: int, first: int, last: int, disabled: bool) -> tuple[Counter[str], list[str]]:
    """Makes calls in processes of their own: how many returned and were refused, and the faults."""
    tally, faults = Counter[str](), list[str]()
    environment = {**os.environ, "TORCHPROBE_DISABLE_KERNELS": "1" if disabled else "0", "OMP_NUM_THREADS": "1", "MALLOC_CHECK_": "3"}
    with tempfile.TemporaryDirectory() as folder:
        place, output = Path(folder, "running"), Path(folder, "output")
        while first < last:
            place.write_bytes(_STARTING)
            command = [sys.executable, "-m", "fuzz.operators", "--work", str(seed), str(first), str(last), str(place)]
            with output.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process:
                ended = _watch(process, place)
            for line in output.read_text(errors="replace").splitlines():
                kind, _, rest = line.partition("\t")
                tally[kind] += kind in ("returned", "refused", "fault")
                if kind == "fault":
                    faults.append(rest)
            if ended is None:
                break
            running = first if (now := place.read_bytes()) == _STARTING else int.from_bytes(now, "little")
            call = Call(seed, running)
            tally["fault"] += 1
            faults.append(f"{running}\t{call.name}\t{'; '.join(call.changes)}\t{ended}")
            first = running + 1
    return tally, faults


def _watch(process: subprocess.Popen[bytes], place: Path) -> str | None:
    """Waits for a process: None, or how it died."""
    running, since = b"", time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        if (now := place.read_bytes()) != running:
            running, since = now, time.monotonic()
        elif time.monotonic() - since > (600 if running == _STARTING else 12 * SLOWEST):  # others may need the processor
            process.kill()
            process.wait()
            return "does not end"
    return None if process.returncode == 0 else f"the process died: {process.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser("python -m fuzz.operators", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--call", type=int, help="repeat this one call in this process")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_warn_always(False)
    if arguments.work is not None:
        seed, first, last, place = arguments.work
        work(int(seed), int(first), int(last), Path(place))
        return 0
    if arguments.call is not None:
        call = Call(arguments.seed, arguments.call)
        print(call.name, call.changes, flush=True)
        print(call.run())
        return 0
    began, tally, faults = time.monotonic(), Counter[str](), list[str]()
    for number, first in enumerate(range(0, arguments.calls, _BLOCK)):
        counted, found = run(arguments.seed, first, min(first + _BLOCK, arguments.calls), disabled=number % 2 == 1)
        tally += counted
        faults += [f"{'reference' if number % 2 else 'native'}\t{fault}" for fault in found]
        for fault in found:
            print(fault, flush=True)
        if first + _BLOCK < arguments.calls:
            _tell(tally, began)
    _tell(tally, began)
    return 1 if faults else 0


def _tell(tally: Counter[str], began: float) -> None:
    calls, seconds = sum(tally.values()), time.monotonic() - began
    print(
        f"{calls:,} calls, {tally['returned']:,} returned, {tally['refused']:,} refused, {tally['fault']} faults, {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
