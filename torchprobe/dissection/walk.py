"""One pass over all images: shared by ranks, saved now and then, resumed, and merged at the end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from torchprobe.common import storage
from torchprobe.common.files import replacing
from torchprobe.common.ranks import Ranks

_KIND = "torchprobe.dissection.walk"
_SETTINGS = "settings.json"
_FILES = r"(presence|(thresholds|overlap)-(rank|rows-)[\d-]+)\.safetensors"
_TORN = rf"\.({_FILES}|settings\.json)\.\d+\.part"  # what an interruption leaves of a file being written


class Mergeable(Protocol):
    """What a walk keeps: a statistic that can be saved and added to another of its kind."""

    def merge(self, other: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Checkpoint:
    """A folder, seen by all ranks, from which an interrupted dissection goes on.

    Args:
        folder: made if it is not there.
        settings: what the dissection was started with; only the same can go on.
        resume: go on with what is there. Otherwise there may be nothing.
        every: seconds between two savings.

    Raises:
        ValueError: the folder holds a dissection, and it is not to be resumed, or had other settings; the message says which.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume: bool, every: float, ranks: Ranks) -> None:
        self.folder, self.every = folder, every
        problem = self._prepare(settings, resume) if ranks.first else None
        if problem := ranks.from_first(problem):
            raise ValueError(problem)

    def _prepare(self, settings: Mapping[str, Any], resume: bool) -> str | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for torn in [path for path in self.folder.iterdir() if re.fullmatch(_TORN, path.name)]:
            torn.unlink()
        path = self.folder / _SETTINGS
        if path.exists():
            if not resume:
                return f"{self.folder} holds a dissection already: resume it (resume=True), or delete the folder"
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                return f"{path} is damaged ({error}): delete the folder to start anew"
            now = json.loads(json.dumps(settings))
            if other := [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]:
                key = min(other)
                return f"{self.folder} was started with another {key}: {before.get(key)!r}, now it is {now.get(key)!r}"
            return None
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return None


def clear_checkpoint(folder: Path) -> None:
    """Deletes what checkpoints left in a folder, and the folder if nothing else is in it."""
    for path in [*folder.iterdir()]:
        if path.name == _SETTINGS or re.fullmatch(_FILES, path.name) or re.fullmatch(_TORN, path.name):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


class Rows:
    """One vector for each image: float32 (images, width), filled batch by batch; memory that is not filled costs nothing."""

    def __init__(self, images: int, width: int) -> None:
        self.values = torch.zeros(images, width)

    def put(self, first: int, values: Tensor) -> None:
        self.values[first : first + len(values)] = values.detach().cpu()


