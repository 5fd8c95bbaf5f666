"""Maps on disk that may still exceed the threshold of their unit, while the thresholds are being learned."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from torchprobe.common import storage
from torchprobe.common.checked import DamagedError

_KIND = "torchprobe.dissection.spool"
_BUFFER = 64 << 20
"""Bytes that wait in memory before a file is written."""

_Part = tuple[tuple[int, ...], Tensor, Tensor]
"""The shape of all maps of a batch, which of them are kept, and these."""
_Numbered = tuple[int, tuple[int, ...], Tensor, Tensor]
"""The same with the number of the batch."""

_HUGE = 2.0**126
"""Between values that are larger, interpolation may overflow: such maps are kept."""

_KEPT = 0.9
"""The share of the budget that may still be in use after maps have been dropped. Above it the spool gives up."""


def worthwhile(images: int, units: int, positions: int, quantile: Fraction, budget: int) -> bool:
    """Whether the maps of a layer that exceed their thresholds may fit a budget in bytes, if active positions do not lie together."""
    share = min(1.0, float(quantile) * positions)
    return share * images * units * positions * 4 <= 2 * budget


class Spool:
    """The maps of one layer, batch by batch. A map is kept if a value of it is above the lowest value that the threshold of its unit can
    have. That bound only rises, so when the thresholds are known, every map that exceeds them is there.

    Each file belongs to some batches. A file is replaced by a smaller one when space is short; if dropping maps does not help, or if the
    disk cannot be written, the spool gives up and removes its files, and the maps must be computed again. Files of other processes in the
    folder are only read.

    Args:
        name: files are called maps-<name>-….safetensors.
        folder: where they lie; None: a temporary folder, which is removed with the spool.
        budget: bytes.
        run: of which run the files are, see :class:`torchprobe.dissection.walk.Checkpoint`.

    >>> spool = Spool("0", None, 1 << 20)
    >>> maps = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.5]]]])
    >>> spool.put(0, maps, torch.tensor([1.0, 1.0]))
    >>> spool.get(0, torch.tensor([1.5, 1.2])).tolist()
    [[[[1.0, 2.0]], [[1.2000000476837158, 1.2000000476837158]]]]
    """

    def __init__(self, name: str, folder: Path | None, budget: int, run: str = "") -> None:
        self.name, self.budget, self.run = name, budget, run
        self.alive = budget > 0
        self._folder, self._temporary = folder, folder is None
        self._buffer: list[_Numbered] = []
        self._buffered = 0
        self._bound: Tensor | None = None  # the largest one that a map was compared with
        self._files: dict[Path, int] = {}  # its own → bytes
        self._batches: dict[int, Path] = {}
        self._open: tuple[Path, dict[int, _Part]] | None = None

    def put(self, batch: int, maps: Tensor, bound: Tensor) -> None:
        """Adds the maps of a batch.

        Args:
            batch: its number.
            maps: (images, units, h, w), floating point.
            bound: float32 (units,): no threshold will be below it. −inf: unknown.
        """
        if not self.alive:
            return
        maps = maps.detach().float().contiguous()
        bound = bound.to(maps.device)
        chosen = _above(maps.flatten(0, 1), bound.repeat(len(maps)))
        self._bound = bound.cpu() if self._bound is None else torch.maximum(self._bound, bound.cpu())
        self._buffer.append((batch, tuple(maps.shape), chosen.cpu(), maps.flatten(0, 1)[chosen].cpu()))
        self._buffered += self._buffer[-1][3].nbytes
        if self._buffered > _BUFFER:
            self._thin_buffer()
            if self._buffered > _BUFFER // 2:
                self.flush()

    def flush(self) -> None:
        """Writes what waits in memory. If it cannot be written, the spool gives up."""
        if not self.alive or not self._buffer or self._bound is None:
            return
        try:
            self._flush()
        except OSError:  # the disk is full: what the spool has taken is of more use to the checkpoint
            self.give_up()

    def _flush(self) -> None:
        assert self._bound is not None
        self._write(self._path(self._buffer[0][0], self._buffer[-1][0]), self._buffer)
        self._buffer, self._buffered = [], 0
        if sum(self._files.values()) > min(self.budget, self._room()):
            for path in [*self._files]:
                self._write(path, [(batch, *part) for batch, part in self._read(path).items()])
            if sum(self._files.values()) > _KEPT * min(self.budget, self._room()):
                self.give_up()

    def holds(self, batches: Iterable[int]) -> bool:
        """Whether the maps of all these batches are here."""
        here = self._batches.keys() | {batch for batch, *_ in self._buffer}
        return self.alive and here >= set(batches)

    def serves(self, thresholds: Tensor) -> bool:
        """Whether no threshold, float32 (units,), is below a bound that maps were compared with. Estimated thresholds may be."""
        bounds = [] if self._bound is None else [self._bound]
        try:
            bounds += [self._bound_of(self._file(path)) for path in sorted({*self._batches.values()})]
        except FileNotFoundError:  # another process has given up
            return False
        return not any(bool((thresholds < bound).any()) for bound in bounds)

    def get(self, batch: int, thresholds: Tensor) -> Tensor:
        """The maps of a batch, float32 on the CPU. A map that is not above its threshold may have that level everywhere.

        Args:
            batch: its number.
            thresholds: float32 (units,), on the CPU.
        """
        path = self._batches.get(batch)
        if path is None:
            shape, chosen, maps = next(part[1:] for part in self._buffer if part[0] == batch)
        else:
            if self._open is None or self._open[0] != path:
                self._open = path, self._read(path)
            shape, chosen, maps = self._open[1][batch]
        level = thresholds.nan_to_num(nan=0.0)[None, :, None].expand(shape[0], shape[1], shape[2] * shape[3])
        dense = level.reshape(shape[0] * shape[1], -1).clone()
        dense[chosen] = maps.flatten(1)
        return dense.view(shape)

    def adopt(self, done: Iterable[int]) -> None:
        """Takes over the files of earlier runs in the folder. No other process may write there yet.

        Files of batches that are not ``done`` are removed, since these are computed again, and so are damaged files.
        """
        known = set(done)
        for path in self._found():
            try:
                file = self._file(path)
                batches, bound = file.value("batches", list), self._bound_of(file)
                wanted = known >= set(batches)
            except (ValueError, TypeError):
                wanted = False
            if not wanted:
                path.unlink()
                continue
            self._bound = bound if self._bound is None else torch.maximum(self._bound, bound)
            self._note(path, batches)

    def find(self) -> None:
        """Finds the files that other processes have written to the folder, when all of them have written everything."""
        for path in self._found():
            if path not in self._files:
                self._batches.update(dict.fromkeys(self._file(path).value("batches", list), path))

    def give_up(self) -> None:
        """Removes its files; from now on nothing is kept."""
        self.alive = False
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files, self._batches, self._buffer, self._buffered, self._open = {}, {}, [], 0, None
        self.close()

    def close(self) -> None:
        """Removes the folder if it is a temporary one, and everything in it."""
        if self._temporary and self._folder is not None:
            self.alive = False
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _thin_buffer(self) -> None:
        """Drops maps that were above an earlier bound but are not above the present one."""
        self._buffer = [self._thinned(part) for part in self._buffer]
        self._buffered = sum(part[3].nbytes for part in self._buffer)

    def _thinned(self, part: _Numbered) -> _Numbered:
        batch, shape, chosen, maps = part
        assert self._bound is not None
        still = _above(maps, self._bound[chosen % shape[1]])
        return (batch, shape, chosen, maps) if len(still) == len(chosen) else (batch, shape, chosen[still], maps[still])

    def _path(self, first: int, last: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="torchprobe-maps-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"maps-{self.name}-{first}-{last}.safetensors"

    def _room(self) -> float:
        """Bytes that the files may take without filling more than half of what is free on the disk."""
        assert self._folder is not None
        return (shutil.disk_usage(self._folder).free + sum(self._files.values())) / 2

    def _write(self, path: Path, parts: list[_Numbered]) -> None:
        parts = [self._thinned(part) for part in parts]
        assert self._bound is not None
        tensors = {
            "bound": self._bound,
            "chosen": torch.cat([part[2] for part in parts]).int(),
            "maps": torch.cat([part[3] for part in parts]),
        }
        batches, shapes = [part[0] for part in parts], [part[1] for part in parts]
        noted = {"run": self.run, "batches": batches, "shapes": shapes, "counts": [len(part[2]) for part in parts]}
        storage.write(path, _KIND, tensors, noted)
        self._note(path, batches)

    def _found(self) -> list[Path]:
        return [] if self._folder is None or not self.alive else sorted(self._folder.glob(f"maps-{self.name}-*.safetensors"))

    def _file(self, path: Path) -> storage.File:
        return file_of_run(path, _KIND, self.run)

    @staticmethod
    def _bound_of(file: storage.File) -> Tensor:
        return file.tensor("bound", torch.float32, (None,))

    def _note(self, path: Path, batches: list[int]) -> None:
        self._files[path] = path.stat().st_size
        self._batches.update(dict.fromkeys(batches, path))

    def _read(self, path: Path) -> dict[int, _Part]:
        file = self._file(path)
        batches, shapes, counts = (file.value(name, list) for name in ("batches", "shapes", "counts"))
        bound = self._bound_of(file)
        maps = file.tensor("maps", torch.float32, (None, None, None))
        chosen = file.tensor("chosen", torch.int32, (len(maps),)).long()
        if not len(batches) == len(shapes) == len(counts) or sum(counts) != len(maps):
            raise file.error("batches", "batches, shapes and counts do not fit the maps")
        found = {}
        for batch, shape, index, part in zip(batches, shapes, chosen.split(counts), maps.split(counts), strict=True):
            if len(shape) != 4 or shape[1] != len(bound) or list(part.shape[1:]) != shape[2:]:
                raise file.error("shapes", f"batch {batch} has maps of shape {shape}")
            if len(index) and not 0 <= int(index.amin()) <= int(index.amax()) < math.prod(shape[:2]):
                raise file.error("chosen", f"batch {batch} has maps of images or units that it does not have")
            found[batch] = tuple(shape), index, part
        return found


def _above(maps: Tensor, bound: Tensor) -> Tensor:
    """Which maps (n, h, w) have a value above their bound (n,), or one between which interpolation may overflow: int64, ascending. A nan
    counts as well."""
    flat = maps.flatten(1)
    largest, smallest = flat.amax(1), flat.amin(1)
    return ((largest > bound) | ~(largest < _HUGE) | ~(smallest > -_HUGE)).nonzero().flatten()


def file_of_run(path: Path, kind: str, run: str) -> storage.File:
    """A file that was written by a run, see :class:`torchprobe.dissection.walk.Checkpoint`.

    Raises:
        DamagedError: it is not as it was written, or it is of another run.
    """
    file = storage.File(path, kind, checked=True)
    if file.values.get("run") != run:
        raise DamagedError(f"{path} belongs to another dissection than the files beside it: delete the folder and start again")
    return file


def remove_maps(folder: Path) -> None:
    """Removes the maps of all layers, also those that a run with another budget has left."""
    for path in folder.glob("maps-*.safetensors"):
        path.unlink(missing_ok=True)
