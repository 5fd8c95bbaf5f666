"""One pass over all images: shared by ranks, saved at intervals, resumed, and merged at the end."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from torchprobe.common import storage
from torchprobe.common.checked import DamagedError, read_checked, write_checked
from torchprobe.common.facts import digest_of, plain, require_same
from torchprobe.common.files import remove_leftovers, sync_folder
from torchprobe.common.locks import locked
from torchprobe.common.ranks import Ranks
from torchprobe.dissection.spool import Spool, file_of_run

_KIND = "torchprobe.dissection.walk"
_SETTINGS = "settings.json"
_LOCK = ".lock"
_FILES = r"((thresholds|overlap|labeler|words)-(rank|rows-)[\d-]+|maps-[\d-]+)\.safetensors"


class Mergeable(Protocol):
    """A statistic that a walk can save, and add to another of its kind."""

    def merge(self, other: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


Kind = TypeVar("Kind")


class Checkpoint:
    """A folder, visible to all ranks, from which an interrupted dissection is resumed. Within a ``with`` block it is locked.

    Args:
        folder: created if missing.
        facts: what the dissection depends on. Only a dissection with the same facts can be resumed.
        resume: resume from the folder. Without it the folder must not hold a dissection.
        every: seconds between two checkpoints.
        ranks: the processes that share the dissection, entered.

    Attributes:
        run: a digest of the facts, which each file of the folder holds.

    Raises:
        ChangedError: on entry, that the folder holds a dissection with other facts; the message says which.
        ValueError: on entry, that it holds a dissection that is not to be resumed, a damaged file, or that another process uses it.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], resume: bool, every: float, ranks: Ranks) -> None:
        self.folder, self.every = folder, every
        self.run = digest_of(plain(facts))
        self._facts, self._resume, self._ranks, self._stack = facts, resume, ranks, contextlib.ExitStack()

    def __enter__(self) -> Checkpoint:
        with contextlib.ExitStack() as stack:
            self._ranks.on_first(lambda: self._prepare(stack))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(self.folder / _LOCK, os.fspath(self.folder)))
        remove_leftovers(self.folder, alone=True)
        path = self.folder / _SETTINGS
        if not path.exists():
            _remove_files(self.folder)  # without the settings nothing tells what they are of: their removal was interrupted
            write_checked(path, {"facts": plain(self._facts)})
            return
        if not self._resume:
            raise ValueError(f"{self.folder} already holds a dissection: resume it (--resume, resume=True), or delete the folder")
        if "facts" not in read_checked(path, required=False):
            raise ValueError(f"{self.folder} was started by another version of torchprobe: delete the folder and start again")
        found = read_checked(path)["facts"]
        if not isinstance(found, dict):
            raise DamagedError(f"{path} is damaged: it has no facts")
        require_same(self.folder, found, self._facts, "delete the folder and start again")


def clear_checkpoint(folder: Path) -> None:
    """Deletes the files of a checkpoint, and the folder if nothing else is in it. A run that was killed meanwhile finds no settings."""
    (folder / _SETTINGS).unlink(missing_ok=True)
    sync_folder(folder)
    remove_leftovers(folder, alone=True)
    _remove_files(folder)
    (folder / _LOCK).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _remove_files(folder: Path) -> None:
    for path in [*folder.iterdir()]:
        if re.fullmatch(_FILES, path.name):
            path.unlink(missing_ok=True)


