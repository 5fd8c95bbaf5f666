"""One pass of images through an encoder, shared by ranks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchprobe.analysis.embeddings_file import GrowingFile, Part
from torchprobe.analysis.reading import Source
from torchprobe.common.messages import reason
from torchprobe.common.ranks import Ranks
from torchprobe.datasets.images import Batch, DatasetError

T = TypeVar("T")


def run(
    encoder: nn.Module,
    source: Source,
    ranks: Ranks,
    done: int,
    keep: Callable[[Part], None],
    progress: Callable[[int, int], None] | None,
    stop: Callable[[], bool] | None,
) -> bool:
    """Makes the batches from number ``done`` on, and gives them to ``keep`` of the first rank, in order; True if it was stopped."""
    place = next((tensor.device for tensor in [*encoder.parameters(), *encoder.buffers()]), torch.device("cpu"))
    mine = [i for i in range(done, source.batches) if i % ranks.size == ranks.rank]
    files = min(done * source.size, len(source))

    def share(number: int) -> Part | Exception | str | None:
        try:
            if stop is not None and stop():
                return "stop"
            return _part(encoder, place, *next(batches)) if number < source.batches else None
        except KeyboardInterrupt:
            return "stop"
        except Exception as error:  # the others have to know
            return error if ranks.size == 1 else _portable(error, ranks.rank)

    with torch.inference_mode(), _at_rest(encoder), warnings.catch_warnings(), contextlib.closing(source.read(mine)) as batches:
        warnings.filterwarnings("ignore", module="PIL")  # remarks on metadata
        for first in range(done, source.batches, ranks.size):
            turn = [first + (rank - first) % ranks.size for rank in range(ranks.size)]
            own = share(turn[ranks.rank])
            shares = [own, *ranks.to_first(own)]
            end: Exception | str | None = None
            for _, part in sorted(zip(turn, shares, strict=False), key=lambda pair: pair[0]):
                if isinstance(part, (Exception, str)):
                    end = part
                if end is None and isinstance(part, Part) and ranks.first:
                    try:
                        keep(part)
                    except OSError as error:  # such as a full disk
                        end = error
                    files += part.files
            end, files = ranks.from_first((end, files))
            if isinstance(end, Exception):
                raise end
            if end is not None:
                return True
            if progress is not None:
                progress(files, len(source))
    return False


def _part(encoder: nn.Module, place: torch.device, batch: Batch, labels: list[int]) -> Part:
    if not batch.names:
        return Part(skipped=batch.unreadable)
    h = encoder(batch.pixels.to(place))
    if not isinstance(h, Tensor) or h.dim() != 2 or len(h) != len(batch.names) or not h.is_floating_point():
        given = f"{h.dtype} {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"the encoder gave {given} for {len(batch.names)} images; expected one floating point vector each, (N, d)")
    return Part(h.float().cpu().contiguous(), labels, batch.names, batch.unreadable)


def finish(kept: list[Part], file: GrowingFile | None, partial: bool) -> Part:
    """Everything in one; of a file the representations stay on the disk, and their width is told."""
    if file is None:
        rows = [part.h for part in kept if part.ids]
        whole = Part(skipped=[pair for part in kept for pair in part.skipped])
        whole.h = torch.cat(rows) if rows else whole.h
        whole.y, whole.ids = [label for part in kept for label in part.y], [name for part in kept for name in part.ids]
    else:
        whole = Part(torch.empty(0, file.features), file.y, file.ids, file.skipped)
    if not whole.ids and partial:
        raise KeyboardInterrupt
    if not whole.ids:
        if file is not None:
            file.discard()
        name, why = whole.skipped[0]
        raise DatasetError(f"none of the {len(whole.skipped)} images could be read; the first, {name}: {why}")
    if file is not None and not partial:
        file.finish()
        return Part()  # the others read it from there
    return whole


def by_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """What ``action`` gives on the first rank, or raises there, on all of them."""
    outcome: T | BaseException | None = None
    if ranks.first:
        try:
            outcome = action()
        except (OSError, RuntimeError, ValueError, KeyboardInterrupt) as error:
            outcome = error
    outcome = ranks.from_first(outcome)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _portable(error: Exception, rank: int) -> Exception:
    """An error that other processes can be sent."""
    kind = type(error) if type(error) in (DatasetError, ValueError, TypeError) else RuntimeError
    return kind(f"rank {rank}: {error if kind is type(error) else reason(error)}")


@contextlib.contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; each part of it is put back afterwards."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
