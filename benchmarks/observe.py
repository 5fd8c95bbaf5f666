"""The operator ``observe_``: against one read of the tensor, against other ways to the same numbers, and as one hook."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import torchprobe
from benchmarks import formulas
from benchmarks.report import Row, Section, Target, versus
from benchmarks.timing import DTYPES, gaussian, malloc_is_tuned, race
from torchprobe.ops import new_state, observe_

# -- read: against x.sum(), which reads the tensor once and adds it up -----------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One shape in one layout, with the target and the hard limit for the ratio in float32."""

    shape: tuple[int, ...]
    layout: str = ""
    feature_dim: int = -1
    target: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        return f"{self.shape} {self.layout}".rstrip()

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        x = gaussian(*self.shape, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


CASES = (
    Case((12608, 768), target=1.3, limit=1.9),
    Case((78800, 768), target=1.15, limit=1.5),
    Case((64, 256, 28, 28), "channel-major", feature_dim=1, target=1.5, limit=2),
    Case((64, 256, 28, 28), "channels_last", feature_dim=1),
    Case((4096, 768), "in cache"),
)


def read(device: torch.device, seconds: float, cases: Sequence[Case] = CASES) -> Section:
    """``seconds`` for all cases together."""
    return Section(
        name="read",
        title="observe_ against x.sum()",
        rows=[row for case in cases for row in _read(case, device, seconds / len(cases))],
        ratio="× x.sum()",
        note="GB/s: the bytes of x over the median. In cache: x stays in the last-level cache, so mostly the arithmetic is left.",
    )


def _read(case: Case, device: torch.device, seconds: float) -> list[Row]:
    bytes_of: dict[str, int] = {}
    contestants: dict[str, Callable[[], object]] = {}
    for name, dtype in DTYPES.items():
        x = case.tensor(dtype, device)
        state = new_state(x.shape[case.feature_dim], device)
        bytes_of[name] = x.nbytes
        contestants[f"x.sum(), {name}"] = x.sum
        contestants[f"observe_, {name}"] = partial(observe_, state, x, case.feature_dim)
    times = race(contestants, seconds, device)
    rows = []
    for name in DTYPES:
        for what in ("x.sum()", "observe_"):
            timing, baseline = times[f"{what}, {name}"], times[f"x.sum(), {name}"]
            target = None
            if what == "observe_" and name == "float32" and case.target:
                target = Target("× x.sum()", timing.median / baseline.median, case.target, case.limit)
            elif what == "observe_" and name == "bfloat16":
                target = Target("× float32", timing.median / times["observe_, float32"].median, 1)
            row = Row(str(case), f"{what}, {name}", timing, gigabytes_per_second=bytes_of[name] / timing.median / 1e9, target=target)
            rows.append(row if what == "x.sum()" else replace(row, **versus(timing, baseline)))
    return rows


# -- wide: what an element takes at every width, against width 768 -------------------------------------------------------

WIDTHS = (768, 4096, 4097, 8192, 32_000, 50_257, 151_936)
LOGITS = 50_257
"""The width whose elements should take at most 0.45 ns on one thread."""


def wide(device: torch.device, seconds: float, elements: int = 256 * LOGITS, widths: Sequence[int] = WIDTHS) -> Section:
    """About ``elements`` of float32 at each width, on one thread; by default 51 MB, as the logits of 256 tokens of GPT-2."""
    inputs = {width: gaussian(max(elements // width, 1), width, device=device) for width in widths}
    calls: dict[int, Callable[[], object]] = {width: partial(observe_, new_state(width, device), x) for width, x in inputs.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = race(
            {f"{what} {width}": call for width, x in inputs.items() for what, call in (("o", calls[width]), ("s", x.sum))}, seconds, device
        )
    finally:
        torch.set_num_threads(threads)
    rows = []
    for width, x in inputs.items():
        case = str(tuple(x.shape))
        sums, ours, narrow = (
            times[name].per(n)
            for name, n in ((f"s {width}", x.numel()), (f"o {width}", x.numel()), (f"o {widths[0]}", inputs[widths[0]].numel()))
        )
        ratios = versus(ours, narrow)
        target = Target("× the first width", ratios["ratio"], 1, 1.3)
        if width == LOGITS:
            target = Target("ns", ours.median * 1e9, 0.45)
        rows += [Row(case, "x.sum()", sums), Row(case, "observe_", ours, **ratios, target=target if width != widths[0] else None)]
    return Section(
        name="wide",
        title="an element of wide vectors, on one thread",
        rows=rows,
        ratio=f"× width {widths[0]}",
        note="Few wide vectors also read and write their state: about 120 bytes for each feature, as much as 30 elements.",
        unit="ns",
        scale=1e9,
    )


# -- rivals: against eager PyTorch, the compiler, and other packages -------------------------------------------------------

MORE = "the same; outliers, quantiles, counts"
FASTER_THAN = {"eager": 15, "inductor": 4}
"""How many times as long as ``observe_`` these should take at least."""


def rivals(
    device: torch.device,
    seconds: float,
    shape: tuple[int, int] = (12608, 768),
    dtypes: Sequence[str] = tuple(DTYPES),
    compiled: bool = True,
) -> Section:
    """``seconds`` for all types together, without the compilation."""
    rows = []
    for name in dtypes:
        x = gaussian(*shape, device=device, dtype=DTYPES[name])
        rows += _rivals(f"{shape} {name}", x, seconds / len(dtypes), compiled)
    missing = formulas.PEERS.keys() - formulas.installed_peers().keys()
    note = f"Not installed: {', '.join(sorted(missing))}. " if missing else ""
    if malloc_is_tuned():
        note += "malloc is tuned to keep its memory, so calls cause few page faults."
    else:
        note += "malloc has the system's settings, so page faults slow down everything that allocates."
    title = "observe_ against eager PyTorch, inductor and other packages"
    return Section(name="rivals", title=title, rows=rows, ratio="× observe_", note=note, page_faults=True)


def contestants(x: Tensor, recorded: nn.Module, compiled: bool = True) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name → what it computes, and a call that does it once more; ``recorded`` is the identity, under ``torchprobe.record``."""
    features, device = x.shape[1], x.device
    entries: dict[str, tuple[str, Callable[[], object]]] = {"eager": (formulas.ALL, partial(formulas.eager, x))}
    if compiled:
        entries["inductor"] = (formulas.ALL, partial(torch.compile(formulas.eager, fullgraph=True, dynamic=False), x))
    entries["observe_"] = (MORE, partial(observe_, new_state(features, device), x))
    entries["torchprobe.record"] = (MORE, partial(recorded, x))
    for make in formulas.installed_peers().values():
        peer = make(features, device)
        entries[peer.name] = (peer.computes, partial(peer.update, x))
    entries["torch.var_mean"] = ("mean, variance", partial(formulas.mean_and_variance, x))
    entries["x.sum()"] = ("one sum", x.sum)
    return entries


def _rivals(case: str, x: Tensor, seconds: float, compiled: bool) -> list[Row]:
    model = nn.Sequential(nn.Identity())
    with torchprobe.record(model, "0"):
        entries = contestants(x, model, compiled)
        times = race({name: call for name, (_, call) in entries.items()}, seconds, x.device)
    rows = []
    for name, (computes, _) in entries.items():
        ratios = versus(times[name], times["observe_"])
        target = Target("× observe_", ratios["ratio"], FASTER_THAN[name], at_least=True) if name in FASTER_THAN else None
        rows.append(Row(case, name, times[name], **ratios, computes=computes, target=target))
    return rows


# -- hook: a model that does nothing, on one vector, so that only the overhead is left -------------------------------------


def hook(device: torch.device, seconds: float, layers: int = 12, features: int = 768) -> Section:
    """Each figure is of one layer of ``layers``. As many layers have as many states, which must all pass through the cache."""
    x = gaussian(1, features, device=device)
    states = [new_state(features, device) for _ in range(layers)]
    plain = nn.Sequential(*[nn.Identity() for _ in range(layers)])
    hooked, recorded = copy.deepcopy(plain), copy.deepcopy(plain)
    for module in hooked:
        module.register_forward_hook(_empty)
    calls: dict[str, Callable[[], object]] = {
        "plain": partial(plain, x),
        "hooked": partial(hooked, x),
        "recorded": partial(recorded, x),
        "operator": partial(_observe_all, states, x),
    }
    with torchprobe.record(recorded, "*"):
        per = {name: timing.per(layers) for name, timing in race(calls, seconds, device).items()}
    added = per["recorded"].minus(per["plain"])
    case = f"(1, {features}), of {layers} layers"
    return Section(
        name="hook",
        title="the cost of one hook",
        rows=[
            Row(case, "nn.Identity, no hook", per["plain"]),
            Row(case, "+ an empty Python hook", per["hooked"].minus(per["plain"])),
            Row(case, "+ torchprobe.record", added, target=Target("µs", added.median * 1e6, 10)),
            Row(case, "observe_ on its own", per["operator"]),
        ],
        note="+: what is added to the plain call; the median of the differences in each round.",
        unit="µs",
        scale=1e6,
    )


def _empty(module: nn.Module, args: object, output: object) -> None:
    return None


def _observe_all(states: list[Tensor], x: Tensor) -> None:
    for state in states:
        observe_(state, x)
