"""Merges the recordings of all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from torchprobe.recording.windows import Entry, Settings, merged
from torchprobe.statistics import Statistic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_AT_ONCE = 1 << 26  # bytes that a rank sends at a time, unless a single layer has more


@dataclass(frozen=True)
class _Layer:
    """One layer of a rank."""

    module: str
    feature_dim: int | None
    features: int
    closed: bool  # whether it has closed windows
    size: int  # bytes of its state
    feature_dim_by: str
    of: str


@dataclass(frozen=True)
class _Summary:
    """What the ranks exchange before any state."""

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


def all_reduce(
    entries: Sequence[Entry],
    settings: Settings,
    selected: Sequence[str],
    aliases: Mapping[str, str],
    make: Callable[[int, torch.device], Statistic],
    group: ProcessGroup | None,
    union: bool,
    timeout: float | None,
) -> tuple[list[Entry], dict[str, str]]:
    """The layers of all ranks, merged in the order of the ranks, on the CPU, and all aliases. The result is the same on every rank.

    Args:
        entries: the layers of this rank that fired.
        selected: the layers that this rank watches.
        make: makes an empty statistic for a width.
        group, union, timeout: see :meth:`torchprobe.Recorder.all_reduce`.
    """
    ranks = _Ranks(group, timeout)
    mine = {entry.name: _to_bytes(entry) for entry in entries}
    layers = {
        e.name: _Layer(e.module, e.feature_dim, e.statistic.features, e.closed is not None, len(mine[e.name]), e.feature_dim_by, e.of)
        for e in entries
    }
    summary = _Summary(settings, list(selected), layers, dict(aliases))
    summaries = [_Summary.from_json(text.decode()) for text in ranks.gather_bytes(json.dumps(asdict(summary)).encode())]
    agreed = _agreed(summaries, union)
    result: list[Entry] = []
    for names in _batches(agreed, summaries):
        gathered = ranks.gather_bytes(b"".join(mine.get(name, b"") for name in names))
        states: dict[str, list[bytes]] = {name: [] for name in names}
        for summary, received in zip(summaries, gathered, strict=True):
            start = 0
            for name in names:
                if name in summary.layers:
                    states[name].append(received[start : start + summary.layers[name].size])
                    start += summary.layers[name].size
        result += [_merged(name, agreed[name], states[name], make) for name in names]
    return result, {alias: name for summary in summaries for alias, name in summary.aliases.items()}


def gather(sent: bytes, group: ProcessGroup | None, timeout: float | None) -> list[bytes]:
    """What each rank sends, in the order of the ranks. Collective; arguments as in :meth:`torchprobe.Recorder.all_reduce`."""
    return _Ranks(group, timeout).gather_bytes(sent)


def _to_bytes(entry: Entry) -> bytes:
    """The state of one layer: the length of a JSON text, the text, and a safetensors file in memory."""
    tensors, values = dict[str, Tensor](), dict[str, Any]()
    for prefix, statistic in (("window/", entry.statistic), ("closed/", entry.closed)):
        for key, value in ({} if statistic is None else statistic.state_dict()).items():
            if isinstance(value, Tensor):
                tensors[prefix + key] = value.detach().cpu().contiguous()
            else:
                values[prefix + key] = value
    text = json.dumps({**values, "calls": entry.calls}).encode()
    return len(text).to_bytes(8, "little") + text + save(tensors)


def _merged(name: str, layer: _Layer, states: Sequence[bytes], make: Callable[[int, torch.device], Statistic]) -> Entry:
    """One layer, from the bytes of each rank that has it."""
    windows, closed, calls = list[Statistic](), list[Statistic](), 0
    for state in states:
        end = 8 + int.from_bytes(state[:8], "little")
        values = {**json.loads(state[8:end]), **load(state[end:])}
        calls += values.pop("calls")
        for prefix, statistics in (("window/", windows), ("closed/", closed)):
            part = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            if part:
                statistics.append(make(layer.features, torch.device("cpu")))
                try:
                    statistics[-1].load_state_dict(part)
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error
    window = merged(windows)
    assert window is not None
    return Entry(name, layer.module, layer.feature_dim, window, merged(closed), calls, layer.feature_dim_by, layer.of)


def _batches(layers: Mapping[str, _Layer], summaries: Sequence[_Summary]) -> list[list[str]]:
    """The layers in batches that are sent together. They are the same on every rank."""
    batches, room = list[list[str]](), 0
    for name in layers:
        size = max(summary.layers[name].size for summary in summaries if name in summary.layers)
        if not batches or size > room:
            batches, room = [*batches, []], _AT_ONCE
        batches[-1].append(name)
        room -= size
    return batches


class _Ranks:
    """The other processes. A wait ends with an error that says what it means."""

    def __init__(self, group: ProcessGroup | None, timeout: float | None) -> None:
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError("asking all ranks needs torch.distributed: call torch.distributed.init_process_group() first")
        self.distributed, self.group, self.timeout = distributed, group, timeout
        self.rank, self.count = distributed.get_rank(group), distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not among the ranks of the group: call all_reduce on those that are")
        on_cuda = distributed.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def gather(self, sent: Tensor) -> list[Tensor]:
        """The tensors of all ranks in their order, all of the same shape.

        Raises:
            RuntimeError: a rank has ended, or did not call this in time.
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
                f"all_reduce: rank {self.rank} of {self.count} got no answer from the others{limit}. A rank has ended, or did "
                f"not call all_reduce(); the first error of the run says which. This process group is unusable now: end this "
                f"process, start all processes again (torchrun does), and resume from the last checkpoint. "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        return received

    def gather_bytes(self, sent: bytes) -> list[bytes]:
        """The bytes of each rank, of any length."""
        lengths = [int(n) for n in torch.cat(self.gather(torch.tensor([len(sent)], device=self.device))).tolist()]
        padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device="cpu")
        if sent:
            padded[: len(sent)] = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
        gathered = self.gather(padded.to(self.device))
        return [part.cpu().numpy()[:n].tobytes() for part, n in zip(gathered, lengths, strict=True)]


def _agreed(ranks: Sequence[_Summary], union: bool) -> dict[str, _Layer]:
    """Every layer that fired on any rank. If the ranks do not fit together, all raise the same error."""
    first = ranks[0]
    layers: dict[str, _Layer] = {}
    for number, rank in enumerate(ranks):
        if rank.settings != first.settings:
            raise ValueError(f"rank 0 recorded with {first.settings}, rank {number} with {rank.settings}")
        if not union and set(rank.selected) != set(first.selected):
            lacks = sorted(set(first.selected) - set(rank.selected))
            more = sorted(set(rank.selected) - set(first.selected))
            raise ValueError(
                f"the ranks recorded different layers: rank {number} lacks {lacks} and has {more} in addition to those of rank 0; "
                f"all_reduce(union=True) merges them anyway"
            )
        for name, layer in rank.layers.items():
            known = layers.setdefault(name, layer)
            if known.features != layer.features:
                raise ValueError(f"layer {name!r} is {known.features} features wide on one rank and {layer.features} on rank {number}")
    return layers