class Walk:
    """A pass over ``batches`` batches of ``size`` images, of which :meth:`mine` are for this rank: show them to ``statistics``, which
    ``make`` makes, and fill ``rows``; then call :meth:`finished`.

    Saved are the statistics together with the batches they have seen, in one file a rank, so each file is right by itself. Rows are saved
    apart, only those that are new: they are the same whenever they are computed, so it does not matter if some are there twice.
    """

    def __init__(
        self,
        name: str,
        make: Mapping[str, Callable[[], Mergeable]],
        rows: Mapping[str, Rows],
        batches: int,
        size: int,
        ranks: Ranks,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.name, self.rows, self.size, self.ranks, self.checkpoint = name, dict(rows), size, ranks, checkpoint
        self._make = dict(make)
        self.statistics = {key: empty() for key, empty in self._make.items()}
        self.done = torch.zeros(batches, dtype=torch.bool)
        self._new: list[int] = []  # batches whose rows no file has
        self._computed: list[int] = []  # batches of this run
        self._saved = time.monotonic()
        if checkpoint is not None:
            if ranks.first:
                self._load(checkpoint.folder)
            everything = ranks.from_first(self.done)
            self._left: list[int] = (~everything).nonzero().flatten().tolist()
        else:
            self._left = list(range(batches))

    # -- the walk ------------------------------------------------------------------------------------------------------

    def mine(self) -> list[int]:
        """The batches left for this rank."""
        return self._left[self.ranks.rank :: self.ranks.size]

    def finished(self, batch: int) -> None:
        """Call it when all statistics have seen a batch."""
        self.done[batch] = True
        self._new.append(batch)
        self._computed.append(batch)
        if self.checkpoint is not None and time.monotonic() - self._saved >= self.checkpoint.every:
            self.save()

    def merge(self) -> None:
        """At the end: everything to the first rank, which saves it."""
        if self.checkpoint is not None:
            self.save()
        if self.ranks.size > 1:
            mine = None if self.ranks.first else self._message()
            for done, states, rows in self.ranks.to_first(mine):
                self._absorb(done, states)
                for key, (batches, values) in rows.items():
                    self._put(key, batches, values)
        if self.checkpoint is not None:
            if self.ranks.first:
                self.save()
                self._remove_others(self.checkpoint.folder)
            self.ranks.barrier()

    def _message(self) -> tuple[Tensor, dict[str, dict[str, Any]], dict[str, tuple[list[int], Tensor]]]:
        states = {key: _on_cpu(statistic.state_dict()) for key, statistic in self.statistics.items()}
        return self.done, states, {key: (self._computed, self._take(key, self._computed)) for key in self.rows}

    def _absorb(self, done: Tensor, states: Mapping[str, Mapping[str, Any]]) -> None:
        for key, state in states.items():
            other = self._make[key]()
            other.load_state_dict(state)
            self.statistics[key].merge(other)
        self.done |= done

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _take(self, key: str, batches: list[int]) -> Tensor:
        values = self.rows[key].values
        return torch.cat([values[b * self.size : (b + 1) * self.size] for b in batches] or [values[:0]])

    def _put(self, key: str, batches: list[int], values: Tensor) -> None:
        at = 0
        for batch in batches:
            length = min(self.size, len(self.rows[key].values) - batch * self.size)
            self.rows[key].put(batch * self.size, values[at : at + length])
            at += length
        if at != len(values):
            raise ValueError(f"{len(values)} rows for batches that have {at}")

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state of this rank."""
        assert self.checkpoint is not None
        folder = self.checkpoint.folder
        if self.rows and self._new:
            # No two batches are computed by two ranks of one run, so the names of the files differ.
            rows = {key: self._take(key, self._new) for key in self.rows}
            storage.write(folder / f"{self.name}-rows-{self._new[0]}-{self._new[-1]}.safetensors", _KIND, rows, {"batches": self._new})
        self._new = []
        tensors: dict[str, Tensor] = {"done": self.done}
        values: dict[str, dict[str, Any]] = {}
        for key, statistic in self.statistics.items():
            state = statistic.state_dict()
            tensors |= {f"{key}/{part}": value for part, value in state.items() if isinstance(value, Tensor)}
            values[key] = {part: value for part, value in state.items() if not isinstance(value, Tensor)}
        storage.write(folder / f"{self.name}-rank{self.ranks.rank}.safetensors", _KIND, tensors, values)
        self._saved = time.monotonic()

    def _load(self, folder: Path) -> None:
        """On the first rank: what all ranks of earlier runs saved, as one file before anything else is written."""
        files = [storage.File(path, _KIND) for path in self._files(folder)]
        states = [(file.tensor("done", torch.bool, (len(self.done),)), file) for file in files]
        for done, file in sorted(states, key=lambda pair: -int(pair[0].sum())):
            if bool((done & self.done).any()):
                if bool((done & ~self.done).any()):
                    raise ValueError(f"{file.path} has seen batches that another file of the folder has seen too: delete the folder")
                continue  # merged into a larger one already, just before the interruption
            self._absorb(done, {key: _state(file, key) for key in self.statistics})
        if not files:
            return
        self.save()
        self._remove_others(folder)
        for path in folder.glob(f"{self.name}-rows-*.safetensors"):
            file = storage.File(path, _KIND)
            batches = file.value("batches", list)
            if not all(isinstance(b, int) and 0 <= b < len(self.done) for b in batches):
                raise file.error("batches", f"batches are numbered 0 to {len(self.done) - 1}")
            for key, rows in self.rows.items():
                self._put(key, batches, file.tensor(key, torch.float32, (None, rows.values.shape[1])))

    def _files(self, folder: Path) -> Iterator[Path]:
        return (path for path in folder.glob(f"{self.name}-rank*.safetensors") if re.fullmatch(r".*-rank\d+\.safetensors", path.name))

    def _remove_others(self, folder: Path) -> None:
        for path in self._files(folder):
            if path.name != f"{self.name}-rank0.safetensors":
                path.unlink()


def _state(file: storage.File, key: str) -> dict[str, Any]:
    tensors = {name.removeprefix(f"{key}/"): file.tensor(name) for name in file.keys if name.startswith(f"{key}/")}
    return {**file.value(key, dict), **tensors}


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
