"""One recording from those of all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchprobe.ops import layout
from torchprobe.ops.observe import merge_states
from torchprobe.recording import windows
from torchprobe.recording.recording import Entry, Recording, Settings, only_moments
from torchprobe.statistics import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_GATHERED = 1 << 28  # bytes that a rank receives at a time


@dataclass(frozen=True)
class _Layer:
    """What a rank tells of one of its layers."""

    module: str
    feature_dim: int | None
    features: int
    closed: bool  # whether it has closed windows


@dataclass(frozen=True)
class _Summary:
    """What every rank tells the others before any number travels."""

    moments: bool
    settings: Settings
    selected: list[str]
    layers: dict[str, _Layer]
    aliases: dict[str, str]

    @classmethod
    def from_json(cls, text: str) -> _Summary:
        parts = json.loads(text)
        parts["settings"] = Settings(**parts["settings"])
        parts["layers"] = {name: _Layer(**layer) for name, layer in parts["layers"].items()}
        return cls(**parts)


def all_reduce(recording: Recording, selected: list[str], group: ProcessGroup | None, union: bool, timeout: float | None) -> Recording:
    """The states of all ranks, merged in the order of the ranks: the same on every rank."""
    ranks = _Ranks(group, timeout)
    entries = {entry.name: entry for entry in recording._entries()}
    mine = _Summary(
        all(isinstance(entry.statistic, Moments) for entry in entries.values()),
        recording.settings,
        selected,
        {e.name: _Layer(e.module, e.feature_dim, e.statistic.features, e.closed is not None) for e in entries.values()},
        dict(recording._aliases),
    )
    summaries = [_Summary.from_json(text) for text in ranks.gather_text(json.dumps(asdict(mine)))]
    if not all(summary.moments for summary in summaries):
        only_moments([entry.statistic for entry in entries.values()])  # says why, on the rank that is the cause
        raise TypeError("all_reduce merges Moments; another rank recorded another statistic")
    layers = _agreed(summaries, union)
    merged: dict[str, Entry] = {}
    with torch.inference_mode(False), torch.no_grad():
        for width in sorted({layer.features for layer in layers.values()}):
            alike = [name for name, layer in layers.items() if layer.features == width]
            at_once = max(1, _GATHERED // (2 * 8 * layout.size(width) * ranks.count))
            for start in range(0, len(alike), at_once):
                names = alike[start : start + at_once]
                closed = any(layers[name].closed for name in names)
                first, *rest = ranks.gather(_stacked([entries.get(name) for name in names], width, closed, ranks.device))
                for states in rest:
                    first = merge_states(first, states)
                for index, name in enumerate(names):
                    merged[name] = _entry(name, layers[name], first[:, index], recording.settings)
    aliases = {alias: name for summary in summaries for alias, name in summary.aliases.items()}
    return Recording([merged[name] for name in layers], recording.settings, aliases)


class _Ranks:
    """The other processes. Every wait has an end, and tells what it means."""

    def __init__(self, group: ProcessGroup | None, timeout: float | None) -> None:
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError("all_reduce needs torch.distributed: call torch.distributed.init_process_group() first")
        self.distributed, self.group, self.timeout = distributed, group, timeout
        self.rank, self.count = distributed.get_rank(group), distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not among the ranks of the group: call all_reduce on those that are")
        on_cuda = distributed.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def gather(self, sent: Tensor) -> list[Tensor]:
        """A tensor of each rank, all of one shape, in their order.

        Raises:
            RuntimeError: a rank has ended, or did not come in time.
        """
        received = [torch.empty_like(sent) for _ in range(self.count)]
        try:
            work = self.distributed.all_gather(received, sent, group=self.group, async_op=True)
            assert work is not None
            if self.timeout is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            limit = "" if self.timeout is None else f" (it waits {self.timeout:g} s)"
            raise RuntimeError(
                f"all_reduce: rank {self.rank} of {self.count} had no answer from the others{limit}. A rank has ended, or does "
                f"not call all_reduce(); the first error of the run says which. This process group is of no use any more: end "
                f"this process, start all of them again (torchrun does), and resume from the last checkpoint. "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        return received

    def gather_text(self, text: str) -> list[str]:
        """A text of each rank."""
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = [int(n) for n in torch.cat(self.gather(torch.tensor([len(own)], device=self.device))).tolist()]
        sent = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        sent[: len(own)] = own.to(self.device)
        gathered = torch.stack(self.gather(sent)).cpu().numpy()
        return [bytes(row[:n]).decode() for row, n in zip(gathered, lengths, strict=True)]


def _agreed(ranks: list[_Summary], union: bool) -> Mapping[str, _Layer]:
    """Every layer that fired anywhere. The same error on every rank."""
    first = ranks[0]
    layers: dict[str, _Layer] = {}
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
        for name, layer in rank.layers.items():
            known = layers.setdefault(name, layer)
            if known.features != layer.features:
                raise ValueError(f"layer {name!r} is {known.features} features wide on one rank and {layer.features} on rank {number}")
            layers[name] = _Layer(known.module, known.feature_dim, known.features, known.closed or layer.closed)
    return layers


def _stacked(entries: list[Entry | None], width: int, closed: bool, device: torch.device) -> Tensor:
    """Running windows, and closed ones if any rank has some: (1 or 2, layers, slots); zeros where nothing fired."""
    empty = torch.zeros(layout.size(width), dtype=torch.float64, device=device)
    statistics = [[None if entry is None else entry.statistic for entry in entries]]
    if closed:
        statistics.append([None if entry is None else entry.closed for entry in entries])
    return torch.stack([torch.stack([empty if s is None else s.state.to(empty) for s in part]) for part in statistics])


def _entry(name: str, layer: _Layer, states: Tensor, settings: Settings) -> Entry:
    template = Moments(layer.features, states.device, settings.outlier_sigma)
    window, *rest = [windows.with_state(template, state.clone()) for state in states]
    return Entry(name, layer.module, layer.feature_dim, window, rest[0] if layer.closed and rest else None)
