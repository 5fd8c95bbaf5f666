"""``python -m fuzz.states [--cases N] [--seed S]``: damaged ``state_dict``s for a recorder and every statistic.

A damaged state is refused with ``ValueError``, and leaves the object bit for bit as it was; or it is taken, and then what is read from it
is plausible to the statistic itself. Anything else is a fault.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.statistics import Moments, Norms, Quantile, Saturation, Several, Sparsity, Statistic, TopInputs
from torchprobe.statistics.saved import holds_numbers

_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 1 << 31, 1 << 62, 10**30, 10**400, -0.5, math.nan, math.inf, -math.inf),
    *("", "x", "1/3", b"x", [], {}, (), [1], {"a": 1}, object()),
    *(torch.tensor(3), torch.zeros(0), torch.zeros(3), torch.full((3,), math.nan), torch.zeros(1).expand(1 << 40)),
)
_FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.5, 1e9, 1e300, -1e300)
_WHOLE = (-(1 << 62), -1, 1 << 40, (1 << 62) + 1)

Target = tuple[Callable[[], Any], Callable[[Any], None]]  # makes an object; uses it


def damaged(state: Any, rng: random.Random) -> Any:
    """A copy of a state with one to three changes."""
    state = copy.deepcopy(state)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(state))
        if not places:
            return rng.choice(_VALUES)
        holder, key = rng.choice(places)
        change = rng.choice((_replace, _replace, _remove, _add, _element, _element, _element, _reshape))
        change(holder, key, rng)
    return state


def _places(state: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(state, (dict, list)):
        for key in state if isinstance(state, dict) else range(len(state)):
            yield state, key
            yield from _places(state[key])


def _replace(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = rng.choice(_VALUES)


def _remove(holder: Any, key: Any, rng: random.Random) -> None:
    del holder[key]


def _add(holder: Any, key: Any, rng: random.Random) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(("new", 3, None, f"{key}x"))] = holder[key]
    else:
        holder.append(holder[key])


def _element(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    if isinstance(value, Tensor):
        if not value.numel() or not value.is_contiguous() or not holds_numbers(value):
            return
        flat = value.view(-1)
        new: float = rng.choice(_FLOATS) if value.is_floating_point() else rng.choice(_WHOLE) if value.dtype == torch.int64 else 255
        flat[rng.randrange(len(flat))] = torch.tensor(new, dtype=torch.float64).to(value.dtype) if value.is_floating_point() else new
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice(_FLOATS + _WHOLE)
    else:
        holder[key] = rng.choice(_VALUES)


def _reshape(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    if holds_numbers(value):
        changes: tuple[Callable[[Tensor], Any], ...] = (
            lambda x: x[..., None],
            lambda x: x[:0] if x.dim() else x,
            lambda x: x.to(rng.choice((torch.int32, torch.complex64, torch.bool, torch.float16))),
            lambda x: x.to("meta"),
            lambda x: x.reshape(-1).to_sparse(),
            lambda x: torch.cat([x.reshape(-1)] * 2),
            lambda x: rng.choice((x.tolist, x.numpy))(),
            _freed,
        )
        holder[key] = rng.choice(changes)(value)


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _recorder() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 5))
    recorder = torchprobe.record(model, ["0", "2"])
    with recorder:
        for step in range(2):
            model(torch.randn(6, 4))
            recorder.snapshot(step)
        model(torch.randn(6, 4))
    recorder.model = model  # a recorder does not keep it
    return recorder


def _statistic(make: Callable[[], Statistic]) -> Callable[[], Any]:
    def made() -> Any:
        torch.manual_seed(0)
        statistic = make()
        for _ in range(3):
            statistic.update(torch.randn(9, 4))
        return statistic

    return made


def _read_recorder(recorder: Any) -> None:
    recorder.rows(), recorder.metrics(), recorder.history.rows(), recorder.total.rows(), repr(recorder)


def _read_statistic(statistic: Any) -> None:
    statistic.summary(), repr(statistic), statistic.clone().merge(statistic), statistic.state_dict()
    if problem := statistic.problem():
        raise AssertionError(f"a state was taken that is damaged: {problem}")


TARGETS: dict[str, Target] = {
    "Recorder": (_recorder, _read_recorder),
    "Moments": (_statistic(lambda: Moments(4)), _read_statistic),
    "Quantile": (_statistic(lambda: Quantile(4, quantile=0.3)), _read_statistic),
    "Quantile, a sketch": (_statistic(lambda: Quantile(4, quantile=0.3, memory=16 * 180)), _read_statistic),
    "TopInputs": (_statistic(lambda: TopInputs(4, k=3)), _read_statistic),
    "Norms": (_statistic(lambda: Norms(4)), _read_statistic),
    "Sparsity": (_statistic(lambda: Sparsity(4)), _read_statistic),
    "Saturation": (_statistic(lambda: Saturation(4)), _read_statistic),
    "Several": (_statistic(lambda: Several([Moments(4), TopInputs(4, k=2), Norms(4)])), _read_statistic),
}


def equal(a: Any, b: Any) -> bool:
    """Whether two states are bit for bit the same."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def run(name: str, cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Loads damaged states: how many were refused and taken, and the faults."""
    make, read = TARGETS[name]
    target, tally, faults = make(), Counter[str](), list[str]()
    right = target.state_dict()
    for number in range(cases):
        rng = random.Random(f"{name}/{seed}/{number}")
        state = damaged(right, rng)
        try:
            try:
                target.load_state_dict(state)
            except ValueError:
                tally["refused"] += 1
                if not equal(target.state_dict(), right):
                    faults.append(f"{name} {number}: refused, and changed\n{traceback.format_exc()}")
                    target = make()
            else:
                tally["taken"] += 1
                read(target)
                target.load_state_dict(right)
        except Exception:
            faults.append(f"{name} {number}:\n{traceback.format_exc()}")
            target = make()
    return tally, faults


def main() -> int:
    parser = argparse.ArgumentParser("python -m fuzz.states", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = 0
    for name in TARGETS:
        tally, faults = run(name, arguments.cases, arguments.seed)
        print(f"{name:<20} {tally['refused']:>7,} refused, {tally['taken']:>7,} taken, {len(faults)} faults", flush=True)
        kinds = Counter(fault.splitlines()[-1][:100] for fault in faults)
        for kind, count in kinds.most_common(8):
            first = next(fault for fault in faults if fault.splitlines()[-1][:100] == kind)
            print(f"  {count} × {kind}\n{first}", flush=True)
        found += len(faults)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
