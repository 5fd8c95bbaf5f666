"""One pass over all images: shared by ranks, saved at intervals, resumed, and merged at the end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from torchprobe.common import storage
from torchprobe.common.files import replacing
from torchprobe.common.ranks import Ranks
from torchprobe.dissection.spool import Spool

_KIND = "torchprobe.dissection.walk"
_SETTINGS = "settings.json"
_FILES = r"((thresholds|overlap|labeler|words)-(rank|rows-)[\d-]+|maps-[\d-]+)\.safetensors"
_TORN = rf"\.({_FILES}|settings\.json)\.\d+\.part|\.tmp\w{{6}}"  # unfinished files that an interruption left; the last of safetensors


class Mergeable(Protocol):
    """A statistic that a walk can save, and add to another of its kind."""

    def merge(self, other: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


Kind = TypeVar("Kind")


class Checkpoint:
    """A folder, visible to all ranks, from which an interrupted dissection is resumed.

    Args:
        folder: created if missing.
        settings: what the dissection depends on. Only a dissection with the same settings can be resumed.
        resume: resume from the folder. Without it the folder must not hold a dissection.
        every: seconds between two checkpoints.

    Raises:
        ValueError: the folder holds a dissection that is not to be resumed, or has other settings; the message says which.
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
                return f"{self.folder} already holds a dissection: resume it (--resume, resume=True), or delete the folder"
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                return f"{path} is damaged ({error}): delete the folder and start again"
            now = json.loads(json.dumps(settings))
            if other := [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]:
                key = min(other, key=lambda key: (key in before, key))
                if key not in before:
                    other_version = f"was started by another version of torchprobe, which did not note the {key}"
                    return f"{self.folder} {other_version}: delete it and start again"
                was, is_now, name = before[key], now.get(key), key
                while isinstance(was, dict) and isinstance(
                    is_now, dict
                ):  # down to what differs; the last name says more, such as transform beside fingerprint
                    key = max(key for key in was.keys() | is_now.keys() if was.get(key) != is_now.get(key))
                    was, is_now, name = was.get(key), is_now.get(key), f"{name}: {key}"
                return f"{self.folder} was started with another {name}: {was!r}, now it is {is_now!r}"
            return None
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return None


def clear_checkpoint(folder: Path) -> None:
    """Deletes the files of a checkpoint, and the folder if nothing else is in it."""
    for path in [*folder.iterdir()]:
        if path.name == _SETTINGS or re.fullmatch(_FILES, path.name) or re.fullmatch(_TORN, path.name):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


