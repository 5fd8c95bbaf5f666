"""``observe_`` against eager PyTorch, the compiler, and other packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import torchprobe
from benchmarks import allocator, formulas
from benchmarks.inputs import DTYPES, gaussian
from benchmarks.report import Row, Section, Target, versus
from benchmarks.timing import race
from torchprobe.ops import new_state, observe_

MORE = "the same; outliers, quantiles, counts"
PEERS_DO = {"captum": "captum LayerActivation + eager"}


def run(
    device: torch.device,
    seconds: float,
    shape: tuple[int, int] = (12608, 768),
    dtypes: Sequence[str] = tuple(DTYPES),
    compiled: bool = True,
) -> Section:
    """``seconds`` for all types together, compilation not counted."""
    notes = []
    missing = formulas.PEERS.keys() - formulas.installed_peers().keys()
    if missing:
        notes.append(f"Not installed: {', '.join(sorted(missing))}.")
    rows = []
    for name in dtypes:
        x = gaussian(*shape, device=device, dtype=DTYPES[name])
        rows += _rows(f"{shape} {name}", x, seconds / len(dtypes), compiled)
    if allocator.is_tuned():
        notes.append("malloc is tuned so that it keeps its memory: the page faults of a call are what is left.")
    else:
        notes.append("malloc as the system has it: page faults weigh on everything that allocates.")
    return Section(
        name="rivals",
        title="observe_ against eager PyTorch, inductor and other packages",
        rows=rows,
        ratio="× observe_",
        note=" ".join(notes),
        page_faults=True,
    )


def contestants(x: Tensor, recorded: nn.Module, compiled: bool = True) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name → what it computes, and a call that does it once more; ``recorded`` is the identity, under ``torchprobe.record``."""
    features, device = x.shape[1], x.device
    state = new_state(features, device)
    entries: dict[str, tuple[str, Callable[[], object]]] = {
        "eager": (formulas.ALL, partial(formulas.eager, x)),
    }
    if compiled:
        entries["inductor"] = (formulas.ALL, partial(torch.compile(formulas.eager, fullgraph=True, dynamic=False), x))
    entries["observe_"] = (MORE, partial(observe_, state, x))
    entries["torchprobe.record"] = (MORE, partial(recorded, x))
    for name, make in formulas.installed_peers().items():
        peer = make(features, device)
        entries[PEERS_DO.get(name, name)] = (peer.computes, partial(peer.update, x))
    entries["torch.var_mean"] = ("mean, variance", partial(formulas.mean_and_variance, x))
    entries["x.sum()"] = ("one sum", x.sum)
    return entries


def _rows(case: str, x: Tensor, seconds: float, compiled: bool) -> list[Row]:
    model = nn.Sequential(nn.Identity())
    with torchprobe.record(model, "0"):
        entries = contestants(x, model, compiled)
        times = race({name: call for name, (_, call) in entries.items()}, seconds, x.device)
    ours = times["observe_"]
    faster = {"eager": 15, "inductor": 4}
    rows = []
    for name, (computes, _) in entries.items():
        ratios = versus(times[name], ours)
        target = Target("× observe_", ratios["ratio"], faster[name], at_least=True) if name in faster else None
        rows.append(Row(case, name, times[name], **ratios, computes=computes, target=target))
    return rows
