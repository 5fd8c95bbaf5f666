"""One recording from those of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchprobe.ops import layout
from torchprobe.ops.observe import merge_states
from torchprobe.recording import windows
from torchprobe.recording.recording import Entry, Recording, Settings, only_moments
from torchprobe.statistics import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class _Summary:
    """What every rank tells the others before any number travels."""

    settings: Settings
    selected: tuple[str, ...]
    layers: tuple[tuple[str, str, int | None, int, bool], ...]  # name, module, feature_dim, features, closed?
    aliases: tuple[tuple[str, str], ...]


def all_reduce(recording: Recording, selected: list[str], group: ProcessGroup | None, union: bool) -> Recording:
    """The states of all ranks, merged in the order of the ranks: the same on every rank."""
    from torch import distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("all_reduce needs torch.distributed: call torch.distributed.init_process_group() first")
    entries = {entry.name: entry for entry in recording._entries()}
    moments = all(isinstance(entry.statistic, Moments) for entry in entries.values())
    mine = _Summary(
        recording.settings,
        tuple(selected),
        tuple((e.name, e.module, e.feature_dim, e.statistic.features, e.closed is not None) for e in entries.values()),
        tuple(recording._aliases.items()),
    )
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, mine if moments else None, group=group)
    if any(rank is None for rank in ranks):
        only_moments([entry.statistic for entry in entries.values()])  # says why, on the rank that is the cause
        raise TypeError("all_reduce merges Moments; another rank recorded another statistic")
    layers = _agreed(ranks, union)
    device = torch.device("cuda", torch.cuda.current_device()) if _on_cuda(dist.get_backend(group)) else torch.device("cpu")
    merged: dict[str, Entry] = {}
    with torch.inference_mode(False), torch.no_grad():
        for width in sorted({features for _, _, features, _ in layers.values()}):
            names = [name for name, layer in layers.items() if layer[2] == width]
            closed = any(layers[name][3] for name in names)
            sent = _stacked([entries.get(name) for name in names], width, closed, device)
            received = [torch.empty_like(sent) for _ in ranks]
            dist.all_gather(received, sent, group=group)
            total = received[0]
            for states in received[1:]:
                total = merge_states(total, states)
            for index, name in enumerate(names):
                merged[name] = _entry(name, layers[name], total[:, index], recording.settings)
    aliases = {alias: name for rank in ranks for alias, name in rank.aliases}
    return Recording([merged[name] for name in layers], recording.settings, aliases)


def _on_cuda(backend: str) -> bool:
    return backend == "nccl"


def _agreed(ranks: list[_Summary], union: bool) -> Mapping[str, tuple[str, int | None, int, bool]]:
    """Every layer that fired anywhere: module, feature_dim, features, closed windows. The same error on every rank."""
    first = ranks[0]
    layers: dict[str, tuple[str, int | None, int, bool]] = {}
    for number, rank in enumerate(ranks):
        if rank.settings != first.settings:
            raise ValueError(f"rank 0 recorded with {first.settings}, rank {number} with {rank.settings}")
        if not union and set(rank.selected) != set(first.selected):
            lacks = sorted(set(first.selected) - set(rank.selected))
            more = sorted(set(rank.selected) - set(first.selected))
            raise ValueError(
                f"the ranks recorded different layers: rank {number} lacks {lacks} and has {more} beside those of rank 0; "
                f"all_reduce(union=True) merges them all the same"
            )
        for name, module, feature_dim, features, closed in rank.layers:
            known = layers.setdefault(name, (module, feature_dim, features, closed))
            if known[2] != features:
                raise ValueError(f"layer {name!r} is {known[2]} features wide on one rank and {features} on rank {number}")
            layers[name] = (*known[:3], known[3] or closed)
    return layers


def _stacked(entries: list[Entry | None], width: int, closed: bool, device: torch.device) -> Tensor:
    """Running windows, and closed ones if any rank has some: (1 or 2, layers, slots); zeros where nothing fired."""
    empty = torch.zeros(layout.size(width), dtype=torch.float64, device=device)
    statistics = [[None if entry is None else entry.statistic for entry in entries]]
    if closed:
        statistics.append([None if entry is None else entry.closed for entry in entries])
    return torch.stack([torch.stack([empty if s is None else s.state.to(empty) for s in part]) for part in statistics])


def _entry(name: str, layer: tuple[str, int | None, int, bool], states: Tensor, settings: Settings) -> Entry:
    module, feature_dim, features, closed = layer
    template = Moments(features, states.device, settings.outlier_sigma)
    window, *rest = [windows.with_state(template, state.clone()) for state in states]
    return Entry(name, module, feature_dim, window, rest[0] if closed and rest else None)