class ImageVectors:
    """One vector for each image: ``vectors`` (images, width), filled batch by batch. Memory is used only where it is filled."""

    def __init__(self, images: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.vectors = torch.zeros(images, width, dtype=dtype)

    def put(self, first: int, vectors: Tensor) -> None:
        self.vectors[first : first + len(vectors)] = vectors.detach().cpu()


class Walk:
    """A pass over batches, of which :meth:`mine` are for this rank. The caller shows each batch to ``statistics``, fills ``vectors``, and
    calls :meth:`finished`; at the end it calls :meth:`merge`.

    Each rank saves its statistics, and which batches they have seen, in one file, so each file is correct by itself. New vectors are saved
    in other files. They do not depend on when they are computed, so a vector may be in two files.

    Args:
        name: of the pass; the names of its files begin with it.
        make: makes the empty statistics, by key.
        vectors: what is filled, by key.
        batches: the number of batches.
        size: images in a batch; the last may have fewer.
        ranks: the processes that share the pass.
        checkpoint: where to save.
        spools: maps that are kept on disk, by layer.
    """

    def __init__(
        self,
        name: str,
        make: Mapping[str, Callable[[], Mergeable]],
        vectors: Mapping[str, ImageVectors],
        batches: int,
        size: int,
        ranks: Ranks,
        checkpoint: Checkpoint | None = None,
        spools: Mapping[str, Spool] | None = None,
    ) -> None:
        self.name, self.vectors, self.size, self.ranks, self.checkpoint = name, dict(vectors), size, ranks, checkpoint
        self.spools = dict(spools or {})
        self._make = dict(make)
        self.statistics = {key: empty() for key, empty in self._make.items()}
        self.done = torch.zeros(batches, dtype=torch.bool)
        self._unsaved: list[int] = []  # batches whose vectors are in no file yet
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

    def statistic(self, key: str, kind: type[Kind]) -> Kind:
        """The statistic of a key."""
        found = self.statistics[key]
        assert isinstance(found, kind)
        return found

    def mine(self) -> list[int]:
        """The batches left for this rank."""
        return self._left[self.ranks.rank :: self.ranks.size]

    def finished(self, batch: int) -> None:
        """All statistics have seen this batch."""
        self.done[batch] = True
        self._unsaved.append(batch)
        self._computed.append(batch)
        if self.checkpoint is not None and time.monotonic() - self._saved >= self.checkpoint.every:
            self.save()

    def merge(self) -> None:
        """Ends the pass: the first rank gets everything and saves it."""
        if self.checkpoint is not None:
            self.save()
        if self.ranks.size > 1:
            mine = None if self.ranks.first else self._message()
            for done, states, vectors in self.ranks.to_first(mine):
                self._absorb(done, states)
                for key, (batches, part) in vectors.items():
                    self._put(key, batches, part)
        if self.checkpoint is not None:
            if self.ranks.first:
                self.save()
                self._remove_others(self.checkpoint.folder)
            self.ranks.barrier()

    def _message(self) -> tuple[Tensor, dict[str, dict[str, Any]], dict[str, tuple[list[int], Tensor]]]:
        states = {key: _on_cpu(statistic.state_dict()) for key, statistic in self.statistics.items()}
        return self.done, states, {key: (self._computed, self._take(key, self._computed)) for key in self.vectors}

    def _absorb(self, done: Tensor, states: Mapping[str, Mapping[str, Any]]) -> None:
        if not bool(self.done.any()):  # the state itself: one process goes on as if it had not stopped, also with random numbers
            for key, state in states.items():
                self.statistics[key].load_state_dict(state)
            self.done |= done
            return
        for key, state in states.items():
            other = self._make[key]()
            other.load_state_dict(state)
            self.statistics[key].merge(other)
        self.done |= done

    # -- vectors -------------------------------------------------------------------------------------------------------

    def _take(self, key: str, batches: list[int]) -> Tensor:
        vectors = self.vectors[key].vectors
        return torch.cat([vectors[b * self.size : (b + 1) * self.size] for b in batches] or [vectors[:0]])

    def _put(self, key: str, batches: list[int], vectors: Tensor) -> None:
        at = 0
        for batch in batches:
            length = min(self.size, len(self.vectors[key].vectors) - batch * self.size)
            self.vectors[key].put(batch * self.size, vectors[at : at + length])
            at += length
        if at != len(vectors):
            raise ValueError(f"{len(vectors)} rows for batches that have {at}")

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state of this rank."""
        assert self.checkpoint is not None
        for spool in self.spools.values():  # first, so that no batch counts as done whose maps are lost
            spool.flush()
        folder = self.checkpoint.folder
        if self.vectors and self._unsaved:
            # Two ranks of one run never compute the same batch, so the names of the files differ.
            path = folder / f"{self.name}-rows-{self._unsaved[0]}-{self._unsaved[-1]}.safetensors"
            storage.write(path, _KIND, {key: self._take(key, self._unsaved) for key in self.vectors}, {"batches": self._unsaved})
        self._unsaved = []
        tensors: dict[str, Tensor] = {"done": self.done}
        values: dict[str, dict[str, Any]] = {}
        for key, statistic in self.statistics.items():
            state = statistic.state_dict()
            tensors |= {f"{key}/{part}": value for part, value in state.items() if isinstance(value, Tensor)}
            values[key] = {part: value for part, value in state.items() if not isinstance(value, Tensor)}
        storage.write(folder / f"{self.name}-rank{self.ranks.rank}.safetensors", _KIND, tensors, values)
        self._saved = time.monotonic()

    def _load(self, folder: Path) -> None:
        """On the first rank: reads the files of all ranks of earlier runs, and saves them as one file before anything else is written."""
        files = [storage.File(path, _KIND) for path in self._files(folder)]
        states = [(file.tensor("done", torch.bool, (len(self.done),)), file) for file in files]
        for done, file in sorted(states, key=lambda pair: -int(pair[0].sum())):
            if bool((done & self.done).any()):
                if bool((done & ~self.done).any()):
                    raise ValueError(f"{file.path} has seen batches that another file of the folder has seen as well: delete the folder")
                continue  # already merged into a larger file, just before the interruption
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
            for key, filled in self.vectors.items():
                self._put(key, batches, file.tensor(key, filled.vectors.dtype, (None, filled.vectors.shape[1])))

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