class ImageVectors:
    """One vector for each image: ``vectors`` (images, width), filled batch by batch. Memory is used only where it is filled."""

    def __init__(self, images: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.vectors = torch.zeros(images, width, dtype=dtype)

    def put(self, first: int, vectors: Tensor) -> None:
        self.vectors[first : first + len(vectors)] = vectors.detach().cpu()


class Walk:
    """A pass over batches, of which :meth:`mine` are for this rank. In a block :meth:`showing`, the caller shows each of them
    to ``statistics`` and fills ``vectors``; at the end it calls :meth:`merge`.

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
        ordered: the statistics depend on the order of the batches, as a random sample does. Then every rank keeps its own share of the
            batches and its own statistics until the end, also in a resumed run, which needs as many ranks as before. Otherwise the ranks
            of a resumed run share what is left, and there may be more or fewer of them.

    Attributes:
        before: the batches that earlier runs finished, bool (batches,).
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
        ordered: bool = False,
    ) -> None:
        self.name, self.vectors, self.size, self.ranks, self.checkpoint = name, dict(vectors), size, ranks, checkpoint
        self.spools = dict(spools or {})
        self._make = dict(make)
        self.statistics = {key: empty() for key, empty in self._make.items()}
        self.done = torch.zeros(batches, dtype=torch.bool)
        self._unsaved: list[int] = []  # batches whose vectors are in no file yet
        self._computed: list[int] = []  # batches of this run
        self._filled = torch.zeros_like(self.done)  # batches whose vectors were read
        self._midst = False  # whether some statistics may have seen a batch that others have not
        self._saved = time.monotonic()
        self.before = torch.zeros_like(self.done)
        if checkpoint is not None:
            self.before = self._load_own(checkpoint) if ordered else ranks.on_first(lambda: self._load(checkpoint))
        shared = torch.arange(batches) if ordered else (~self.before).nonzero().flatten()
        self._left = [batch for batch in shared[ranks.rank :: ranks.size].tolist() if not self.before[batch]]

    # -- the walk ------------------------------------------------------------------------------------------------------

    def statistic(self, key: str, kind: type[Kind]) -> Kind:
        """The statistic of a key."""
        found = self.statistics[key]
        assert isinstance(found, kind)
        return found

    def mine(self) -> list[int]:
        """The batches left for this rank."""
        return self._left

    @contextlib.contextmanager
    def showing(self, batch: int) -> Iterator[None]:
        """The block shows a batch to all statistics. They are saved at its end, if the last checkpoint is old enough."""
        self._midst = True
        yield
        self.done[batch], self._midst = True, False
        self._unsaved.append(batch)
        self._computed.append(batch)
        if self.checkpoint is not None and time.monotonic() - self._saved >= self.checkpoint.every:
            self.save()

    def interrupted(self) -> None:
        """Saves what was finished, unless the interruption came in the midst of a batch, which some statistics may have seen and others
        not. Then the last checkpoint counts."""
        if self.checkpoint is not None and not self._midst:
            self.save()

    def merge(self) -> None:
        """Ends the pass: the first rank gets everything and saves it."""
        if self.checkpoint is not None:
            self.save()
        if self.ranks.size > 1:
            mine = None if self.ranks.first else self._message()
            for done, states, vectors in self.ranks.to_first(mine):
                if bool(done.any()):
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
            noted = {"run": self.checkpoint.run, "batches": self._unsaved}
            storage.write(path, _KIND, {key: self._take(key, self._unsaved) for key in self.vectors}, noted)
        self._unsaved = []
        tensors: dict[str, Tensor] = {"done": self.done}
        values: dict[str, Any] = {"run": self.checkpoint.run}
        for key, statistic in self.statistics.items():
            state = statistic.state_dict()
            tensors |= {f"{key}/{part}": value for part, value in state.items() if isinstance(value, Tensor)}
            values[key] = {part: value for part, value in state.items() if not isinstance(value, Tensor)}
        storage.write(folder / f"{self.name}-rank{self.ranks.rank}.safetensors", _KIND, tensors, values)
        self._saved = time.monotonic()

    def _load_own(self, checkpoint: Checkpoint) -> Tensor:
        """Reads the file of this rank, and on the first rank the vectors of all; returns the batches that any rank has seen."""

        def read() -> None:
            path = checkpoint.folder / f"{self.name}-rank{self.ranks.rank}.safetensors"
            if path.exists():
                self._absorb(*self._saved_in(file_of_run(path, _KIND, checkpoint.run)))

        def read_first() -> bool:
            read()
            self._load_vectors(checkpoint)
            return bool(self.done.all())

        problem: Exception | None = None
        if not self.ranks.on_first(read_first) and not self.ranks.first:  # else the first one has merged all, just before an interruption
            try:
                read()
            except (OSError, ValueError) as error:
                problem = error
        seen = self.done.clone()
        for theirs, wrong in self.ranks.to_first((self.done, problem)):
            seen, problem = seen | theirs, problem or wrong
        if problem := self.ranks.from_first(problem):
            raise problem
        self.ranks.on_first(lambda: self._require_vectors(checkpoint, seen))
        every: Tensor = self.ranks.from_first(seen)
        return every

    def _load(self, checkpoint: Checkpoint) -> Tensor:
        """On the first rank: reads the files of all ranks of earlier runs, and saves them as one file before anything else is written.
        Returns the batches that they have seen."""
        files = [file_of_run(path, _KIND, checkpoint.run) for path in self._files(checkpoint.folder)]
        states = [(file.tensor("done", torch.bool, (len(self.done),)), file) for file in files]
        for done, file in sorted(states, key=lambda pair: -int(pair[0].sum())):
            if bool((done & self.done).any()):
                if bool((done & ~self.done).any()):
                    raise ValueError(f"{file.path} has seen batches that another file of the folder has seen as well: delete the folder")
                continue  # already merged into a larger file, just before the interruption
            self._absorb(*self._saved_in(file))
        if files:
            self.save()
            self._remove_others(checkpoint.folder)
            self._load_vectors(checkpoint)
            self._require_vectors(checkpoint, self.done)
        return self.done.clone()

    def _saved_in(self, file: storage.File) -> tuple[Tensor, dict[str, dict[str, Any]]]:
        """The batches that the statistics in a file have seen, and these."""
        return file.tensor("done", torch.bool, (len(self.done),)), {key: _state(file, key) for key in self.statistics}

    def _load_vectors(self, checkpoint: Checkpoint) -> None:
        for path in sorted(checkpoint.folder.glob(f"{self.name}-rows-*.safetensors")):
            file = file_of_run(path, _KIND, checkpoint.run)
            batches = file.value("batches", list)
            if not all(type(b) is int and 0 <= b < len(self.done) for b in batches):
                raise file.error("batches", f"batches are numbered 0 to {len(self.done) - 1}")
            for key, filled in self.vectors.items():
                self._put(key, batches, file.tensor(key, filled.vectors.dtype, (None, filled.vectors.shape[1])))
            self._filled[batches] = True

    def _require_vectors(self, checkpoint: Checkpoint, seen: Tensor) -> None:
        """Raises DamagedError if the vectors of a batch that was seen are in no file."""
        if self.vectors and bool((missing := seen & ~self._filled).any()):
            batch = int(missing.int().argmax())
            raise DamagedError(f"{checkpoint.folder} lacks the file {self.name}-rows-… of batch {batch}: delete the folder and start again")

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
